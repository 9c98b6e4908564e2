package qemu

import (
	"os/exec"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// becomes waits until a process is stopped, or goes on, after a signal that says
// so: the kernel does that later than it returns from kill.
func becomes(pid int, want bool) bool {
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if stopped(pid) == want {
			return true
		}
	}
	return false
}

// TestVitals reads them off a process that does nothing.
func TestVitals(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	m := &Machine{proc: process{PID: pid}}
	p, err := m.Progress(t.Context())
	if _, ok := p.Waited[pid]; err != nil || !ok || p.Stuck {
		t.Errorf("progress %+v, %v", p, err)
	}
	if stopped(pid) {
		t.Error("a process that sleeps counts as stopped")
	}
	if _ = unix.Kill(pid, unix.SIGSTOP); !becomes(pid, true) {
		t.Error("SIGSTOP is not seen")
	}
	if _ = unix.Kill(pid, unix.SIGCONT); !becomes(pid, false) {
		t.Error("SIGCONT is not seen")
	}
	if stopped(1 << 30) {
		t.Error("no process counts as stopped")
	}
}

func TestProgressSince(t *testing.T) {
	before := vmpod.Progress{Waited: map[int]time.Duration{1: time.Second, 2: time.Second, 3: time.Second}}
	now := vmpod.Progress{Waited: map[int]time.Duration{1: 2 * time.Second, 2: 5 * time.Second, 4: time.Hour}}
	if got := now.Since(before); got != 4*time.Second {
		t.Errorf("the longest wait is %s: a thread that is new has not waited since", got)
	}
}

func TestConsoleInMessage(t *testing.T) {
	for name, console := range map[string]string{
		"none": "", "short": "a\nb\n", "long": strings.Repeat("line of text\n", 1000), "one long line": strings.Repeat("é", 4000), "cut letters": strings.Repeat("\xff", 3000) + "\nend",
	} {
		got := withConsole("why", console)
		if !strings.HasPrefix(got, "why") || len(got) > maxConsoleTail+100 || !utf8.ValidString(got) {
			t.Errorf("%s: %d bytes: %q", name, len(got), got[:min(len(got), 200)])
		}
		if lines := strings.Split(got, "\n"); name == "long" && (len(lines) < 100 || lines[2] != "line of text") {
			t.Errorf("%s: %q", name, lines[:3])
		}
	}
}

func TestDiskFaultsPass(t *testing.T) {
	now := time.Now()
	f := diskFaults{count: map[string]int{"eph": 3}, last: "eph", full: true, at: now}
	if reason, _ := f.describe(now.Add(faultLasts / 2)); reason != vmpod.ReasonHostDiskFull {
		t.Errorf("soon after: %q", reason)
	}
	if reason, _ := f.describe(now.Add(2 * faultLasts)); reason != "" {
		t.Errorf("long after: %q", reason)
	}
}
