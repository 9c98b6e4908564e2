package podinit

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// A userNamespace is the pod's own, which all its containers are in; the
// pause process keeps it. Files of the pod belong to ids of its range: an
// image is mounted with its ids shifted, and what the guest makes itself is
// given to shifted owners, as everything in this VM is the pod's alone.
type userNamespace struct {
	path  string
	first int // the guest's id of the containers' 0
}

// shift is what to add to an id of a container, 0 without a namespace.
func (u *userNamespace) shift() int {
	if u == nil {
		return 0
	}
	return u.first
}

// idLimit is the number of ids, of which the last means none.
const idLimit = 1<<32 - 1

// idMaps makes a process' maps.
func idMaps(m *agentapi.IDMap) ([]syscall.SysProcIDMap, error) {
	if m.Length == 0 || uint64(m.First)+uint64(m.Length) > idLimit {
		return nil, fmt.Errorf("user namespace of ids %d to %d+%d: want at least one, all below %d: %w", m.First, m.First, m.Length, idLimit, errdefs.ErrInvalidArgument)
	}
	return []syscall.SysProcIDMap{{ContainerID: 0, HostID: int(m.First), Size: int(m.Length)}}, nil
}

// admitUserNamespace lifts what the kernel keeps from root of a namespace
// that does not own the VM's network and limits: ports below 1024, and more
// than the few open files that PID 1 begins with.
func admitUserNamespace() error {
	if err := setSysctls(map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"}); err != nil {
		return err
	}
	limit := syscall.Rlimit{Cur: openFiles, Max: openFiles}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raise the limit of open files: %w", err)
	}
	return nil
}

// openFiles is the most that a container may ask for: nr_open's default.
const openFiles = 1 << 20

// mountShifted mounts the directory source at target with its ids shifted
// into the namespace. The file system must support it: EROFS does.
func (u *userNamespace) mountShifted(source, target string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("copy the mount of %s: %w", filepath.Base(source), err)
	}
	defer unix.Close(tree)
	ns, err := os.Open(u.path)
	if err != nil {
		return err
	}
	defer ns.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("shift the ids of %s: %w", filepath.Base(source), err)
	}
	if err := os.MkdirAll(target, 0o711); err != nil {
		return err
	}
	return unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
}
