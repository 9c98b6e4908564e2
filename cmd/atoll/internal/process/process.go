// Package process starts, recognises and ends the long-running processes of
// a cluster. A process is recognised by its pid together with its start time
// and the boot it belongs to, so that a recycled pid is never taken for it.
package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/procstate"
)

// An Identity names one process for ever: no other process, not even after
// a reboot, has the same.
type Identity struct {
	PID int `json:"pid"`
	// Start is the start time in clock ticks since boot, field 22 of
	// /proc/PID/stat.
	Start  uint64    `json:"start"`
	BootID string    `json:"bootID"`
	Since  time.Time `json:"since"`
}

// BootID identifies the running boot of this host.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read the boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Identify returns the identity of a running process; fs.ErrNotExist if
// there is no process with that pid.
func Identify(pid int) (Identity, error) {
	p, err := procstate.Of(pid)
	if err != nil {
		return Identity{}, err
	}
	if p.State != procstate.Running {
		return Identity{}, fmt.Errorf("process %d has ended: %w", pid, fs.ErrNotExist)
	}
	boot, err := BootID()
	if err != nil {
		return Identity{}, err
	}
	return Identity{PID: pid, Start: p.Start, BootID: boot, Since: time.Now().UTC()}, nil
}

// Alive reports whether the process still runs. One that is being killed does
// not, although it has files and ports until it has ended.
func (i Identity) Alive() bool { return i.is(procstate.Running) }

// is tells whether the process is there, in one of some states.
func (i Identity) is(states ...procstate.State) bool {
	now, err := procstate.Of(i.PID)
	if err != nil || now.Start != i.Start || !slices.Contains(states, now.State) {
		return false
	}
	boot, err := BootID()
	return err == nil && boot == i.BootID
}

// Save records an identity in a file, atomically.
func (i Identity) Save(file string) error {
	b, err := json.Marshal(i)
	if err != nil {
		return err
	}
	tmp := file + ".new"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// Load reads a recorded identity; fs.ErrNotExist when there is no record.
func Load(file string) (Identity, error) {
	var i Identity
	b, err := os.ReadFile(file)
	if err != nil {
		return i, err
	}
	if err := json.Unmarshal(b, &i); err != nil {
		return i, fmt.Errorf("process record %s: %w", file, err)
	}
	return i, nil
}

// Running returns the process recorded in a file if it still runs.
func Running(file string) (Identity, bool) {
	i, err := Load(file)
	if err != nil || !i.Alive() {
		return Identity{}, false
	}
	return i, true
}

// Start starts cmd in a session of its own, so that it outlives the caller
// and its terminal, with both outputs appended to logFile, and records it.
// The caller sets cmd's Path, Args, Env and ExtraFiles.
func Start(cmd *exec.Cmd, logFile, record string) (Identity, error) {
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return Identity{}, err
	}
	defer log.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return Identity{}, err
	}
	// Reaped here if it ends while the caller lives; else by PID 1.
	defer func() { go func() { _ = cmd.Wait() }() }()
	id, err := Identify(cmd.Process.Pid)
	if err != nil {
		return Identity{}, fmt.Errorf("%s ended at once; see %s: %w", filepath.Base(cmd.Path), logFile, err)
	}
	if err := id.Save(record); err != nil {
		_ = cmd.Process.Kill()
		return Identity{}, err
	}
	return id, nil
}

// Wait returns nil when the process has ended, ctx's error if that comes
// first.
func (i Identity) Wait(ctx context.Context) error {
	fd, err := i.open()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for {
		// A pidfd is readable once the process has ended. The poll's own
		// timeout only bounds how late a cancelled ctx is seen.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 200)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for process %d: %w", i.PID, err)
		}
		if n > 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// killPatience is how long a busy host may take to end what has been killed.
const killPatience = 30 * time.Second

// Settle waits for the process recorded in a file if it is being killed.
func Settle(ctx context.Context, file string) error {
	i, err := Load(file)
	if err != nil || i.Alive() { // Running, too, knows nobody by a record that cannot be read
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, killPatience)
	defer cancel()
	if err := i.Wait(ctx); err != nil {
		return fmt.Errorf("process %d was killed and has not ended: %w", i.PID, err)
	}
	return nil
}

// open returns a pidfd; fs.ErrNotExist if the process has ended.
func (i Identity) open() (int, error) {
	fd, err := unix.PidfdOpen(i.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, fs.ErrNotExist
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", i.PID, err)
	}
	if !i.is(procstate.Running, procstate.Ending) { // the pid was another's by the time it was opened
		unix.Close(fd)
		return -1, fs.ErrNotExist
	}
	return fd, nil
}

// Signal sends a signal; nothing happens if the process has ended.
func (i Identity) Signal(sig syscall.Signal) error {
	fd, err := i.open()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("send %v to process %d: %w", sig, i.PID, err)
	}
	return nil
}

// Stop asks the process to end with SIGTERM, gives it grace, then kills it.
// It returns once the process has ended; stopping what has ended succeeds.
// It reports whether the process had to be killed.
func (i Identity) Stop(ctx context.Context, grace time.Duration) (killed bool, err error) {
	if err := i.Signal(syscall.SIGTERM); err != nil {
		return false, err
	}
	gctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	if err := i.Wait(gctx); err == nil {
		return false, nil
	} else if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
		return false, err
	}
	if err := i.Signal(syscall.SIGKILL); err != nil {
		return true, err
	}
	return true, i.Wait(ctx)
}
