package local

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
)

// openVolume reads a volume's record without a lock: nil unless it is whole.
func (x *Disks) openVolume(id string) (*datastore, *os.Root, *record, error) {
	return x.openRecord(id, "v")
}

func (x *Disks) openRecord(id, kind string) (*datastore, *os.Root, *record, error) {
	d, err := x.stores.of(id, kind)
	if err != nil {
		return nil, nil, nil, err
	}
	root, err := d.open()
	if err != nil {
		return nil, nil, nil, err
	}
	r, err := readRecord(root, id)
	if err != nil {
		root.Close()
		return nil, nil, nil, err
	}
	if r != nil && r.State != ready {
		r = nil
	}
	return d, root, r, nil
}

func noVolume(d *datastore, id string) error {
	return fmt.Errorf("datastore %s has no volume %s: %w", d.Name, id, errdefs.ErrNotFound)
}

// lockObject takes the lock of a volume or snapshot. The caller closes the root
// and releases the lock.
func (x *Disks) lockObject(ctx context.Context, id, kind string) (*datastore, *os.Root, *lock, error) {
	d, err := x.stores.of(id, kind)
	if err != nil {
		return nil, nil, nil, err
	}
	root, err := d.open()
	if err != nil {
		return nil, nil, nil, err
	}
	l, err := take(ctx, root, objectLock(id))
	if err != nil {
		root.Close()
		return nil, nil, nil, err
	}
	return d, root, l, nil
}

// lockVolume takes a volume's lock and reads its record. What is not whole is
// ErrNotFound. The caller closes the root and releases the lock.
func (x *Disks) lockVolume(ctx context.Context, id string) (*datastore, *os.Root, *record, *lock, error) {
	d, root, l, err := x.lockObject(ctx, id, "v")
	if err != nil {
		return nil, nil, nil, nil, err
	}
	r, err := readRecord(root, id)
	if err == nil && (r == nil || r.State != ready) {
		err = noVolume(d, id)
	}
	if err != nil {
		l.release()
		root.Close()
		return nil, nil, nil, nil, err
	}
	return d, root, r, l, nil
}

// Get implements storage.Volumes.
func (x *Disks) Get(_ context.Context, id string) (storage.Volume, error) {
	d, root, r, err := x.openVolume(id)
	if err != nil {
		return storage.Volume{}, explain("volume "+id, err)
	}
	defer root.Close()
	if r == nil {
		return storage.Volume{}, noVolume(d, id)
	}
	return d.volume(*r), nil
}

// List implements storage.Volumes.
func (x *Disks) List(ctx context.Context) ([]storage.Volume, error) {
	var vs []storage.Volume
	err := x.each(ctx, "v", func(d *datastore, r record) { vs = append(vs, d.volume(r)) })
	slices.SortFunc(vs, func(a, b storage.Volume) int { return strings.Compare(a.ID, b.ID) })
	return vs, err
}

// each calls fn for all that is whole; the error tells of what could not be
// read.
func (x *Disks) each(ctx context.Context, kind string, fn func(*datastore, record)) error {
	all, missing := x.stores.all()
	errs := []error{missing}
	for _, d := range all {
		if err := eachOf(ctx, d, kind, fn); err != nil {
			errs = append(errs, explain("datastore "+d.Name, err))
		}
	}
	return errors.Join(errs...)
}

func eachOf(ctx context.Context, d *datastore, kind string, fn func(*datastore, record)) error {
	root, err := d.open()
	if err != nil {
		return err
	}
	defer root.Close()
	all, err := ids(root, kind)
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range all {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := readRecord(root, id)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if r != nil && r.State == ready {
			fn(d, *r)
		}
	}
	return errors.Join(errs...)
}

// Delete implements storage.Volumes.
func (x *Disks) Delete(ctx context.Context, id string) error {
	if err := x.delete(ctx, id); err != nil {
		return explain("delete volume "+id, err)
	}
	return nil
}

func (x *Disks) delete(ctx context.Context, id string) error {
	if err := x.endAct(ctx, id); err != nil {
		return err
	}
	d, root, r, l, err := x.lockGone(ctx, id, "v")
	if err != nil || r == nil {
		return err
	}
	defer root.Close()
	defer l.release()
	held, detail, err := x.holding(root, id)
	if err != nil {
		return err
	}
	if held != nil {
		return &storage.HeldError{VolumeID: id, Holder: held.Holder, Detail: detail}
	}
	if open, err := opened(root, r.Disk.path()); err == nil && open {
		return fmt.Errorf("a QEMU has its file %s open: end that VM: %w", d.path(r.Disk.path()), errdefs.ErrFailedPrecondition)
	}
	if err := x.eraseRecorded(root, *r); err != nil {
		return err
	}
	if err := endLease(root, id); err != nil { // a stale one
		return err
	}
	x.log.Info("volume deleted", "volume", id, "name", r.Name, "datastore", d.Name)
	return nil
}

// lockGone is lockVolume for what may be gone: its record is nil then, and
// there is nothing to close. What was left half-way is ended.
func (x *Disks) lockGone(ctx context.Context, id, kind string) (*datastore, *os.Root, *record, *lock, error) {
	if _, err := x.stores.of(id, kind); errdefs.IsNotFound(err) {
		return nil, nil, nil, nil, nil
	}
	d, root, l, err := x.lockObject(ctx, id, kind)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	var r *record
	if err = x.undo(root, id); err == nil {
		r, err = readRecord(root, id)
	}
	if err != nil || r == nil {
		l.release()
		root.Close()
		return nil, nil, nil, nil, err
	}
	return d, root, r, l, nil
}

// eraseRecorded says that it erases, then does.
func (x *Disks) eraseRecorded(root *os.Root, r record) error {
	r.State, r.By = deleting, x.cfg.Host
	if err := r.write(root); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeDeleting)
	if err := eraseAll(root, r); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeErased)
	return nil
}

