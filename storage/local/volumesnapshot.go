package local

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
)

// maxChain bounds the files of a qcow2 disk: each costs QEMU memory and a
// look-up for each cluster that is not in those above it.
const maxChain = 32

// source reads the record of a claim's source.
func (x *Disks) source(c storage.Claim) (*datastore, *record, error) {
	id, kind := c.Source.VolumeID, "v"
	if id == "" {
		id, kind = c.Source.SnapshotID, "s"
	}
	d, root, r, err := x.openRecord(id, kind)
	if err != nil {
		return nil, nil, fmt.Errorf("its source: %w", err)
	}
	defer root.Close()
	if r == nil {
		return nil, nil, fmt.Errorf("its source %s is not there: %w", id, errdefs.ErrNotFound)
	}
	r.Bytes = max(r.Bytes, r.Growing)
	return d, r, nil
}

// makeFrom makes the file of a volume that begins as another volume or a
// snapshot. The caller has the locks of both.
func (x *Disks) makeFrom(ctx context.Context, d *datastore, root *os.Root, r *record, fromID string, a *act) error {
	from, err := readRecord(root, fromID)
	if err == nil && (from == nil || from.State != ready) {
		err = fmt.Errorf("its source %s is not there: %w", fromID, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	switch {
	case from.Encrypted != r.Encrypted:
		return fmt.Errorf("its source is encrypted=%t, its policy says %t: choose a policy that agrees: %w", from.Encrypted, r.Encrypted, errdefs.ErrInvalidArgument)
	case from.OwnKey != r.OwnKey:
		return fmt.Errorf("a copy has the key of its source: bring one if that did: %w", errdefs.ErrInvalidArgument)
	case !from.OwnKey && from.Encrypted && from.Policy != r.Policy:
		return fmt.Errorf("a copy has the key of its source, that of policy %s: choose that policy: %w", from.Policy, errdefs.ErrInvalidArgument)
	}
	r.Bytes = max(r.Bytes, from.Bytes, from.Growing) // it may have grown since it was chosen
	r.Disk = newFile(r.ID, from.Disk.Format)
	if err := x.copyOf(ctx, d, root, r, from, r.Thick, a); err != nil {
		return err
	}
	grown := *r
	if err := x.filer.grow(ctx, d, root, grown, r.Bytes); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeCopied)
	return nil
}

// copyOf records the intent and makes r.Disk what from is now; r gets from's
// files below its own where it can share them.
func (x *Disks) copyOf(ctx context.Context, d *datastore, root *os.Root, r, from *record, own bool, a *act) error {
	if err := check(root, *from); err != nil {
		return err
	}
	var u usage
	if from.VolumeID == "" {
		var err error
		if u, err = x.usageOf(root, from); err != nil {
			return err
		}
		if !u.open && !u.written() {
			if err := x.settle(ctx, d, root, from); err != nil {
				return err
			}
		}
	}
	switch {
	case from.Disk.Format != storage.FormatQCOW2:
	case u.written():
		return x.copyTop(ctx, d, root, r, from, u, a)
	case u.open:
		return fmt.Errorf("a VM reads it, and qcow2 disks cannot be shared under one: detach the volume first: %w", errdefs.ErrFailedPrecondition)
	default:
		return x.overlays(ctx, d, root, r, from)
	}
	if err := r.write(root); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeCopyIntended)
	return x.copyFile(ctx, d, root, r.Disk, from, u, own, a)
}

// copyFile copies a raw or LUKS file. own: it shall share no block.
func (x *Disks) copyFile(ctx context.Context, d *datastore, root *os.Root, to diskFile, from *record, u usage, own bool, a *act) (err error) {
	src, err := root.OpenFile(from.Disk.path(), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := createFile(root, to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dst.Sync(), dst.Close(), syncDir(root, disksDir)) }()
	if d.reflink(dst, src) {
		if !own {
			return nil
		}
		st, err := dst.Stat()
		if err != nil {
			return err
		}
		err = unix.Fallocate(int(dst.Fd()), unix.FALLOC_FL_UNSHARE_RANGE, 0, st.Size())
		if !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		if err := dst.Truncate(0); err != nil {
			return err
		}
	}
	if u.written() {
		return x.copyLive(ctx, d, root, to, from, u, a)
	}
	return copySparse(ctx, dst, src, a.progress)
}

