package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// quitUnrecorded ends a QEMU whose pid was not yet written down when its
// driver died: nobody else listens on its monitor. It returns when the process
// is gone, not merely its monitor, which closes earlier.
func (d *Driver) quitUnrecorded(id vmpod.ID) {
	ctx, cancel := context.WithTimeout(d.life, d.cfg.Deadline)
	defer cancel()
	// The greeting comes after the exec, so that the process has its name.
	q, err := dialQMP(ctx, d.socketPaths(id)[qmpSocket], nil)
	procs := openNamed(vmName(id))
	if err == nil {
		defer q.close()
		_ = q.run(ctx, "quit", nil, nil) // a QEMU that quits may not answer
		select {
		case <-q.done:
		case <-ctx.Done():
		}
	} // else there is none, or one that a signal has stopped
	for _, p := range procs {
		stop := context.AfterFunc(ctx, func() { _ = killPidfd(p) })
		_ = waitPidfd(p)
		stop()
		p.Close()
	}
}

// openNamed returns pidfds of the processes that were started with this name.
func openNamed(name string) []*os.File {
	var found []*os.File
	for _, p := range openVMs(func(n string, _ int) bool { return n == name }) {
		found = append(found, p.pidfd)
	}
	return found
}

// A namedVM is a process that was started with a name.
type namedVM struct {
	name  string
	pidfd *os.File
}

// openVMs returns the processes whose names, as -name says them, the caller
// wants; it asks with the process's id. Another process is never taken for one.
func openVMs(want func(name string, pid int) bool) []namedVM {
	var found []namedVM
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		name, ok := nameOf(file)
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if !ok || err != nil || !want(name, pid) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			continue // it has ended
		}
		p := os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", pid))
		if again, ok := nameOf(file); !ok || again != name { // the pid is another's now
			p.Close()
			continue
		}
		found = append(found, namedVM{name, p})
	}
	return found
}

// nameOf reads a VM's name off a command line.
func nameOf(cmdline string) (string, bool) {
	b, err := os.ReadFile(cmdline)
	if err != nil {
		return "", false
	}
	_, rest, _ := strings.Cut(string(b), "\x00-name\x00")
	name, _, ok := strings.Cut(rest, "\x00")
	return name, ok
}
