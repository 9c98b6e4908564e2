package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/cmd/atoll/internal/leftovers"
	"github.com/openatoll/atoll/cmd/atoll/internal/process"
	"github.com/openatoll/atoll/supervisor/controlplane"
)

// TestMain lets the test binary be the supervisor that Up starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == Supervisor {
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		l, err := NewLayout(os.Args[3])
		if err == nil {
			err = Supervise(ctx, l, "", NewReporter(3))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// fakeSpherelet is a node agent that does what its script says.
func fakeSpherelet(t *testing.T, script string) Assets {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, Spherelet), []byte("#!/bin/sh\n[ \"$1\" = cleanup ] && exit 0\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return Assets{Bin: dir}
}

// A real control plane beside a node agent that fails: Up says why, in the
// agent's own words, and takes everything back; the data stays usable.
func TestUpTakesBackWhatItStarted(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	l := layout(t)
	isolated := true
	var steps []string
	opt := Options{
		Isolated: &isolated, Node: "n1",
		Assets:   fakeSpherelet(t, "sleep 1; echo 'level=ERROR msg=\"no such guest\"'; exit 1"),
		Progress: func(s Step) { steps = append(steps, s.What); t.Logf("%-20s %v %s", s.What, s.Took, s.Detail) },
	}
	t.Cleanup(func() {
		if err := Down(context.Background(), l, DownOptions{Purge: true, Assets: opt.Assets}); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	_, err := Up(ctx, l, opt)
	var c *ComponentError
	if !errors.As(err, &c) || c.Component != Spherelet || !strings.Contains(strings.Join(c.Lines, "\n"), "no such guest") {
		t.Fatalf("Up = %v (%+v), want the node agent's error", err, c)
	}
	if !strings.Contains(strings.Join(steps, " "), controlplane.PhaseReady) {
		t.Errorf("steps: %v", steps)
	}
	if left, err := leftovers.Find(Scope(l)); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if s, err := ReadState(l); err != nil || !s.Isolated || s.Node != "n1" {
		t.Errorf("state after the failure: %+v, %v", s, err)
	}
}

// What of a control plane can be done while it runs and the node agent does
// not matter.
func TestSupervisorLives(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	l := layout(t)
	isolated := true
	u := &up{Layout: l, opt: Options{Progress: func(Step) {}}, state: State{Isolated: isolated, Node: "n1"}, last: time.Now()}
	t.Cleanup(func() {
		if err := Down(context.Background(), l, DownOptions{Purge: true}); err != nil {
			t.Error(err)
		}
		if left, err := leftovers.Find(Scope(l)); err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
		if _, err := os.Stat(l.DataDir()); err == nil {
			t.Error("data left behind by --purge")
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if err := errors.Join(u.dataDir(), u.network(ctx)); err != nil {
		t.Fatal(err)
	}
	c, ran, err := u.supervisor(ctx)
	if err != nil || ran {
		t.Fatalf("supervisor: ran before %v, %v", ran, err)
	}
	if id, ok := process.Running(l.Record(Supervisor)); !ok || id.PID != c.id.PID {
		t.Errorf("recorded process %v, %v; want %d", id, ok, c.id.PID)
	}
	if _, ran, err = u.supervisor(ctx); err != nil || !ran {
		t.Errorf("second call: ran before %v, %v", ran, err)
	}
	st, err := GetStatus(ctx, l)
	if err != nil || st.Up() || !st.Processes[0].Running || Unhealthy(st.Components) != nil || len(st.Errors) > 0 {
		t.Errorf("status %+v, %v", st, err)
	}
	opposite := false
	if _, err := chooseState(l, Options{Isolated: &opposite}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another isolation while it runs: %v", err)
	}
	file := filepath.Join(t.TempDir(), "backup")
	if _, err := controlplane.Backup(ctx, ControlPlaneConfig(l, u.state), file); err != nil {
		t.Errorf("backup: %v", err)
	}
	hosts, err := os.ReadFile(filepath.Join(l.HostsDir(), registryName, "hosts.toml"))
	if err != nil || !strings.Contains(string(hosts), "http://127.0.0.1:") {
		t.Errorf("hosts.toml: %q, %v", hosts, err)
	}
}
