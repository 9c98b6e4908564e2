package vmdk

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/cns"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	cnstypes "github.com/vmware/govmomi/cns/types"

	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	vslmmethods "github.com/vmware/govmomi/vslm/methods"
	vslmtypes "github.com/vmware/govmomi/vslm/types"

	"github.com/openatoll/atoll/storage"
)

// page is how many volumes one answer of CNS's has at most.
const page = 500

var manager = cns.CnsVolumeManagerInstance

var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

func sorted[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// query lists our volumes that a filter selects, by id, those included that are
// not whole or are there for their snapshots alone.
func (d *Disks) query(ctx context.Context, filter cnstypes.CnsQueryFilter) ([]*volume, error) {
	if err := d.services.ready(ctx); err != nil {
		return nil, err
	}
	filter.ContainerClusterIds = []string{d.options.Cluster}
	filter.Cursor = &cnstypes.CnsCursor{Limit: page}
	var all []*volume
	for {
		res, err := cnsmethods.CnsQueryVolume(ctx, d.services.cns, &cnstypes.CnsQueryVolume{This: manager, Filter: &filter})
		if err != nil {
			return nil, wrap("list the volumes of vCenter "+d.session.Address(), err)
		}
		for _, c := range res.Returnval.Volumes {
			if v, ok := d.ours(c); ok {
				all = append(all, v)
			}
		}
		next := res.Returnval.Cursor
		if len(res.Returnval.Volumes) == 0 || next.Offset >= next.TotalRecords {
			break
		}
		filter.Cursor = &next
	}
	slices.SortFunc(all, func(a, b *volume) int { return strings.Compare(a.id, b.id) })
	return slices.CompactFunc(all, func(a, b *volume) bool { return a.id == b.id }), nil
}

// byID finds a volume of ours; ErrNotFound if vCenter says that there is none.
func (d *Disks) byID(ctx context.Context, id string) (*volume, error) {
	found, err := d.query(ctx, cnstypes.CnsQueryFilter{VolumeIds: []cnstypes.CnsVolumeId{{Id: id}}})
	if err != nil {
		return nil, err
	}
	for _, v := range found {
		if v.id == id {
			return v, nil
		}
	}
	// CNS leaves out what may not be seen. The disk itself tells.
	there, err := d.diskInfo(ctx, id)
	switch {
	case notThere(err):
		return nil, fmt.Errorf("volume %s: vCenter %s has none: %w", id, d.session.Address(), errdefs.ErrNotFound)
	case err != nil:
		return nil, err
	}
	return nil, &foreign{fmt.Sprintf("disk %s (%s) in vCenter %s does not bear the mark of cluster %s: it is left alone", id, there.Name, d.session.Address(), d.options.Cluster)}
}

// A foreign error is about a disk that is there and is not ours.
type foreign struct{ text string }

func (f *foreign) Error() string { return f.text }
func (f *foreign) Unwrap() error { return errdefs.ErrNotFound }

// diskInfo asks for a First Class Disk, whosever it is.
func (d *Disks) diskInfo(ctx context.Context, id string) (vslmtypes.VslmVsoVStorageObjectResult, error) {
	var none vslmtypes.VslmVsoVStorageObjectResult
	what := "look at disk " + id
	this, err := d.services.manager(ctx)
	if err != nil {
		return none, err
	}
	res, err := vslmmethods.VslmRetrieveVStorageObjects(ctx, d.services.vslm, &vslmtypes.VslmRetrieveVStorageObjects{This: this, Ids: []types.ID{{Id: id}}})
	if err != nil {
		return none, wrap(what, err)
	}
	if len(res.Returnval) != 1 {
		return none, fmt.Errorf("%s: vCenter answers with %d: %w", what, len(res.Returnval), errdefs.ErrUnavailable)
	}
	if f := res.Returnval[0].Error; f != nil {
		return none, wrap(what, localFault(f))
	}
	return res.Returnval[0], nil
}

// named finds our volume of a name. Of several (a creation that was lost sight
// of ended after the next one) it is the oldest; Orphans tells of the others.
func (d *Disks) named(ctx context.Context, name string) (*volume, error) {
	found, err := d.query(ctx, cnstypes.CnsQueryFilter{Names: []string{name}})
	if err != nil {
		return nil, err
	}
	return d.first(ctx, found, name)
}

// show looks up where a volume is.
func (d *Disks) show(ctx context.Context, v *volume) (storage.Volume, error) {
	stores, err := d.stores.list(ctx)
	if err != nil {
		return storage.Volume{}, err
	}
	for _, at := range stores {
		if at.url == v.url {
			return v.shown(d.stores.topology(at), at.name), nil
		}
	}
	return storage.Volume{}, fmt.Errorf("volume %s is on datastore %s, which vCenter %s does not show: %w", v.id, v.url, d.session.Address(), errdefs.ErrUnavailable)
}

// Get finds a volume by ID.
func (d *Disks) Get(ctx context.Context, id string) (storage.Volume, error) {
	v, err := d.byID(ctx, id)
	if err != nil {
		return storage.Volume{}, err
	}
	if !v.isWhole() {
		return storage.Volume{}, fmt.Errorf("volume %s is deleted, or not made yet: %w", id, errdefs.ErrNotFound)
	}
	return d.show(ctx, v)
}

// List returns all volumes, by ID.
func (d *Disks) List(ctx context.Context) ([]storage.Volume, error) {
	found, err := d.query(ctx, cnstypes.CnsQueryFilter{})
	if err != nil {
		return nil, err
	}
	var all []storage.Volume
	var errs []error
	for _, v := range found {
		if !v.isWhole() {
			continue
		}
		shown, err := d.show(ctx, v)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, shown)
	}
	return all, errors.Join(errs...)
}

