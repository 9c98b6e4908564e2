package crashmatrix

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/openatoll/atoll/netplugin/netplugintest"
)

var (
	full  = flag.Bool("full", false, "kill at every point, not at one an operation")
	table = flag.String("table", "", "`file` for the results as a table")
	only  = flag.Int("round", -1, "do this `round` alone")
	given = flag.String("spherelet", "", "`binary` with failpoints, instead of building one")
)

func TestMain(m *testing.M) { netplugintest.Isolate(m) }

// build makes spherelet with failpoints. Only packages of this module are
// compiled anew for the tag.
func build(t *testing.T) string {
	t.Helper()
	if *given != "" {
		return *given
	}
	out, err := filepath.Abs("../../build/crash-matrix/spherelet")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "go", "build", "-tags", "failpoints", "-buildvcs=false", "-ldflags", "-s -w", "-o", out, "./cmd/spherelet")
	cmd.Dir = "../.."
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, said)
	}
	return out
}

func loopbackUp(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err == nil {
		_, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestCrashMatrix(t *testing.T) {
	if testing.Short() {
		t.Skip("boots VMs")
	}
	netplugintest.Isolated(t)
	began := time.Now()
	loopbackUp(t)
	n := newNode(t, build(t))
	registry := serveRegistry(t)
	base, image := registry.push(t, "neighbour"), registry.push(t, "app")
	if _, err := n.start(""); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), rpcTimeout)
	accelerator, err := n.accelerator(ctx)
	if err == nil {
		err = n.pull(ctx, base.ref)
	}
	cancel()
	if err != nil {
		t.Fatal(err)
	}
	b := startNeighbour(t, n, base.ref)
	plan := rounds(!*full)
	if *only >= 0 {
		plan = rounds(false)[*only : *only+1]
	}
	cells := 0
	for _, visits := range plan {
		cells += len(visits)
	}
	var results []result
	report := func(res result) {
		results = append(results, res)
		t.Logf("%3d/%d %s", len(results), cells, res)
		if !res.ok() {
			t.Errorf("%s: %s%s%s%s", res.point, res.died, res.retry, res.orphans, res.noticed)
		}
	}
	for i, visits := range plan {
		r := &round{t: t, node: n, registry: registry, neighbour: b, image: image, number: i, visits: visits, report: report}
		r.run()
	}
	if err := n.deleteKept(t); err != nil {
		t.Error(err)
	}
	last := &round{t: t, node: n, registry: registry, neighbour: b}
	if wrong := last.settle(t.Context(), true); len(wrong) > 0 {
		t.Errorf("at the end: %v", wrong)
	}
	if err := last.rest(); err != nil {
		t.Error(err)
	}
	lines, err := b.lines()
	if err != nil {
		t.Error(err)
	}
	s := summary{cells: len(results), rounds: len(plan), lines: lines, took: time.Since(began), accelerator: accelerator}
	t.Log(s)
	if *table != "" {
		if err := os.WriteFile(*table, []byte(writeTable(results, s)), 0o644); err != nil {
			t.Error(err)
		}
	}
	if len(results) != cells && !t.Failed() {
		t.Error(fmt.Errorf("%d of %d cells were looked at", len(results), cells))
	}
}
