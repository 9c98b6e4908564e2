package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/internal/holes"
	"github.com/openatoll/atoll/storage"
)

// A LiveCopier copies volumes that VMs of this host write to, where the file
// system shares no blocks: the VM's hypervisor alone can.
type LiveCopier interface {
	// CopyDisk has to become what the disk diskID of a VM (storage.Holder.VM) has
	// in its own file at one instant after the call: of a raw or luks volume to is
	// empty, of a qcow2 one a qcow2 file of its size without content. Progress is
	// called when that instant is over and about each second, with the bytes that
	// are copied and those that are to be. When it returns nothing is written to
	// to any more; after an error nothing of it counts. ErrNotFound: there is no
	// such VM, or it has no such disk; ErrUnavailable: it has ended, or does not
	// answer; ErrResourceExhausted: there was no room.
	CopyDisk(ctx context.Context, vm, diskID string, to *os.File, progress func(done, total int64)) error
}

// A usage is who has the file of a volume open.
type usage struct {
	// lease is the holder's, nil without any.
	lease *lease
	// open: a QEMU has it open.
	open bool
}

// usageOf looks who has a volume's file open.
func (x *Disks) usageOf(root *os.Root, r *record) (u usage, err error) {
	if u.lease, _, err = x.holding(root, r.ID); err != nil {
		return u, err
	}
	u.open, err = opened(root, r.Disk.path())
	return u, err
}

// written: a VM may write to the file at any time.
func (u usage) written() bool {
	if u.lease != nil {
		return !u.lease.ReadOnly
	}
	return u.open
}

// copyLive has the VM that writes to a volume copy it to the file to. The caller
// has the locks of both.
func (x *Disks) copyLive(ctx context.Context, d *datastore, root *os.Root, to diskFile, from *record, u usage, a *act) error {
	switch {
	case u.lease == nil:
		return fmt.Errorf("a QEMU writes to it that no lease speaks of, and the file system of datastore %s cannot share blocks (XFS and btrfs can): end that VM: %w", d.Name, errdefs.ErrFailedPrecondition)
	case u.lease.Holder.Host != x.cfg.Host:
		return &storage.HeldElsewhereError{Holder: u.lease.Holder, Datastore: d.Name}
	case x.cfg.Live == nil:
		return fmt.Errorf("a VM writes to it, and the file system of datastore %s cannot share blocks (XFS and btrfs can): detach the volume first: %w", d.Name, errdefs.ErrFailedPrecondition)
	}
	if err := roomForCopy(root, from); err != nil {
		return err
	}
	dst, err := root.OpenFile(to.path(), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	copying, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err = x.cfg.Live.CopyDisk(copying, u.lease.Holder.VM, storage.DiskID(from.ID), dst, func(done, total int64) {
		a.progress(done, total)
		// QEMU would have the VM wait when a copy of what it overwrites finds no
		// room: before that the copy gives up.
		if c, err := space(root); err == nil && c.Available == 0 {
			cancel(fmt.Errorf("the datastore is full: free space there: %w: %w", syscall.ENOSPC, errdefs.ErrResourceExhausted))
		}
	})
	failpoint.Hit(failpoint.VolumeLiveCopied)
	switch {
	case err == nil:
		err = dst.Sync()
	case ctx.Err() == nil && copying.Err() != nil:
		err = context.Cause(copying)
	case errdefs.IsResourceExhausted(err):
		err = fmt.Errorf("the datastore is full: free space there: %w", err)
	case errdefs.IsNotFound(err): // it would mean the volume
		err = fmt.Errorf("%s, which has it, is not there to copy it: %v: detach the volume first: %w", u.lease.Holder, err, errdefs.ErrFailedPrecondition)
	case errdefs.IsUnavailable(err):
		err = fmt.Errorf("%s was to copy it: %w: it is begun again", u.lease.Holder, err)
	}
	return errors.Join(err, dst.Close())
}

// roomForCopy refuses what would fill the datastore under the VMs on it.
func roomForCopy(root *os.Root, from *record) error {
	src, err := root.OpenFile(from.Disk.path(), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return err
	}
	want := int64(0)
	err = holes.Data(src, st.Size(), func(start, end int64) error {
		want += end - start
		return nil
	})
	if err != nil {
		return err
	}
	c, err := space(root)
	if err == nil && want > c.Available {
		err = fmt.Errorf("a copy takes up to %d bytes, and %d are free on the datastore: free space there: %w", want, c.Available, errdefs.ErrResourceExhausted)
	}
	return err
}

// copyTop copies the topmost file of a qcow2 volume that a VM writes to; those
// below, which nobody writes to, are r's as well.
func (x *Disks) copyTop(ctx context.Context, d *datastore, root *os.Root, r, from *record, u usage, a *act) error {
	r.Backing = from.Backing
	if err := r.write(root); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeTopIntended)
	size, err := qcow2SizeOf(root, from.Disk)
	if err != nil {
		return err
	}
	if len(r.Backing) > 0 {
		err = x.filer.overlay(ctx, d, root, r.Disk, r.Backing[0], size)
	} else {
		err = x.filer.makeQCOW2(ctx, d, root, r.Disk, size, false)
	}
	if err != nil {
		return err
	}
	return x.copyLive(ctx, d, root, r.Disk, from, u, a)
}

func qcow2SizeOf(root *os.Root, df diskFile) (int64, error) {
	f, err := root.OpenFile(df.path(), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return qcow2Size(f)
}