// Delete erases a volume; one that has snapshots is kept for them, unseen.
func (d *Disks) Delete(ctx context.Context, id string) error {
	release, err := d.hold(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	v, err := d.byID(ctx, id)
	if other := (*foreign)(nil); errors.As(err, &other) {
		return fmt.Errorf("%s: %w", other.text, errdefs.ErrFailedPrecondition)
	}
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
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

// erase deletes the disk of a volume that nobody has, or retires it.
func (d *Disks) erase(ctx context.Context, v *volume) error {
	snaps, err := d.snapshotsOf(ctx, []*volume{v})
	if err != nil {
		return err
	}
	if len(snaps) > 0 {
		return d.retire(ctx, v)
	}
	what := fmt.Sprintf("delete volume %s (%s)", v.name, v.id)
	_, err = d.doOne(ctx, what, v.id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		res, err := cnsmethods.CnsDeleteVolume(ctx, rt, &cnstypes.CnsDeleteVolume{This: manager, VolumeIds: []cnstypes.CnsVolumeId{{Id: v.id}}, DeleteDisk: true})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if notThere(err) {
		return nil
	}
	if inUse(err) { // a VM, or a snapshot, came meanwhile
		if held, asked := d.holderOf(ctx, v); asked == nil && held != nil {
			return held.refusal(v)
		}
		return fmt.Errorf("%w: try again: %w", err, errdefs.ErrFailedPrecondition)
	}
	return err
}

// retire keeps a volume for its snapshots alone.
func (d *Disks) retire(ctx context.Context, v *volume) error {
	if v.deleted {
		return nil
	}
	v.deleted, v.unused = true, false
	return d.update(ctx, v, d.metadata(v).EntityMetadata)
}

// update changes what CNS is told of a volume.
func (d *Disks) update(ctx context.Context, v *volume, entities []cnstypes.BaseCnsEntityMetadata) error {
	_, err := d.doOne(ctx, fmt.Sprintf("describe volume %s (%s)", v.name, v.id), v.id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		spec := cnstypes.CnsVolumeMetadataUpdateSpec{VolumeId: cnstypes.CnsVolumeId{Id: v.id}, Metadata: cnstypes.CnsVolumeMetadata{ContainerCluster: d.cluster(), EntityMetadata: entities}}
		res, err := cnsmethods.CnsUpdateVolumeMetadata(ctx, rt, &cnstypes.CnsUpdateVolumeMetadata{This: manager, UpdateSpecs: []cnstypes.CnsVolumeMetadataUpdateSpec{spec}})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	return err
}

// Expand makes a volume larger.
func (d *Disks) Expand(ctx context.Context, id string, bytes int64) (storage.Volume, error) {
	release, err := d.hold(ctx, id)
	if err != nil {
		return storage.Volume{}, err
	}
	defer release()
	v, err := d.byID(ctx, id)
	if err == nil && !v.isWhole() {
		err = fmt.Errorf("volume %s is deleted, or not made yet: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return storage.Volume{}, err
	}
	if want := inMiB(bytes); want > v.mib {
		shown, err := d.show(ctx, v)
		if err != nil {
			return shown, err
		}
		if err := d.roomAt(ctx, shown.At.Datastore, want-v.mib, want); err != nil {
			return storage.Volume{}, fmt.Errorf("expand volume %s: %w", id, err)
		}
		if err := d.extend(ctx, v, want); err != nil {
			return storage.Volume{}, err
		}
	}
	return d.show(ctx, v)
}

func (d *Disks) extend(ctx context.Context, v *volume, to int64) error {
	_, err := d.doOne(ctx, fmt.Sprintf("expand volume %s (%s) to %d MiB", v.name, v.id, to), v.id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		spec := cnstypes.CnsVolumeExtendSpec{VolumeId: cnstypes.CnsVolumeId{Id: v.id}, CapacityInMb: to}
		res, err := cnsmethods.CnsExtendVolume(ctx, rt, &cnstypes.CnsExtendVolume{This: manager, ExtendSpecs: []cnstypes.CnsVolumeExtendSpec{spec}})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if inUse(err) {
		return fmt.Errorf("%w: vSphere expands no disk that has snapshots: delete them first: %w", err, errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		v.mib = to
	}
	return err
}

// Used is what a volume takes on its datastore.
func (d *Disks) Used(ctx context.Context, id string) (int64, error) {
	v, err := d.byID(ctx, id)
	if err != nil {
		return 0, err
	}
	info, err := d.diskInfo(ctx, v.id)
	if notThere(err) {
		return 0, fmt.Errorf("volume %s: vCenter %s has none: %w", id, d.session.Address(), errdefs.ErrNotFound)
	}
	return info.UsedCapacityInMB * mib, err
}

func inMiB(bytes int64) int64 { return bytes/mib + min(bytes%mib, 1) }

func now() time.Time { return time.Now().UTC() }
