package vmdk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/vim25/soap"

	"github.com/openatoll/atoll/storage"
)

// batch is how many volumes one question for snapshots is about.
const batch = 128

// A note is what a snapshot's description holds, the one field that a First
// Class Disk's snapshot has for it.
type note struct {
	Cluster string            `json:"atoll"` // the mark
	Name    string            `json:"name,omitempty"`
	MiB     int64             `json:"mib"`
	Labels  map[string]string `json:"labels,omitempty"`
	// Clone is the volume that is made from it: then it is nobody's, and goes.
	Clone string `json:"clone,omitempty"`
}

// A snap is a snapshot of ours.
type snap struct {
	note
	id      string // vSphere's
	of      *volume
	created time.Time
}

// snapshotID is that of storage: the disk's and its snapshot's.
func (s snap) snapshotID() string { return s.of.id + "." + s.id }

// splitID is the inverse.
func splitID(id string) (volume, snapshot string, ok bool) {
	volume, snapshot, ok = strings.Cut(id, ".")
	return volume, snapshot, ok && volume != "" && snapshot != ""
}

// snapshotsOf lists the snapshots of volumes: ours, and, with an empty mark,
// what others made.
func (d *Disks) snapshotsOf(ctx context.Context, volumes []*volume) (all []snap, err error) {
	byID := map[string]*volume{}
	for _, v := range volumes {
		byID[v.id] = v
	}
	for part := range slices.Chunk(volumes, batch) {
		var specs []cnstypes.CnsSnapshotQuerySpec
		for _, v := range part {
			specs = append(specs, cnstypes.CnsSnapshotQuerySpec{VolumeId: cnstypes.CnsVolumeId{Id: v.id}})
		}
		found, err := d.querySnapshots(ctx, specs)
		if err != nil {
			return nil, err
		}
		for _, s := range found {
			if v := byID[s.VolumeId.Id]; v != nil {
				out := snap{id: s.SnapshotId.Id, of: v, created: s.CreateTime}
				if json.Unmarshal([]byte(s.Description), &out.note) != nil || out.Cluster != d.options.Cluster {
					out.note = note{}
				}
				all = append(all, out)
			}
		}
	}
	return all, nil
}

// querySnapshots asks for snapshots page by page. A volume that is gone has
// none.
func (d *Disks) querySnapshots(ctx context.Context, specs []cnstypes.CnsSnapshotQuerySpec) (all []cnstypes.CnsSnapshot, err error) {
	filter := cnstypes.CnsSnapshotQueryFilter{SnapshotQuerySpecs: specs, Cursor: &cnstypes.CnsCursor{Limit: page}}
	for {
		what := "list snapshots of vCenter " + d.session.Address()
		result, err := d.do(ctx, what, "snapshots/"+specs[0].VolumeId.Id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
			res, err := cnsmethods.CnsQuerySnapshots(ctx, rt, &cnstypes.CnsQuerySnapshots{This: manager, SnapshotQueryFilter: filter})
			if err != nil {
				return ref{}, err
			}
			return res.Returnval, nil
		})
		if err != nil {
			return nil, err
		}
		res, ok := result.(cnstypes.CnsSnapshotQueryResult)
		if !ok {
			return nil, fmt.Errorf("%s: vCenter's answer is %T: %w", what, result, errdefs.ErrUnavailable)
		}
		for _, e := range res.Entries {
			if e.Error == nil {
				all = append(all, e.Snapshot)
			} else if err := wrap(what, localFault(e.Error)); !notThere(err) {
				return nil, err
			}
		}
		if len(res.Entries) == 0 || res.Cursor.Offset >= res.Cursor.TotalRecords {
			return all, nil
		}
		next := res.Cursor
		filter.Cursor = &next
	}
}

// shown is a snapshot as callers see it.
func (d *Disks) shownSnapshot(ctx context.Context, s snap) (storage.Snapshot, error) {
	at, err := d.show(ctx, s.of)
	if err != nil {
		return storage.Snapshot{}, err
	}
	return storage.Snapshot{
		ID: s.snapshotID(), Name: s.Name, VolumeID: s.of.id, Bytes: s.MiB * mib, Policy: s.of.policy, At: at.At,
		Labels: s.Labels, CreatedAt: s.created, Ready: true,
	}, nil
}

