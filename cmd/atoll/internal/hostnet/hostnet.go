// Package hostnet makes and removes the network namespace of an isolated
// cluster, and runs code inside of it.
package hostnet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// dir is where iproute2 looks for named network namespaces.
const dir = "/run/netns"

// Path is the file that holds a named network namespace open.
func Path(name string) string { return filepath.Join(dir, name) }

// Ensure makes the named network namespace with its loopback up, unless it
// is there. It reports whether it made it.
func Ensure(name string) (made bool, err error) {
	if ok, err := Exists(name); err != nil || ok {
		return false, err
	}
	// A file without a namespace on it is left by a crash between the two.
	if err := os.Remove(Path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("network namespace %s: remove the stale %s: %w", name, Path(name), err)
	}
	if err := shareDirectory(filepath.Dir(Path(name))); err != nil {
		return false, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	err = onThread(func() error {
		ns, err := netns.NewNamed(name) // enters it
		if err != nil {
			return err
		}
		defer ns.Close()
		return loopbackUp()
	})
	if err != nil {
		return false, errors.Join(fmt.Errorf("make network namespace %s: %w", name, err), Remove(name))
	}
	return true, nil
}

// Exists reports whether a namespace of that name is mounted.
func Exists(name string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(Path(name), &st)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("network namespace %s: %w", name, err)
	}
	return st.Type == unix.NSFS_MAGIC, nil
}

// Remove unmounts the namespace; the kernel takes back the links, routes and
// tables in it once the last process has left. Removing what is gone
// succeeds.
func Remove(name string) error {
	err := unix.Unmount(Path(name), unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount network namespace %s: %w", name, err)
	}
	err = os.Remove(Path(name))
	if errors.Is(err, unix.EBUSY) {
		err = removeBeneath(Path(name))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", name, err)
	}
	return nil
}

// shareDirectory makes the directory of network namespaces a shared mount on
// itself, as ip-netns(8) and CNI do when they first need it. Whoever did that
// later would hide the namespaces that are there. It stays, as theirs does:
// others may have come to use it.
func shareDirectory(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	share := func() error { return unix.Mount("", dir, "none", unix.MS_SHARED|unix.MS_REC, "") }
	err := share()
	if errors.Is(err, unix.EINVAL) { // not a mount yet
		if err = unix.Mount(dir, dir, "none", unix.MS_BIND|unix.MS_REC, ""); err == nil {
			err = share()
		}
	}
	if err != nil {
		return fmt.Errorf("make %s a shared mount: %w", dir, err)
	}
	return nil
}

// removeBeneath removes a file on which something is mounted out of sight,
// below what others have mounted on its directory since. The kernel refuses that
// to those who have the mount, and takes the mount away when anyone else does it
// (Linux 3.18): so it is done in a mount namespace that takes both off first.
func removeBeneath(path string) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return err
		}
		for {
			for unix.Unmount(path, unix.MNT_DETACH) == nil {
			}
			err := os.Remove(path)
			if !errors.Is(err, unix.EBUSY) {
				return err
			}
			if err := unix.Unmount(filepath.Dir(path), unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount what hides it: %w", err)
			}
		}
	})
}

func loopbackUp() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	return h.LinkSetUp(lo)
}

// Do runs f on a thread inside the network namespace at path; an empty path
// is the caller's own. What f opens (sockets, children) stays there; f must
// not start goroutines that open any.
func Do(path string, f func() error) error {
	if path == "" {
		return f()
	}
	return onThread(func() error {
		if err := enter(path); err != nil {
			return err
		}
		return f()
	})
}

// Scratch runs f inside a new, empty network namespace that is gone when it
// returns.
func Scratch(f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		if err := loopbackUp(); err != nil {
			return err
		}
		return f()
	})
}

// Enter moves the calling thread, which must be locked, into the namespace at
// path, for an exec that follows.
func Enter(path string) error {
	if path == "" {
		return nil
	}
	return enter(path)
}

func enter(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}

// onThread runs f on a thread of its own, which ends with it: its network
// namespace must never be met by another goroutine.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread
		done <- f()
	}()
	return <-done
}

// A DialFunc is net.Dialer's DialContext.
type DialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

// Dialer returns a function that connects from inside the namespace at path.
// Addresses must be literal: names would be resolved outside.
func Dialer(path string) DialFunc {
	var d net.Dialer
	if path == "" {
		return d.DialContext
	}
	return func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		err = Do(path, func() error {
			conn, err = d.DialContext(ctx, network, addr)
			return err
		})
		return conn, err
	}
}