// overlays has r and from share files. A snapshot's file is never written
// again; what a volume has becomes its and r's past, above which each has a
// file of its own.
func (x *Disks) overlays(ctx context.Context, d *datastore, root *os.Root, r, from *record) error {
	if len(from.Backing)+2 > maxChain {
		return fmt.Errorf("it consists of %d files already, one a snapshot or clone, and %d are the most: copy its data to a new volume: %w", len(from.Backing)+1, maxChain, errdefs.ErrFailedPrecondition)
	}
	past := from.chain()
	isSnapshot := r.VolumeID != ""
	r.Backing = past
	if isSnapshot {
		r.Disk, r.Backing = past[0], past[1:]
	}
	var next diskFile
	if from.VolumeID == "" {
		next = newFile(from.ID, storage.FormatQCOW2)
		r.Makes = []string{next.Name}
	}
	if err := r.write(root); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeOverlayIntended)
	if !isSnapshot {
		if err := x.filer.overlay(ctx, d, root, r.Disk, past[0], from.Bytes); err != nil {
			return err
		}
	}
	if from.VolumeID != "" {
		return nil
	}
	if err := x.filer.overlay(ctx, d, root, next, past[0], from.Bytes); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeOverlayMade)
	from.Disk, from.Backing = next, past
	if err := from.write(root); err != nil {
		return err
	}
	failpoint.Hit(failpoint.VolumeOverlaid)
	return nil
}

// Snapshot implements storage.Snapshots.
func (x *Disks) Snapshot(ctx context.Context, volumeID, name string, labels map[string]string) (storage.Snapshot, error) {
	s, err := x.takeSnapshot(ctx, volumeID, name, labels)
	if err != nil {
		return s, explain("snapshot "+name+" of volume "+volumeID, err)
	}
	return s, nil
}

func (x *Disks) takeSnapshot(ctx context.Context, id, name string, labels map[string]string) (none storage.Snapshot, err error) {
	if !claimNameRE.MatchString(name) {
		return none, fmt.Errorf("%q is no name of a snapshot: want 1 to 63 characters of [A-Za-z0-9._-]: %w", name, errdefs.ErrInvalidArgument)
	}
	if s, found, err := x.existingSnapshot(id, name); found || err != nil {
		return s, err
	}
	d, err := x.stores.of(id, "v")
	if err != nil {
		return none, err
	}
	sid := snapshotID(d.id, name)
	err = x.act(ctx, sid, func(ctx context.Context, a *act) error { return x.makeSnapshot(ctx, d, sid, id, name, labels, a) })
	if err != nil {
		return none, err
	}
	s, found, err := x.existingSnapshot(id, name)
	if err == nil && !found {
		err = fmt.Errorf("it was deleted as soon as it was there: %w", errdefs.ErrUnavailable)
	}
	return s, err
}

// makeSnapshot takes the snapshot sid, unless it is there.
func (x *Disks) makeSnapshot(ctx context.Context, d *datastore, sid, id, name string, labels map[string]string, a *act) error {
	root, err := d.open()
	if err != nil {
		return err
	}
	defer root.Close()
	l, err := take(ctx, root, objectLock(id), objectLock(sid))
	if err != nil {
		return err
	}
	defer l.release()
	if err := x.undo(root, sid); err != nil {
		return err
	}
	if _, found, err := x.existingSnapshot(id, name); found || err != nil {
		return err
	}
	from, err := readRecord(root, id)
	if err == nil && (from == nil || from.State != ready) {
		err = noVolume(d, id)
	}
	if err != nil {
		return err
	}
	r := record{
		ID: sid, Name: name, State: making, By: x.cfg.Host, Bytes: from.Bytes, VolumeID: id,
		Policy: from.Policy, Encrypted: from.Encrypted, OwnKey: from.OwnKey, IOPS: from.IOPS, BytesPerSecond: from.BytesPerSecond,
		Disk: newFile(sid, from.Disk.Format), Labels: maps.Clone(labels), CreatedAt: time.Now().UTC().Truncate(time.Second),
	}
	err = x.copyOf(ctx, d, root, &r, from, false, a)
	if err == nil {
		failpoint.Hit(failpoint.SnapshotCopied)
		err = x.finishSnapshot(root, &r)
	}
	if err != nil {
		// Also when ctx is what ended. What cannot be undone now is later.
		if uerr := x.undo(root, sid); uerr != nil {
			x.log.Error("half a snapshot cannot be undone yet", "snapshot", sid, "err", uerr)
		}
		return err
	}
	failpoint.Hit(failpoint.SnapshotReady)
	x.log.Info("snapshot taken", "snapshot", sid, "volume", id, "name", name)
	return nil
}

