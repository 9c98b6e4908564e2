package qemu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A process is one QEMU, named so that no other process is ever taken for it:
// a pid alone is reused.
type process struct {
	PID int `json:"pid"`
	// Start is field 22 of /proc/PID/stat: clock ticks from the host's boot.
	Start uint64 `json:"start"`
	// BootID is the host's /proc/sys/kernel/random/boot_id.
	BootID    string    `json:"bootID"`
	StartedAt time.Time `json:"startedAt"`
	// Accelerator is what it was started with.
	Accelerator Accelerator `json:"accelerator"`
	// SharedMemory says that servers of shares can reach the guest's RAM.
	SharedMemory bool `json:"sharedMemory,omitempty"`
	// MaxMemory is what its RAM can grow to, in bytes, which QEMU does not
	// tell; 0 in records of versions whose VMs do not grow.
	MaxMemory int64 `json:"maxMemory,omitempty"`
	// Template names the template that it is a clone of, empty if it booted.
	Template string `json:"template,omitempty"`
	// Overhead is what its cgroup allows it beside its RAM, in bytes, if that
	// is not what the driver is configured with.
	Overhead int64 `json:"overhead,omitempty"`
	// UID is whom it runs as.
	UID uint32 `json:"uid"`
	// Cgroups are the directories made for it, "" if there are none.
	Cgroups []string `json:"cgroups,omitempty"`
}

// recorded are the processes that are some pod's, as far as their records can
// be read.
func (d *Driver) recorded() ([]process, error) {
	entries, err := os.ReadDir(d.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	var all []process
	for _, e := range entries {
		var p process
		if ok, err := vmDir(filepath.Join(d.cfg.StateDir, e.Name())).read(processFile, &p); ok && err == nil {
			all = append(all, p)
		}
	}
	return all, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// procStat returns a process's start time and the CPU time used by it, in
// nanoseconds (fields 14 and 15, in ticks of USER_HZ = 100).
func procStat(pid int) (start, cpu uint64, err error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, err
	}
	_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')'):]), " ")
	f := strings.Fields(rest) // f[0] is field 3
	if !ok || len(f) < 20 {
		return 0, 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	start, err = strconv.ParseUint(f[19], 10, 64)
	user, err1 := strconv.ParseUint(f[11], 10, 64)
	system, err2 := strconv.ParseUint(f[12], 10, 64)
	return start, (user + system) * 10_000_000, errors.Join(err, err1, err2)
}

// errGone means that the process has ended.
var errGone = errors.New("the process has ended")

// open returns a descriptor that stands for exactly this process (see
// pidfd_open(2)), or errGone.
func (p process) open() (*os.File, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if boot != p.BootID || p.PID <= 0 {
		return nil, errGone
	}
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, errGone
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	f := os.NewFile(uintptr(fd), fmt.Sprintf("pidfd:%d", p.PID))
	// Only now, with the process held, does its start time say who it is.
	// (A dead one that nobody has reaped yet is told by waitPidfd.)
	start, _, err := procStat(p.PID)
	if err != nil || start != p.Start {
		f.Close()
		return nil, errGone
	}
	return f, nil
}

// waitPidfd returns when the process has ended. It costs no thread: the
// runtime's poller watches the descriptor.
func waitPidfd(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n > 0
	})
}

// kill ends the process at once.
func killPidfd(f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var kerr error
	if err := rc.Control(func(fd uintptr) { kerr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) }); err != nil {
		return err
	}
	if errors.Is(kerr, unix.ESRCH) {
		return nil
	}
	return os.NewSyscallError("pidfd_send_signal", kerr)
}

// A child is a QEMU that this very process started, so that its exit status
// is ours to read.
type child struct {
	ended  chan struct{}
	status syscall.WaitStatus // after ended
}

// qemuEnv is QEMU's environment. One heap for all of its threads, without GLib's
// caches in front of it (newer ones have none), is 2 MiB less for a small VM
// whose CPU's thread keeps TCG's books; under KVM that thread allocates nothing.
var qemuEnv = []string{"PATH=/usr/bin:/bin", "LANG=C", "MALLOC_ARENA_MAX=1", "G_SLICE=always-malloc"}

// startQEMU runs QEMU in a session of its own, in from's network namespace,
// without our standard streams and with no descriptor but files (the first becomes 3).
// A mortal one ends with this process.
func startQEMU(cfg Config, from *nowhere, args []string, files []*os.File, groups []uint32, stderr *os.File, mortal bool) (process, *child, error) {
	cmd := exec.Command(cfg.Binary, args...)
	cmd.Env = qemuEnv
	cmd.Dir = "/"
	cmd.ExtraFiles = files
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if cfg.UID != 0 || cfg.GID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: cfg.UID, Gid: cfg.GID, Groups: groups}
	}
	if mortal { // from's thread lasts as long as the driver
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	boot, err := bootID()
	if err != nil {
		return process{}, nil, err
	}
	if err := from.do(cmd.Start); err != nil {
		return process{}, nil, fmt.Errorf("start %s: %w", cfg.Binary, err)
	}
	p := process{PID: cmd.Process.Pid, BootID: boot, StartedAt: time.Now(), UID: cfg.UID}
	c := &child{ended: make(chan struct{})}
	// Not yet reaped, so the pid is still its own even if it has ended.
	p.Start, _, err = procStat(p.PID)
	go func() {
		defer close(c.ended)
		_ = cmd.Wait()
		if cmd.ProcessState != nil {
			c.status, _ = cmd.ProcessState.Sys().(syscall.WaitStatus)
		}
	}()
	if err != nil {
		_ = cmd.Process.Kill()
		<-c.ended
		return process{}, nil, err
	}
	return p, c, nil
}
