package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// xfsBytes is the size of that XFS, which is as small as what is in it.
const xfsBytes = 32 << 30

// mountsEnv says that this process is in the mount namespace that it made.
const mountsEnv = "ATOLL_E2E_STORAGE_MOUNTS"

// ownMounts starts this program anew in a mount namespace of its own: what is
// mounted there goes with the last process of the run, however it ends.
func ownMounts() error {
	if os.Getenv(mountsEnv) != "" {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // never unlocked: the thread that executes is the one that unshared
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare the mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make all mounts private: %w", err)
	}
	return unix.Exec(self, os.Args, append(os.Environ(), mountsEnv+"=1"))
}

// mountXFS mounts a new XFS on dir. The file it is in lies in build, until
// unmount.
func mountXFS(ctx context.Context, dir, build string) (unmount func() error, err error) {
	image := filepath.Join(build, "xfs.img")
	remove := func() error { return os.Remove(image) }
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(image, xfsBytes); err != nil {
		return nil, errors.Join(err, remove())
	}
	for _, argv := range [][]string{{"mkfs.xfs", "-q", "-f", image}, {"mount", "-o", "loop", image, dir}} {
		if said, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput(); err != nil {
			return nil, errors.Join(fmt.Errorf("%v: %w: %s", argv, err, said), remove())
		}
	}
	return func() error { return errors.Join(unix.Unmount(dir, unix.MNT_DETACH), remove()) }, nil
}
