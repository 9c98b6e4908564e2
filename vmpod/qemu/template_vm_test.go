package qemu

import (
	"bufio"
	"context"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// probeTalk is the Probe of the suite's guest.
func probeTalk(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write([]byte("\nready\n")); err != nil {
		return err
	}
	for r := bufio.NewReader(conn); ; {
		line, err := r.ReadString('\n')
		if err != nil || strings.Contains(line, "ready") {
			return err
		}
	}
}

// templateConfig makes templates on demand.
func templateConfig(t testing.TB) Config {
	cfg := testConfig(t)
	cfg.Templates = Templates{Enabled: true, Probe: probeTalk}
	return cfg
}

// awaitTemplate has d make the template for s.
func awaitTemplate(t testing.TB, d *Driver, s vmpod.Spec) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := d.AwaitTemplate(ctx, s); err != nil {
		t.Fatal(err)
	}
}

func launchVM(t testing.TB, d *Driver, s vmpod.Spec) *Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	m, err := d.Launch(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	return m.(*Machine)
}

func TestClones(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	cfg := templateConfig(t)
	d := newDriver(t, cfg)
	defer func() { d.Close(); removeTestCgroups(d) }()
	s := smallSpec("clone-a")
	awaitTemplate(t, d, s)
	s.Disks = []vmpod.Disk{makeDisk(t, "eph", "writable", 16<<20)}
	m := launchVM(t, d, s)
	if !m.Origin().Cloned {
		t.Fatalf("origin: %+v", m.Origin())
	}
	k := vmpodtest.Dial(t, m)
	t.Log(k.Ask("boot"), k.Ask("memory"))
	k.AskUntil("disks", func(a string) bool { return a == "eph:32768:0" })
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
}
