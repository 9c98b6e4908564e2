// Package procstate tells a process that runs from one that is being killed and
// from one that is gone.
package procstate

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// A State is how far a process is.
type State int

// States of a process.
const (
	Running State = iota
	// Ending: it will execute nothing more of its own, but still has files, locks
	// and ports, for seconds on a busy host.
	Ending
	// Ended: it has nothing any more, and waits to be reaped.
	Ended
)

// flagExiting is PF_EXITING of linux/sched.h.
const flagExiting = 0x4

// A Process is what /proc says.
type Process struct {
	State State
	Start uint64 // clock ticks after boot; with the pid it names a process of a boot
}

// Of reads the state of a process; fs.ErrNotExist if there is none.
func Of(pid int) (Process, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return Process{}, gone(err)
	}
	// The command, in parentheses, may itself contain anything.
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(fields) < 20 {
		return Process{}, fmt.Errorf("/proc/%d/stat has %d fields after the command, want 20 or more", pid, len(fields))
	}
	var p Process
	if p.Start, err = strconv.ParseUint(fields[19], 10, 64); err != nil {
		return Process{}, fmt.Errorf("/proc/%d/stat: start time: %w", pid, err)
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	if err != nil {
		return Process{}, fmt.Errorf("/proc/%d/stat: flags: %w", pid, err)
	}
	switch letter := fields[0][0]; {
	case letter == 'Z' || letter == 'X':
		// The first thread is over, perhaps before the others.
		tasks, err := os.ReadDir(filepath.Join(dir, "task"))
		if err != nil {
			return Process{}, gone(err)
		}
		if p.State = Ended; len(tasks) > 1 {
			p.State = Ending
		}
	case flags&flagExiting != 0:
		p.State = Ending
	default:
		killed, err := killPending(dir)
		if err != nil {
			return Process{}, gone(err)
		}
		if killed {
			p.State = Ending
		}
	}
	return p, nil
}

func gone(err error) error {
	if errors.Is(err, syscall.ESRCH) {
		return fs.ErrNotExist
	}
	return err
}

// killPending tells whether a process has been sent SIGKILL, which the kernel
// hands to each of its threads.
func killPending(dir string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return false, err
	}
	for scan := bufio.NewScanner(bytes.NewReader(b)); scan.Scan(); {
		name, value, _ := strings.Cut(scan.Text(), ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil {
			return false, fmt.Errorf("%s/status: %s: %w", dir, name, err)
		}
		if set&(1<<(syscall.SIGKILL-1)) != 0 {
			return true, nil
		}
	}
	return false, nil
}
