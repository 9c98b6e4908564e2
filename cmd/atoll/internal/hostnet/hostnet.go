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
	if err := os.Remove(Path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace %s: %w", name, err)
	}
	return nil
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
