package vmdk

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	cnstypes "github.com/vmware/govmomi/cns/types"

	"github.com/openatoll/atoll/storage"
)

// Orphans lists them, by name. claimed tells whether somebody has the volume or
// snapshot with an ID, or waits for one of a name that is being made; it is asked
// after vCenter was, so that what came meanwhile is known to it. Without it whole
// volumes and snapshots are nobody's orphans, and what is half made is told of and
// not Disposable: the call that left it may take it up.
func (d *Disks) Orphans(ctx context.Context, claimed func(id, name string) bool) ([]storage.Orphan, error) {
	volumes, err := d.query(ctx, cnstypes.CnsQueryFilter{})
	if err != nil {
		return nil, err
	}
	byName := map[string][]*volume{}
	for _, v := range volumes {
		byName[v.name] = append(byName[v.name], v)
	}
	snaps, err := d.snapshotsOf(ctx, volumes)
	if err != nil {
		return nil, err
	}
	kept := map[string]bool{}
	var all []storage.Orphan
	for _, s := range snaps {
		kept[s.of.id] = true
		if s.Clone != "" && (claimed == nil || !claimed("", s.Clone)) {
			all = append(all, storage.Orphan{ID: s.snapshotID(), Name: s.Clone, Why: "volume " + s.Clone + " was being made from it", Disposable: claimed != nil})
		}
		if s.Cluster != "" && s.Clone == "" && claimed != nil && !claimed(s.snapshotID(), s.Name) {
			all = append(all, storage.Orphan{ID: s.snapshotID(), Name: s.Name, Why: fmt.Sprintf(
				"no VolumeSnapshotContent has this snapshot of volume %s, and it holds data: delete it by govc disk.snapshot.rm %s %s if nobody needs it, or make a content with its handle", s.of.name, s.of.id, s.id)})
		}
	}
	for _, name := range sorted(byName) {
		first, err := d.first(ctx, byName[name], name)
		if err != nil {
			return nil, err
		}
		for _, v := range byName[name] {
			if why := v.forsaken(first, kept[v.id], claimed); why != "" {
				all = append(all, storage.Orphan{ID: v.id, Name: v.name, Why: why, Disposable: v.deleted || claimed != nil && v.blank()})
			}
		}
	}
	return all, nil
}

// forsaken says why a volume is an orphan; first is the one that counts of its
// name, kept says that it has snapshots. Empty: it is none.
func (v *volume) forsaken(first *volume, kept bool, claimed func(id, name string) bool) string {
	has := func(id, name string) bool { return claimed != nil && claimed(id, name) }
	switch {
	case v.deleted && !kept:
		return "it is deleted, and its last snapshot is gone"
	case v.deleted:
		return ""
	case v != first && first != nil && !has(v.id, ""):
		return "an older volume (" + first.id + ") has its name"
	case v.mib < v.whole && !has(v.id, v.name):
		return fmt.Sprintf("it has %d MiB of the %d that it is to have", v.mib, v.whole)
	case claimed == nil || has(v.id, v.name):
		return ""
	case v.unused:
		return "its claim went before it had a PersistentVolume"
	}
	return "no PersistentVolume has it, and it may hold data: delete it in vCenter if nobody needs it"
}

// blank: nobody's data are on it. What is half made nobody was ever given.
func (v *volume) blank() bool { return v.unused || v.mib < v.whole }

// Discard deletes an orphan that is Disposable, after it has looked whether it
// still is. What is gone succeeds; what somebody has used since, or has, is
// ErrFailedPrecondition.
func (d *Disks) Discard(ctx context.Context, o storage.Orphan) error {
	release, err := d.hold(ctx, "name/"+o.Name)
	if err != nil {
		return err
	}
	defer release()
	if disk, _, ok := splitID(o.ID); ok && o.Disposable {
		return d.dropCloneSnapshots(ctx, disk, o.Name)
	} else if ok {
		return fmt.Errorf("snapshot %s (%s) holds data: it is left alone: %w", o.Name, o.ID, errdefs.ErrFailedPrecondition)
	}
	releaseID, err := d.hold(ctx, o.ID)
	if err != nil {
		return err
	}
	defer releaseID()
	v, err := d.byID(ctx, o.ID)
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	if !o.Disposable || !v.deleted && !v.blank() {
		return fmt.Errorf("volume %s (%s) may hold data: it is left alone: %w", v.name, v.id, errdefs.ErrFailedPrecondition)
	}
	held, err := d.holderOf(ctx, v)
	if err != nil {
		return err
	}
	if held != nil {
		return held.refusal(v)
	}
	return d.erase(ctx, v)
}
