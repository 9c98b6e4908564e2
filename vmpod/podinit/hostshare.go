package podinit

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// shareModules has the modules of shares, for kernels that have them as such.
const shareModules = "/modules/virtiofs"

// mountShare mounts a directory of the host, waiting for the device by which
// the host shares it.
func mountShare(ctx context.Context, tag, dir string) error {
	if err := checkID("share", tag); err != nil {
		return err
	}
	loaded := false
	return waitDevice(ctx, "share "+tag, deviceTimeout, func() (bool, error) {
		err := unix.Mount(tag, dir, "virtiofs", unix.MS_NODEV, "")
		if errors.Is(err, unix.ENODEV) && !loaded {
			loaded = true
			channel, rest := modulesIn(shareModules)
			loadModules(append(channel, rest...))
			err = unix.Mount(tag, dir, "virtiofs", unix.MS_NODEV, "")
		}
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINVAL): // no such tag yet
			return false, nil
		case errors.Is(err, unix.ENODEV):
			return false, fmt.Errorf("the guest's kernel cannot mount directories of the host (virtiofs): %w", errdefs.ErrNotImplemented)
		}
		return false, fmt.Errorf("mount share %s: %w", tag, err)
	})
}
