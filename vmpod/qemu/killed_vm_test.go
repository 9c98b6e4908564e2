package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// startVictim runs a driver's process of its own that launches s, and returns
// once it has begun to; say tells its next line.
func startVictim(t *testing.T, cfg Config, s vmpod.Spec) (cmd *exec.Cmd, say func() string) {
	t.Helper()
	cfg.Logger = nil
	b, err := json.Marshal(victim{Config: cfg, Spec: s})
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+string(b))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	say = func() string { lines.Scan(); return lines.Text() }
	if got := say(); got != "begin" {
		cmd.Process.Kill()
		cmd.Wait()
		t.Fatalf("victim: %s", got)
	}
	return cmd, say
}

// TestDriverKilled kills a driver's process with SIGKILL. The guest boots on;
// the next driver reaches it and, though not QEMU's parent, sees it end.
func TestDriverKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	cfg := testConfig(t)
	s := smallSpec("orphan-e5e5")
	cmd, say := startVictim(t, cfg, s)
	if got := say(); got != "launched" {
		t.Fatalf("victim: %s", got)
	}
	cmd.Process.Kill()
	cmd.Wait()

	d := newDriver(t, cfg)
	defer removeTestCgroups(d)
	defer d.Close()
	m, err := d.Open(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	vmpodtest.Dial(t, m)
	pid := m.(*Machine).proc.PID
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e, err := m.Wait(ctx)
	if err != nil || e.Reason != vmpod.ExitVMMKilled || !strings.Contains(e.Message, "vanished") {
		t.Errorf("exit: %+v, %v", e, err)
	}
	if err := m.Remove(ctx); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, cfg); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestDriverKilledMidLaunch kills drivers at many moments of a launch. What
// the next driver finds is either a whole machine or none.
func TestDriverKilledMidLaunch(t *testing.T) {
	if testing.Short() {
		t.Skip("starts many machines")
	}
	cfg := testConfig(t)
	for _, ms := range []int{0, 3, 6, 9, 12, 16, 20, 25, 30, 40, 50, 70, 100} {
		s := smallSpec("half-b0b0")
		cmd, _ := startVictim(t, cfg, s)
		time.Sleep(time.Duration(ms) * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()

		d := newDriver(t, cfg)
		all, err := d.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		found := "nothing"
		for _, m := range all {
			st, err := m.Status(t.Context())
			if err != nil || st.State != vmpod.StateRunning {
				t.Errorf("killed after %d ms: found %+v, %v", ms, st, err)
			}
			found = string(st.State)
			if err := m.Remove(t.Context()); err != nil {
				t.Errorf("killed after %d ms: Remove: %v", ms, err)
			}
		}
		t.Logf("killed after %d ms: %s", ms, found)
		if left := leftovers(t, cfg); len(left) > 0 {
			t.Errorf("killed after %d ms: left behind: %q", ms, left)
		}
		d.Close()
		removeTestCgroups(d)
	}
}
