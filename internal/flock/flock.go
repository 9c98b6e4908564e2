// Package flock has one process at a time work on something.
package flock

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/procstate"
)

// patience is how long Take waits for a holder that has been killed: until its
// last thread is over, on a busy host, or until a child that it started has
// passed from fork to exec, for so long has what its parent had.
const patience = 30 * time.Second

// A HeldError is the refusal to take a lock that another process has.
type HeldError struct {
	Path string
	PID  int // 0 if it is not known
}

func (e *HeldError) Error() string {
	return fmt.Sprintf("%s is locked by process %d", e.Path, e.PID)
}

// Take locks the file at path, which is made if need be and then names this
// process, until it is closed or the process has ended. A process that runs is
// not waited for (*HeldError); one that is being killed is, until it has let go
// of all that it had, its ports too.
func Take(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := take(f, time.Now().Add(patience)); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func take(f *os.File, deadline time.Time) error {
	var before int
	for ; ; time.Sleep(10 * time.Millisecond) {
		before = holder(f)
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return &fs.PathError{Op: "lock", Path: f.Name(), Err: err}
		}
		p, err := procstate.Of(before)
		if err == nil && p.State == procstate.Running || time.Now().After(deadline) {
			return &HeldError{f.Name(), before}
		}
	}
	for ; before != os.Getpid() && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if p, err := procstate.Of(before); err != nil || p.State != procstate.Ending {
			break
		}
	}
	err := f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return err
}

// holder is who last took the lock; 0 if that cannot be read.
func holder(f *os.File) int {
	b := make([]byte, 20)
	n, _ := f.ReadAt(b, 0)
	pid, _ := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	return pid
}
