package flock

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

const pathEnv = "FLOCK_TEST_PATH"

// TestMain is also the process that has the lock: with an argument, it leaves a
// child that keeps it for a while.
func TestMain(m *testing.M) {
	path := os.Getenv(pathEnv)
	if path == "" {
		os.Exit(m.Run())
	}
	f, err := Take(path)
	if err != nil {
		os.Stdout.WriteString(err.Error() + "\n")
		os.Exit(1)
	}
	heir := exec.Command("sleep", "0.5")
	heir.ExtraFiles = []*os.File{f}
	if err := heir.Start(); err != nil {
		panic(err)
	}
	os.Stdout.WriteString("taken\n")
	_, _ = os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}

func TestTake(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), pathEnv+"="+path)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "taken\n" {
		t.Fatalf("the other process: %q, %v", line, err)
	}
	var held *HeldError
	if _, err := Take(path); !errors.As(err, &held) || held.PID != cmd.Process.Pid {
		t.Errorf("while it runs: %v, want one that names process %d", err, cmd.Process.Pid)
	}
	// Killed, and not even reaped; its child has the lock a little longer.
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	f, err := Take(path)
	if err != nil {
		t.Fatalf("while it is being killed: %v", err)
	}
	defer f.Close()
	if pid := holder(f); pid != os.Getpid() {
		t.Errorf("the lock names process %d, not this one", pid)
	}
	if _, err := Take(path); !errors.As(err, &held) || held.PID != os.Getpid() {
		t.Errorf("taken twice: %v", err)
	}
	_ = cmd.Wait()
}
