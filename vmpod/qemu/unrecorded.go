package qemu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

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
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	named := func(file string) bool {
		args, err := os.ReadFile(file)
		return err == nil && bytes.Contains(args, []byte("\x00-name\x00"+name+"\x00"))
	}
	for _, file := range files {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil || !named(file) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			continue
		}
		p := os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", pid))
		if !named(file) { // the pid is another's now
			p.Close()
			continue
		}
		found = append(found, p)
	}
	return found
}