// finishSnapshot says that it is whole, and how large it is: the volume may
// have grown on the way.
func (x *Disks) finishSnapshot(root *os.Root, r *record) error {
	f, err := root.OpenFile(r.Disk.path(), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	switch r.Disk.Format {
	case storage.FormatRaw:
		r.Bytes = st.Size()
	case storage.FormatLUKS:
		offset, err := luksPayload(f)
		if err != nil {
			return err
		}
		r.Bytes = st.Size() - offset
	default:
		if r.Bytes, err = qcow2Size(f); err != nil {
			return err
		}
	}
	r.State, r.By, r.Makes = ready, "", nil
	return r.write(root)
}

// existingSnapshot finds a whole snapshot of a name on any datastore.
func (x *Disks) existingSnapshot(volume, name string) (none storage.Snapshot, found bool, err error) {
	all, _ := x.stores.all()
	for _, d := range all {
		r, err := d.read(snapshotID(d.id, name))
		if errdefs.IsUnavailable(err) {
			if ds, _ := datastoreOf(volume, "v"); ds != d.id {
				continue
			}
		}
		if err != nil {
			return none, false, err
		}
		if r == nil || r.State != ready {
			continue
		}
		if r.VolumeID != volume {
			return none, false, fmt.Errorf("there is one of that name, of volume %s: %w", r.VolumeID, errdefs.ErrAlreadyExists)
		}
		return d.snapshot(*r), true, nil
	}
	return none, false, nil
}

func (d *datastore) read(id string) (*record, error) {
	root, err := d.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	return readRecord(root, id)
}

// GetSnapshot implements storage.Snapshots.
func (x *Disks) GetSnapshot(_ context.Context, id string) (storage.Snapshot, error) {
	d, root, r, err := x.openRecord(id, "s")
	if err != nil {
		return storage.Snapshot{}, explain("snapshot "+id, err)
	}
	defer root.Close()
	if r == nil {
		return storage.Snapshot{}, fmt.Errorf("datastore %s has no snapshot %s: %w", d.Name, id, errdefs.ErrNotFound)
	}
	return d.snapshot(*r), nil
}

// ListSnapshots implements storage.Snapshots.
func (x *Disks) ListSnapshots(ctx context.Context, volumeID string) ([]storage.Snapshot, error) {
	var found []storage.Snapshot
	err := x.each(ctx, "s", func(d *datastore, r record) {
		if volumeID == "" || r.VolumeID == volumeID {
			found = append(found, d.snapshot(r))
		}
	})
	slices.SortFunc(found, func(a, b storage.Snapshot) int { return strings.Compare(a.ID, b.ID) })
	return found, err
}

// DeleteSnapshot implements storage.Snapshots.
func (x *Disks) DeleteSnapshot(ctx context.Context, id string) error {
	if err := x.endAct(ctx, id); err != nil {
		return explain("delete snapshot "+id, err)
	}
	_, root, r, l, err := x.lockGone(ctx, id, "s")
	if err != nil {
		return explain("delete snapshot "+id, err)
	}
	if r == nil {
		return nil
	}
	defer root.Close()
	defer l.release()
	if err := x.eraseRecorded(root, *r); err != nil {
		return explain("delete snapshot "+id, err)
	}
	x.log.Info("snapshot deleted", "snapshot", id)
	return nil
}