// Snapshot makes a snapshot, or returns the one of that name.
func (d *Disks) Snapshot(ctx context.Context, volumeID, name string, labels map[string]string) (storage.Snapshot, error) {
	if !nameForm.MatchString(name) {
		return storage.Snapshot{}, fmt.Errorf("snapshot %q: a name has 1 to 63 characters of A-Z, a-z, 0-9, dot, dash and underscore: %w", name, errdefs.ErrInvalidArgument)
	}
	releaseName, err := d.hold(ctx, "snapshot/"+name)
	if err != nil {
		return storage.Snapshot{}, err
	}
	defer releaseName()
	release, err := d.hold(ctx, volumeID)
	if err != nil {
		return storage.Snapshot{}, err
	}
	defer release()
	v, err := d.whole(ctx, volumeID)
	if err != nil {
		return storage.Snapshot{}, err
	}
	if s, err := d.snapshotNamed(ctx, v, name); err != nil || s != nil {
		if err != nil {
			return storage.Snapshot{}, err
		}
		return d.shownSnapshot(ctx, *s)
	}
	s, err := d.snapshot(ctx, v, note{Cluster: d.options.Cluster, Name: name, MiB: v.mib, Labels: labels})
	switch {
	case err == nil:
		shown, err := d.madeSnapshot(ctx, s)
		if err != nil { // whatever it is, there may be a snapshot
			return storage.Snapshot{}, fmt.Errorf("snapshot %s of volume %s (%s) was made, and cannot be looked at: %v: %w", name, v.name, v.id, err, errdefs.ErrUnavailable)
		}
		return shown, nil
	case !lost(err) && !errdefs.IsPermissionDenied(err):
		// Whoever hears that nothing was made forgets the name: a task that
		// failed may have made one all the same.
		if there, asked := d.snapshotNamed(ctx, v, name); asked == nil && there != nil {
			s, err = *there, nil
		}
	}
	if err != nil {
		return storage.Snapshot{}, err
	}
	return d.shownSnapshot(ctx, s)
}

// madeSnapshot shows what counts after a snapshot was made.
func (d *Disks) madeSnapshot(ctx context.Context, s snap) (storage.Snapshot, error) {
	s, err := d.firstSnapshot(ctx, s)
	if err != nil {
		return storage.Snapshot{}, err
	}
	return d.shownSnapshot(ctx, s)
}

// firstSnapshot returns the oldest snapshot of a name by vCenter's clock, after
// this call made one: another process may have made one beside it. The younger
// one, which nobody has seen, goes.
func (d *Disks) firstSnapshot(ctx context.Context, made snap) (snap, error) {
	all, err := d.snapshotsOf(ctx, []*volume{made.of})
	if err != nil {
		d.past.lose("snapshot/" + made.Name)
		return snap{}, err
	}
	first := made
	for _, s := range all {
		if s.Cluster != "" && s.Clone == made.Clone && s.Name == made.Name && (s.created.Before(first.created) || s.created.Equal(first.created) && s.id < first.id) {
			first = s
		}
	}
	if first.id == made.id {
		return made, nil
	}
	d.log.Info("another process took the snapshot first; the one beside it goes", "snapshot", made.Name, "volume", made.of.id, "id", made.id, "first", first.id)
	if err := d.dropSnapshot(ctx, made); err != nil {
		return snap{}, fmt.Errorf("snapshot %s of volume %s was made twice: %w", made.Name, made.of.id, err)
	}
	return first, nil
}

// whole finds a volume that callers may use.
func (d *Disks) whole(ctx context.Context, id string) (*volume, error) {
	v, err := d.byID(ctx, id)
	if err == nil && !v.isWhole() {
		err = fmt.Errorf("volume %s is deleted, or not made yet: %w", id, errdefs.ErrNotFound)
	}
	return v, err
}

