package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// enteredEnv marks a process that has executed itself in the namespace.
const enteredEnv = "ATOLL_SPHERELET_NETNS"

// enterNamespace makes the whole process run in the configured network
// namespace. setns moves one thread and Go has many, so one thread enters and
// executes the program again; the new process has that namespace everywhere.
// (`ip netns exec` would do so too, but hides the mounts of the host.)
// A namespace that is gone is an error only if required.
func enterNamespace(cfg *v1alpha1.SphereletConfiguration, required bool) error {
	if cfg.NetworkNamespace == "" {
		return nil
	}
	path := namespacePath(cfg.NetworkNamespace)
	in, err := sameFile(path, "/proc/self/ns/net")
	if errors.Is(err, fs.ErrNotExist) && !required {
		return nil
	}
	if err != nil {
		return fmt.Errorf("networkNamespace %s: %w: make it (ip netns add), or leave networkNamespace out", cfg.NetworkNamespace, err)
	}
	if in {
		return os.Unsetenv(enteredEnv) // not for the VMs
	}
	if os.Getenv(enteredEnv) != "" {
		return fmt.Errorf("networkNamespace %s: entered it and am not in it: %w", cfg.NetworkNamespace, errdefs.ErrFailedPrecondition)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("networkNamespace %s: %w", cfg.NetworkNamespace, err)
	}
	defer f.Close()
	runtime.LockOSThread() // for good: the next call does not return
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("networkNamespace %s: enter: %w", cfg.NetworkNamespace, err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), enteredEnv+"="+path))
}

// namespacePath is the path of a namespace that is named by path or by name.
func namespacePath(s string) string {
	if strings.Contains(s, "/") {
		return s
	}
	return filepath.Join("/run/netns", s)
}

func sameFile(a, b string) (bool, error) {
	var sa, sb unix.Stat_t
	if err := unix.Stat(a, &sa); err != nil {
		return false, err
	}
	if err := unix.Stat(b, &sb); err != nil {
		return false, err
	}
	return sa.Dev == sb.Dev && sa.Ino == sb.Ino, nil
}
