package qemu

import (
	"context"
	"fmt"
	"os"
	"os/exec"

	"github.com/containerd/errdefs"
)

// Ready implements vmpod.Checker: what a launch needs is still there. It is also
// when a change of the guest is seen, if nobody launches anything.
func (d *Driver) Ready(context.Context) error {
	if _, err := exec.LookPath(d.cfg.Binary); err != nil {
		return fmt.Errorf("QEMU cannot be run (%v): install it or set its path: %w", err, errdefs.ErrFailedPrecondition)
	}
	for _, file := range []struct{ what, path string }{{"kernel", d.cfg.Guest.Kernel}, {"initramfs", d.cfg.Guest.Initrd}} {
		if fi, err := os.Stat(file.path); err != nil || !fi.Mode().IsRegular() {
			return fmt.Errorf("the guest's %s is not at %s: lay the guest image out again (make guest): %w", file.what, file.path, errdefs.ErrFailedPrecondition)
		}
	}
	d.templates.look()
	if d.accel != AcceleratorKVM {
		return nil
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("KVM was usable and is not any more (%v): load its module again: %w", err, errdefs.ErrFailedPrecondition)
	}
	return f.Close()
}