// snapshotNamed looks for a name among a volume's snapshots, then among all: a
// name that is another volume's is ErrAlreadyExists.
func (d *Disks) snapshotNamed(ctx context.Context, v *volume, name string) (*snap, error) {
	if _, err := d.settle(ctx, "snapshot/"+name); err != nil {
		return nil, err
	}
	all, err := d.query(ctx, cnstypes.CnsQueryFilter{})
	if err != nil {
		return nil, err
	}
	snaps, err := d.snapshotsOf(ctx, all)
	if err != nil {
		return nil, err
	}
	for _, s := range snaps {
		switch {
		case s.Name != name || s.Cluster == "":
		case s.of.id == v.id:
			return &s, nil
		default:
			return nil, fmt.Errorf("snapshot %s is there already, of volume %s: %w", name, s.of.id, errdefs.ErrAlreadyExists)
		}
	}
	return nil, nil
}

// snapshot makes one. Where the outcome is not known it is looked for before the
// next is made (settle).
func (d *Disks) snapshot(ctx context.Context, v *volume, n note) (snap, error) {
	text, err := json.Marshal(n)
	if err != nil {
		return snap{}, fmt.Errorf("snapshot %s: %w: %w", n.Name, err, errdefs.ErrInvalidArgument)
	}
	res, err := d.doOne(ctx, fmt.Sprintf("make snapshot %s of volume %s (%s)", n.Name, v.name, v.id), v.id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		spec := cnstypes.CnsSnapshotCreateSpec{VolumeId: cnstypes.CnsVolumeId{Id: v.id}, Description: string(text)}
		res, err := cnsmethods.CnsCreateSnapshots(ctx, rt, &cnstypes.CnsCreateSnapshots{This: manager, SnapshotSpecs: []cnstypes.CnsSnapshotCreateSpec{spec}})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if lost(err) {
		d.past.lose("snapshot/" + n.Name)
	}
	if inUse(err) {
		return snap{}, fmt.Errorf("%w: vSphere keeps 32 snapshots of a disk at most: delete some if there are as many, or try again: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return snap{}, err
	}
	made, ok := res.(*cnstypes.CnsSnapshotCreateResult)
	if !ok {
		d.past.lose("snapshot/" + n.Name)
		return snap{}, fmt.Errorf("snapshot %s of volume %s: vCenter's answer is %T: %w", n.Name, v.id, res, errdefs.ErrUnavailable)
	}
	return snap{note: n, id: made.Snapshot.SnapshotId.Id, of: v, created: made.Snapshot.CreateTime}, nil
}

// findSnapshot finds one by its ID.
func (d *Disks) findSnapshot(ctx context.Context, id string) (snap, error) {
	none := fmt.Errorf("snapshot %s: vCenter %s has none: %w", id, d.session.Address(), errdefs.ErrNotFound)
	volumeID, snapshotID, ok := splitID(id)
	if !ok {
		return snap{}, none
	}
	v, err := d.byID(ctx, volumeID)
	if errdefs.IsNotFound(err) {
		return snap{}, none
	} else if err != nil {
		return snap{}, err
	}
	all, err := d.snapshotsOf(ctx, []*volume{v})
	if err != nil {
		return snap{}, err
	}
	for _, s := range all {
		if s.id == snapshotID && s.Cluster != "" && s.Clone == "" {
			return s, nil
		}
	}
	return snap{of: v}, none
}

// GetSnapshot finds a snapshot by ID.
func (d *Disks) GetSnapshot(ctx context.Context, id string) (storage.Snapshot, error) {
	s, err := d.findSnapshot(ctx, id)
	if err != nil {
		return storage.Snapshot{}, err
	}
	return d.shownSnapshot(ctx, s)
}

// ListSnapshots returns a volume's, or all, by ID.
func (d *Disks) ListSnapshots(ctx context.Context, volumeID string) ([]storage.Snapshot, error) {
	filter := cnstypes.CnsQueryFilter{}
	if volumeID != "" {
		filter.VolumeIds = []cnstypes.CnsVolumeId{{Id: volumeID}}
	}
	volumes, err := d.query(ctx, filter)
	if err != nil {
		return nil, err
	}
	snaps, err := d.snapshotsOf(ctx, volumes)
	if err != nil {
		return nil, err
	}
	var all []storage.Snapshot
	var errs []error
	for _, s := range snaps {
		if s.Cluster == "" || s.Clone != "" {
			continue
		}
		shown, err := d.shownSnapshot(ctx, s)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, shown)
	}
	slices.SortFunc(all, func(a, b storage.Snapshot) int { return strings.Compare(a.ID, b.ID) })
	return all, errors.Join(errs...)
}

// DeleteSnapshot erases a snapshot, and with the last one of a volume that was
// deleted, that volume.
func (d *Disks) DeleteSnapshot(ctx context.Context, id string) error {
	volumeID, _, ok := splitID(id)
	if !ok {
		return nil
	}
	release, err := d.hold(ctx, volumeID)
	if err != nil {
		return err
	}
	defer release()
	s, err := d.findSnapshot(ctx, id)
	if err == nil {
		err = d.dropSnapshot(ctx, s)
	} else if errdefs.IsNotFound(err) {
		err = nil
	}
	if err != nil || s.of == nil || !s.of.deleted {
		return err
	}
	return d.erase(ctx, s.of)
}

func (d *Disks) dropSnapshot(ctx context.Context, s snap) error {
	_, err := d.doOne(ctx, fmt.Sprintf("delete snapshot %s of volume %s", s.id, s.of.id), s.of.id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		spec := cnstypes.CnsSnapshotDeleteSpec{VolumeId: cnstypes.CnsVolumeId{Id: s.of.id}, SnapshotId: cnstypes.CnsSnapshotId{Id: s.id}}
		res, err := cnsmethods.CnsDeleteSnapshots(ctx, rt, &cnstypes.CnsDeleteSnapshots{This: manager, SnapshotDeleteSpecs: []cnstypes.CnsSnapshotDeleteSpec{spec}})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if notThere(err) {
		return nil
	}
	return err
}

// origin finds what a claim is made from.
func (d *Disks) origin(ctx context.Context, c storage.Claim) (origin, error) {
	var o origin
	switch {
	case c.Source == nil:
		return o, nil
	case c.Source.SnapshotID != "":
		s, err := d.findSnapshot(ctx, c.Source.SnapshotID)
		if err != nil {
			return o, fmt.Errorf("claim %s: %w", c.Name, err)
		}
		o = origin{s.of.id, s.id, s.MiB, s.of.url}
	default:
		v, err := d.whole(ctx, c.Source.VolumeID)
		if err != nil {
			return o, fmt.Errorf("claim %s: %w", c.Name, err)
		}
		o = origin{v.id, "", v.mib, v.url}
	}
	if c.Bytes != 0 && inMiB(c.Bytes) < o.mib {
		return o, fmt.Errorf("claim %s asks for %d MiB, and its source has %d: %w", c.Name, inMiB(c.Bytes), o.mib, errdefs.ErrOutOfRange)
	}
	return o, nil
}

// cloneSnapshot makes the snapshot that a clone is made from, or finds it.
func (d *Disks) cloneSnapshot(ctx context.Context, volumeID, clone string, size int64) (string, error) {
	release, err := d.hold(ctx, volumeID)
	if err != nil {
		return "", err
	}
	defer release()
	v := &volume{id: volumeID}
	if _, err := d.settle(ctx, "snapshot/"+clone); err != nil {
		return "", err
	}
	all, err := d.snapshotsOf(ctx, []*volume{v})
	if err != nil {
		return "", err
	}
	for _, s := range all {
		if s.Clone == clone && s.Cluster != "" && s.MiB == size {
			return s.id, nil
		}
	}
	s, err := d.snapshot(ctx, v, note{Cluster: d.options.Cluster, Name: clone, MiB: size, Clone: clone})
	return s.id, err
}

// dropCloneSnapshots removes what a clone was made from.
func (d *Disks) dropCloneSnapshots(ctx context.Context, volumeID, clone string) error {
	release, err := d.hold(ctx, volumeID)
	if err != nil {
		return err
	}
	defer release()
	all, err := d.snapshotsOf(ctx, []*volume{{id: volumeID}})
	if err != nil {
		return err
	}
	for _, s := range all {
		if s.Clone == clone && s.Cluster != "" {
			if err := d.dropSnapshot(ctx, s); err != nil {
				return err
			}
		}
	}
	return nil
}
