package qemu

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/openatoll/atoll/vmpod"
)

// TestEndScratches: of what bears a scratch's name only that is left alone which
// the record of a pod has taken over.
func TestEndScratches(t *testing.T) {
	d := bareDriver(t)
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what, name string
		start      func(uint64) uint64 // what a record says of its own; nil: there is none
		stays      bool
	}{
		{"an earlier driver's", "warm~" + d.instance(), nil, false},
		{"a pod's", "warm~" + d.instance(), func(own uint64) uint64 { return own }, true},
		{"one whose pid a pod's had", "warm~" + d.instance(), func(own uint64) uint64 { return own - 1 }, false},
		{"another driver's", "warm~01234567", nil, true},
	} {
		cmd := exec.Command("/bin/sh", "-c", "echo; read line", "-name", vmName(vmpod.ID{PodUID: c.name}))
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 1)); err != nil { // it has its name
			t.Fatal(err)
		}
		dir := vmDir(filepath.Join(d.cfg.StateDir, "pod_0"))
		if c.start != nil {
			own, _, err := procStat(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(string(dir), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := dir.write(processFile, process{PID: cmd.Process.Pid, Start: c.start(own), BootID: boot}); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.endScratches(); err != nil {
			t.Error(err)
		}
		in.Close() // it ends, if it has not been killed
		if _ = cmd.Wait(); cmd.ProcessState.Exited() != c.stays {
			t.Errorf("%s: %v, want it to stay: %t", c.what, cmd.ProcessState, c.stays)
		}
		os.RemoveAll(string(dir))
	}
}
