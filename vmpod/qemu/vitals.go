package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

var (
	errVMMStopped = errors.New("a signal has stopped it")
	errVMPaused   = errors.New("the guest is paused")
)

// describeSilence says why a machine's state is not known.
func describeSilence(pid int, asked error) (reason, message string) {
	switch {
	case errors.Is(asked, errVMMStopped):
		return vmpod.ReasonVMMStopped, fmt.Sprintf("a signal has stopped QEMU (pid %d), and the guest with it: kill -CONT %d lets it go on", pid, pid)
	case errors.Is(asked, errDatastoreFull):
		return vmpod.ReasonHostDiskFull, "the host has no space left for a volume of the pod, whose VM is paused: free some where the volume is, and it goes on"
	case errors.Is(asked, errVMPaused):
		return vmpod.ReasonVMPaused, fmt.Sprintf("somebody has paused the guest on the monitor of QEMU (pid %d), where cont lets it go on", pid)
	}
	return vmpod.ReasonVMMNotResponding, fmt.Sprintf("QEMU (pid %d) runs but its monitor does not answer: %v", pid, asked)
}

// stopped says whether a signal, or a debugger, has stopped the process. One
// that has ended or cannot be read is not stopped.
func stopped(pid int) bool {
	state := threadState("/proc/" + strconv.Itoa(pid) + "/stat")
	return state == 'T' || state == 't'
}

// polls says that the process's first thread waits in ppoll(2), as QEMU's main
// loop does while there is nothing to do. It is false where the kernel does not
// tell (proc(5), /proc/pid/syscall).
func polls(pid int) bool {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/syscall")
	call, _, _ := strings.Cut(string(b), " ")
	return err == nil && call == strconv.Itoa(unix.SYS_PPOLL)
}

// threadState is field 3 of a stat file (see proc(5)), 0 if it cannot be read.
func threadState(file string) byte {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	i := strings.LastIndexByte(string(b), ')')
	if i < 0 || i+2 >= len(b) {
		return 0
	}
	return b[i+2]
}

// Progress implements vmpod.Pacer by the kernel's account of QEMU's threads:
// the second figure of schedstat is the time spent ready to run and waiting
// for a CPU, in nanoseconds (Documentation/scheduler/sched-stats.rst). A kernel
// without CONFIG_SCHED_INFO gives ErrNotImplemented.
func (m *Machine) Progress(context.Context) (vmpod.Progress, error) {
	p := vmpod.Progress{Waited: map[int]time.Duration{}}
	files, _ := filepath.Glob("/proc/" + strconv.Itoa(m.proc.PID) + "/task/*/schedstat")
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		f := strings.Fields(string(b))
		if len(f) < 2 {
			continue
		}
		waited, err := strconv.ParseInt(f[1], 10, 64)
		tid, terr := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil || terr != nil {
			continue
		}
		p.Waited[tid] = time.Duration(waited)
		p.Stuck = p.Stuck || threadState(filepath.Join(filepath.Dir(file), "stat")) == 'D'
	}
	if len(p.Waited) == 0 {
		return p, fmt.Errorf("pod VM %s: the host's kernel does not tell how long QEMU's threads wait: %w", m.id, errdefs.ErrNotImplemented)
	}
	return p, nil
}