// Expand implements storage.Volumes.
func (x *Disks) Expand(ctx context.Context, id string, bytes int64) (storage.Volume, error) {
	v, err := x.expand(ctx, id, bytes)
	if err != nil {
		return v, explain("expand volume "+id, err)
	}
	return v, nil
}

func (x *Disks) expand(ctx context.Context, id string, bytes int64) (none storage.Volume, err error) {
	if bytes > maxBytes {
		return none, fmt.Errorf("%d bytes: want at most 62 TiB: %w", bytes, errdefs.ErrOutOfRange)
	}
	bytes = (bytes + mib - 1) / mib * mib
	d, root, r, l, err := x.lockVolume(ctx, id)
	if err != nil {
		return none, err
	}
	defer root.Close()
	defer l.release()
	if err := check(root, *r); err != nil {
		return none, err
	}
	if bytes > max(r.Bytes, r.Growing) {
		if err := roomFor(root, bytes, r.Bytes); err != nil {
			return none, err
		}
		r.Growing = bytes
		if err := r.write(root); err != nil { // the intent, before the act
			return none, err
		}
		failpoint.Hit(failpoint.VolumeGrowing)
	}
	if err := x.settle(ctx, d, root, r); err != nil {
		return none, err
	}
	return d.volume(*r), nil
}

func roomFor(root *os.Root, bytes, has int64) error {
	c, err := space(root)
	switch {
	case err != nil:
		return err
	case bytes > c.Total:
		return fmt.Errorf("%d bytes are more than the datastore has (%d): %w", bytes, c.Total, errdefs.ErrOutOfRange)
	case bytes-has > c.MaxVolume:
		return fmt.Errorf("%d more bytes are not free on the datastore (%d are): %w", bytes-has, c.MaxVolume, errdefs.ErrResourceExhausted)
	}
	return nil
}

// settle gives a volume's file the size that it is to have. A qcow2 file that a
// VM has open is left to that: QEMU alone may write to it.
func (x *Disks) settle(ctx context.Context, d *datastore, root *os.Root, r *record) error {
	if r.Growing == 0 {
		return nil
	}
	if r.Disk.Format == storage.FormatQCOW2 {
		open, err := opened(root, r.Disk.path())
		if err != nil || open {
			return err
		}
	}
	if err := x.filer.grow(ctx, d, root, *r, r.Growing); err != nil {
		return errors.Join(err, x.shrink(root, r, err))
	}
	failpoint.Hit(failpoint.VolumeGrown)
	r.Bytes, r.Growing = r.Growing, 0
	return r.write(root)
}

// shrink takes the intent to grow back where there was no room. What was added
// no guest has seen.
func (x *Disks) shrink(root *os.Root, r *record, cause error) error {
	if !errors.Is(cause, syscall.ENOSPC) && !errors.Is(cause, syscall.EDQUOT) || r.Disk.Format == storage.FormatQCOW2 {
		return nil
	}
	f, err := root.OpenFile(r.Disk.path(), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	end := r.Bytes
	if r.Disk.Format == storage.FormatLUKS {
		offset, err := luksPayload(f)
		if err != nil {
			return err
		}
		end += offset
	}
	if err := f.Truncate(end); err != nil {
		return err
	}
	r.Growing = 0
	return r.write(root)
}

// Used implements storage.Volumes: the blocks of all files that it consists of.
func (x *Disks) Used(_ context.Context, id string) (int64, error) {
	d, root, r, err := x.openVolume(id)
	if err != nil {
		return 0, explain("volume "+id, err)
	}
	defer root.Close()
	if r == nil {
		return 0, noVolume(d, id)
	}
	used := int64(0)
	for _, f := range r.chain() {
		st, err := root.Lstat(f.path())
		if err != nil {
			return 0, explain("volume "+id, damaged(id, "%v", err))
		}
		used += st.Sys().(*syscall.Stat_t).Blocks * 512
	}
	return used, nil
}

// Policies implements storage.Pools.
func (x *Disks) Policies(context.Context) ([]storage.Policy, error) {
	var out []storage.Policy
	var errs []error
	for _, c := range x.cfg.Datastores {
		d, err := x.stores.meet(c)
		errs = append(errs, err)
		for _, p := range c.Policies {
			i := slices.IndexFunc(out, func(o storage.Policy) bool { return o.Name == p.Name })
			if i < 0 {
				i, out = len(out), append(out, p.Policy)
				out[i].Shared, out[i].Datastores, out[i].Topology = c.Shared, nil, nil
			}
			if d != nil {
				out[i].Datastores, out[i].Topology = append(out[i].Datastores, d.id), append(out[i].Topology, d.at())
			}
		}
	}
	slices.SortFunc(out, func(a, b storage.Policy) int { return strings.Compare(a.Name, b.Name) })
	return out, errors.Join(errs...)
}

// Capacity implements storage.Pools. Sizes are of the file systems, which
// others may use as well; MaxVolume is the room of the datastore that has most.
func (x *Disks) Capacity(_ context.Context, policy string, at storage.Topology) (storage.Capacity, error) {
	ds, err := x.stores.with(policy)
	if err != nil {
		return storage.Capacity{}, explain("capacity of policy "+policy, err)
	}
	var sum storage.Capacity
	for _, d := range ds {
		if !d.at().Fits(at) {
			continue
		}
		c, err := d.capacity()
		if err != nil {
			return storage.Capacity{}, explain("capacity of policy "+policy, err)
		}
		sum.Total += c.Total
		sum.Available += c.Available
		sum.MaxVolume = max(sum.MaxVolume, c.MaxVolume)
	}
	return sum, nil
}
