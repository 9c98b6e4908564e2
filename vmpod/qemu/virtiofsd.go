package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// virtiofsdPaths are where distributions put the server of shares: the one
// written in Rust first, then the one that came with QEMU before 8.0.
var virtiofsdPaths = []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd"}

// A virtiofsd is a server program, found by findVirtiofsd.
type virtiofsd struct {
	path string
	rust bool // the options are that one's
}

// FindVirtiofsd returns the path of the program that serves host directories
// to pod VMs, or ErrNotFound with the cure.
func FindVirtiofsd(ctx context.Context) (string, error) {
	v, err := findVirtiofsd(ctx)
	return v.path, err
}

func findVirtiofsd(ctx context.Context) (virtiofsd, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var tried []string
	for _, path := range virtiofsdPaths {
		help, err := exec.CommandContext(ctx, path, "--help").CombinedOutput()
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		switch text := string(help); {
		case strings.Contains(text, "--shared-dir"):
			return virtiofsd{path, true}, nil
		case strings.Contains(text, "--fd=") && strings.Contains(text, "announce_submounts"):
			return virtiofsd{path, false}, nil
		default:
			tried = append(tried, fmt.Sprintf("%s does not have the options that are needed (%v)", path, err))
		}
	}
	return virtiofsd{}, fmt.Errorf("no virtiofsd to share host directories with (%s): apt-get install virtiofsd, on Debian 12 qemu-system-common: %w",
		strings.Join(append(virtiofsdPaths, tried...), ", "), errdefs.ErrNotFound)
}

// args are the server's arguments for the directory that is its root; its
// socket is descriptor 3. Both servers unshare all namespaces but the user's,
// change their root, keep the capabilities to act as any user on files, and
// filter their system calls. The one of them that pods have no use for, making
// device nodes, is dropped.
func (v virtiofsd) args(source string, files uint64) []string {
	limit := "--rlimit-nofile=" + strconv.FormatUint(files, 10)
	if v.rust {
		return []string{"--fd=3", "--shared-dir=" + source, "--sandbox=namespace", "--cache=auto", "--announce-submounts",
			"--modcaps=-mknod", "--log-level=error", limit}
	}
	return []string{"--fd=3", "-f", "-o", "source=" + source, "-o", "sandbox=namespace", "-o", "cache=auto", "-o", "announce_submounts",
		"-o", "modcaps=-mknod", "-o", "log_level=err", limit}
}

// maxServerFiles is virtiofsd's own wish: it holds one descriptor for every
// inode that a guest remembers.
const maxServerFiles = 1_000_000

// A serverPlan says what is served and where.
type serverPlan struct {
	share   vmpod.Share
	allowed string // the operator's directory
	place   string // a directory of ours, empty
	log     string
}

// startServer runs a server of the share in a mount namespace that is made for
// it. listener has the one connection that it will serve.
func startServer(v virtiofsd, plan serverPlan, listener *os.File) (process, error) {
	var nofile unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &nofile); err != nil {
		return process{}, os.NewSyscallError("getrlimit", err)
	}
	log, err := os.OpenFile(plan.log, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return process{}, err
	}
	defer log.Close()
	cmd := exec.Command(v.path, v.args(plan.place, min(nofile.Max, maxServerFiles))...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LANG=C"}
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{listener}
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	boot, err := bootID()
	if err != nil {
		return process{}, err
	}
	err = inMountNamespace(plan.share.Follow, func() error {
		if err := plan.mount(); err != nil {
			return err
		}
		return cmd.Start()
	})
	if err != nil {
		return process{}, fmt.Errorf("share host directory %s: %w", plan.share.Path, err)
	}
	p := process{PID: cmd.Process.Pid, BootID: boot, StartedAt: time.Now()}
	p.Start, _, err = procStat(p.PID) // not yet reaped, so the pid is its own
	if err != nil {
		_ = cmd.Process.Kill()
	}
	go func() { _ = cmd.Wait() }()
	return p, err
}

// inMountNamespace runs f on a thread in a copy of our mount namespace, which
// lasts as long as a process that f starts. Mounts there never come back to
// ours; ours go there later only with follow.
func inMountNamespace(follow bool, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this
		propagation := uintptr(unix.MS_PRIVATE)
		if follow {
			propagation = unix.MS_SLAVE
		}
		err := os.NewSyscallError("unshare", unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS))
		if err == nil {
			err = os.NewSyscallError("mount", unix.Mount("", "/", "", unix.MS_REC|propagation, ""))
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// mount puts what is shared in its place, in this thread's mount namespace. No
// name on the way to it may be a symbolic link: between the moment when the
// path was checked and this one, a pod may have made one in a directory that it
// shares.
func (p serverPlan) mount() error {
	top, err := unix.Openat2(unix.AT_FDCWD, p.allowed, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC | unix.O_DIRECTORY, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return &os.PathError{Op: "open", Path: p.allowed, Err: err}
	}
	defer unix.Close(top)
	rel, err := filepath.Rel(p.allowed, p.share.Path)
	if err != nil {
		return err
	}
	fd, err := unix.Openat2(top, rel, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS})
	if errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("%s has become a symbolic link: %w", p.share.Path, errdefs.ErrPermissionDenied)
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: p.share.Path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	target := p.place
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
	case unix.S_IFREG:
		// The server wants a directory: this one has the file alone.
		target = filepath.Join(p.place, filepath.Base(p.share.Path))
		if err := os.WriteFile(target, nil, 0o600); err != nil {
			return err
		}
		if err := unix.Mount(p.place, p.place, "", unix.MS_BIND, ""); err != nil {
			return os.NewSyscallError("mount", err)
		}
		if err := unix.MountSetattr(unix.AT_FDCWD, p.place, 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return os.NewSyscallError("mount_setattr", err)
		}
	default:
		return fmt.Errorf("%s is neither a directory nor a file: %w", p.share.Path, errdefs.ErrInvalidArgument)
	}
	tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH|unix.AT_RECURSIVE)
	if err != nil {
		return os.NewSyscallError("open_tree", err)
	}
	defer unix.Close(tree)
	if p.share.ReadOnly {
		flags := uint(unix.AT_EMPTY_PATH)
		if p.share.RecursiveReadOnly {
			flags |= unix.AT_RECURSIVE
		}
		if err := unix.MountSetattr(tree, "", flags, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return os.NewSyscallError("mount_setattr", err)
		}
	}
	return os.NewSyscallError("move_mount", unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
}
