package procstate

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

func TestOf(t *testing.T) {
	me, err := Of(os.Getpid())
	if err != nil || me.State != Running || me.Start == 0 {
		t.Errorf("this process: %+v, %v", me, err)
	}
	// A name that looks like the fields that follow it.
	cmd := exec.Command("sh", "-c", `printf 'a) Z 1' > /proc/$$/comm; echo; read x`)
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
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if p, err := Of(pid); err != nil || p.State != Running || p.Start < me.Start {
		t.Errorf("a child: %+v, %v", p, err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// From here on it never runs again, and ends without being asked once more.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		p, err := Of(pid)
		if err != nil || p.State == Running {
			t.Fatalf("a killed child: %+v, %v", p, err)
		}
		if p.State == Ended {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a killed child does not end")
		}
	}
	_ = cmd.Wait()
	if p, err := Of(pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a child that was reaped: %+v, %v", p, err)
	}
}
