package process

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/openatoll/atoll/internal/procstate"
)

func start(t *testing.T, script string) (Identity, string) {
	t.Helper()
	dir := t.TempDir()
	record := filepath.Join(dir, "pid")
	id, err := Start(exec.Command("/bin/sh", "-c", script), filepath.Join(dir, "log"), record)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = id.Stop(context.Background(), 0) })
	return id, record
}

// waitFor returns when the script has written its first line.
func waitFor(t *testing.T, log string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if b, _ := os.ReadFile(log); len(b) > 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nothing in %s after 10 s", log)
		}
	}
}

func TestStartRecordStop(t *testing.T) {
	id, record := start(t, "echo hello; exec sleep 60")
	waitFor(t, filepath.Join(filepath.Dir(record), "log"))
	got, ok := Running(record)
	if !ok || got.PID != id.PID {
		t.Fatalf("Running = %v, %v; want pid %d", got, ok, id.PID)
	}
	if killed, err := id.Stop(t.Context(), 5*time.Second); err != nil || killed {
		t.Fatalf("Stop = killed %v, %v", killed, err)
	}
	if _, ok := Running(record); ok {
		t.Error("still said to run after Stop")
	}
	if _, err := id.Stop(t.Context(), time.Second); err != nil {
		t.Errorf("second Stop: %v", err)
	}
	log, err := os.ReadFile(filepath.Join(filepath.Dir(record), "log"))
	if err != nil || string(log) != "hello\n" {
		t.Errorf("log = %q, %v", log, err)
	}
}

func TestStopKillsWhatIgnoresSIGTERM(t *testing.T) {
	id, record := start(t, "trap '' TERM; echo set; while :; do sleep 0.1; done")
	waitFor(t, filepath.Join(filepath.Dir(record), "log"))
	killed, err := id.Stop(t.Context(), 200*time.Millisecond)
	if err != nil || !killed {
		t.Fatalf("Stop = killed %v, %v; want true, nil", killed, err)
	}
	if id.Alive() {
		t.Error("alive after SIGKILL")
	}
}

func TestRecycledPIDIsAnotherProcess(t *testing.T) {
	me, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if !me.Alive() {
		t.Error("this process is not alive")
	}
	for name, other := range map[string]Identity{
		"another start": {PID: me.PID, Start: me.Start + 1, BootID: me.BootID},
		"another boot":  {PID: me.PID, Start: me.Start, BootID: "x"},
	} {
		if other.Alive() {
			t.Errorf("%s: taken for this process", name)
		}
		if _, err := other.Stop(t.Context(), 0); err != nil { // must not end the test
			t.Errorf("%s: Stop: %v", name, err)
		}
	}
}

func TestIdentifyNobody(t *testing.T) {
	if _, err := Identify(1 << 29); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("err = %v, want fs.ErrNotExist", err)
	}
}

func TestWaitEndsWithContext(t *testing.T) {
	id, _ := start(t, "exec sleep 60")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := id.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("err = %v, want DeadlineExceeded", err)
	}
}

// TestSettle: what is being killed does not run, and is waited for until it has
// nothing left; what runs is not.
func TestSettle(t *testing.T) {
	if err := Settle(t.Context(), filepath.Join(t.TempDir(), "record")); err != nil {
		t.Errorf("nobody: %v", err)
	}
	id, record := start(t, "sleep 60")
	if err := Settle(t.Context(), record); err != nil || !id.Alive() {
		t.Errorf("one that runs: alive %v, %v", id.Alive(), err)
	}
	if err := syscall.Kill(id.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if id.Alive() {
		t.Error("one that was killed counts as alive")
	}
	if err := Settle(t.Context(), record); err != nil {
		t.Fatal(err)
	}
	if p, err := procstate.Of(id.PID); err == nil && p.State != procstate.Ended {
		t.Errorf("after the wait it is there, in state %d", p.State)
	}
}
