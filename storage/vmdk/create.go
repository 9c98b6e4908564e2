package vmdk

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/storage"
)

// Create makes the volume that a claim asks for. CNS knows no unique names: so
// before it makes one it looks for one, and for tasks that may be about to make
// one; and after it made one it looks again, because another process may have
// made one beside it: the older one counts, by vCenter's clock, and who made a
// younger one, which nobody has seen, takes it back.
func (d *Disks) Create(ctx context.Context, c storage.Claim) (storage.Volume, error) {
	if err := valid(c); err != nil {
		return storage.Volume{}, err
	}
	policy, err := d.policy(ctx, c.Policy)
	if err != nil {
		return storage.Volume{}, fmt.Errorf("claim %s: %w", c.Name, err)
	}
	release, err := d.hold(ctx, "name/"+c.Name)
	if err != nil {
		return storage.Volume{}, err
	}
	defer release()
	v, err := d.existing(ctx, c.Name)
	if err != nil {
		return storage.Volume{}, err
	}
	if v == nil {
		if v, err = d.begin(ctx, c, policy); err != nil {
			return storage.Volume{}, err
		}
	} else if err := d.same(ctx, v, c, policy); err != nil {
		return storage.Volume{}, err
	}
	if err := d.finish(ctx, v); err != nil {
		return storage.Volume{}, err
	}
	return d.show(ctx, v)
}

func valid(c storage.Claim) error {
	invalid := func(why string) error {
		return fmt.Errorf("claim %q: %s: %w", c.Name, why, errdefs.ErrInvalidArgument)
	}
	switch {
	case !nameForm.MatchString(c.Name):
		return invalid("a name has 1 to 63 characters of A-Z, a-z, 0-9, dot, dash and underscore, and begins with a letter or digit")
	case c.Bytes < 0 || c.Bytes == 0 && c.Source == nil:
		return invalid("it asks for no size")
	case len(c.Key) > 0:
		return invalid("it brings a key, and encryption on vSphere is the storage policy's, with keys of vCenter's key provider")
	case c.Source != nil && (c.Source.SnapshotID == "") == (c.Source.VolumeID == ""):
		return invalid("a source is one snapshot or one volume")
	}
	for k := range c.Labels {
		if strings.HasPrefix(k, labelPrefix) {
			return invalid("the label " + k + " is Atoll's own")
		}
	}
	return nil
}

// existing is our volume of a name, made or being made.
func (d *Disks) existing(ctx context.Context, name string) (*volume, error) {
	v, err := d.named(ctx, name)
	if v != nil || err != nil {
		return v, err
	}
	looked, err := d.settle(ctx, name)
	if err != nil || !looked {
		return nil, err
	}
	return d.named(ctx, name)
}

// same is nil if the claim could have made the volume.
func (d *Disks) same(ctx context.Context, v *volume, c storage.Claim, p policy) error {
	taken := func(why string) error {
		return fmt.Errorf("claim %s: there is a volume of that name (%s) %s: %w", c.Name, v.id, why, errdefs.ErrAlreadyExists)
	}
	source := func(s *storage.Source) storage.Source {
		if s == nil {
			return storage.Source{}
		}
		return *s
	}
	at, err := d.show(ctx, v)
	switch {
	case err != nil:
		return err
	case v.policyID != p.id:
		return taken("with the storage policy " + v.policy)
	case source(v.source) != source(c.Source):
		return taken("which was made from something else")
	case max(v.mib, v.whole)*mib < c.Bytes:
		return taken(fmt.Sprintf("of %d MiB", max(v.mib, v.whole)))
	case len(c.At) > 0 && !slices.ContainsFunc(c.At, at.At.Fits):
		return taken("on datastore " + at.Datastore + ", which is elsewhere")
	}
	return nil
}

// An origin is what a claim's source comes down to.
type origin struct {
	volume, snapshot string
	mib              int64
	url              string // of the datastore, which a copy does not leave
}

// begin makes the volume, up to its origin's size.
func (d *Disks) begin(ctx context.Context, c storage.Claim, p policy) (*volume, error) {
	from, err := d.origin(ctx, c)
	if err != nil {
		return nil, err
	}
	v := &volume{name: c.Name, policy: p.Name, policyID: p.id, mib: inMiB(c.Bytes), source: c.Source, labels: c.Labels, created: now(), unused: c.Source == nil}
	v.whole = max(v.mib, from.mib)
	at, err := d.place(ctx, p, c.At, v.whole, from.url)
	if err != nil {
		return nil, fmt.Errorf("claim %s: %w", c.Name, err)
	}
	if from.volume != "" {
		v.mib = from.mib
	}
	if c.Source != nil && c.Source.VolumeID != "" {
		// The volume itself may go on meanwhile: its instant is a snapshot.
		if from.snapshot, err = d.cloneSnapshot(ctx, from.volume, c.Name, from.mib); err != nil {
			return nil, err
		}
	}
	v.from = from
	res, err := d.doOne(ctx, fmt.Sprintf("create volume %s on datastore %s", c.Name, at.name), "name/"+c.Name, v.create(d, at))
	if err != nil {
		return d.salvage(ctx, c.Name, err)
	}
	return d.elect(ctx, c.Name, res.GetCnsVolumeOperationResult().VolumeId.Id)
}

// create is CNS's call that makes the volume.
func (v *volume) create(d *Disks, at store) starter {
	spec := cnstypes.CnsVolumeCreateSpec{
		Name: v.name, VolumeType: string(cnstypes.CnsVolumeTypeBlock), Datastores: []ref{{Type: "Datastore", Value: at.id}}, Metadata: d.metadata(v),
		BackingObjectDetails: &cnstypes.CnsBlockBackingDetails{CnsBackingObjectDetails: cnstypes.CnsBackingObjectDetails{CapacityInMb: v.mib}},
		Profile:              []types.BaseVirtualMachineProfileSpec{&types.VirtualMachineDefinedProfileSpec{ProfileId: v.policyID}},
	}
	if v.from.volume != "" {
		spec.VolumeSource = &cnstypes.CnsSnapshotVolumeSource{VolumeId: cnstypes.CnsVolumeId{Id: v.from.volume}, SnapshotId: cnstypes.CnsSnapshotId{Id: v.from.snapshot}}
	}
	return func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		res, err := cnsmethods.CnsCreateVolume(ctx, rt, &cnstypes.CnsCreateVolume{This: manager, CreateSpecs: []cnstypes.CnsVolumeCreateSpec{spec}})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	}
}

// salvage looks for what a creation that failed may have made nevertheless.
func (d *Disks) salvage(ctx context.Context, name string, failed error) (*volume, error) {
	if errdefs.IsPermissionDenied(failed) || errdefs.IsResourceExhausted(failed) || errdefs.IsInvalidArgument(failed) {
		return nil, failed
	}
	d.past.lose(name)
	if ctx.Err() != nil {
		return nil, failed
	}
	if v, err := d.existing(ctx, name); err == nil && v != nil {
		return v, nil
	}
	return nil, failed
}

// elect returns the oldest volume of a name, after this call made one.
func (d *Disks) elect(ctx context.Context, name, made string) (*volume, error) {
	all, err := d.query(ctx, cnstypes.CnsQueryFilter{Names: []string{name}})
	if err != nil {
		d.past.lose(name)
		return nil, err
	}
	v, err := d.first(ctx, all, name)
	if err != nil {
		d.past.lose(name)
		return nil, err
	}
	if v == nil {
		return nil, fmt.Errorf("volume %s (%s) was made, and somebody deleted it: %w", name, made, errdefs.ErrUnavailable)
	}
	if v.id == made {
		return v, nil
	}
	for _, mine := range all {
		if mine.id == made {
			d.log.Info("another process made the volume first; the one beside it goes", "volume", name, "id", made, "first", v.id)
			if err := d.erase(ctx, mine); err != nil {
				return nil, fmt.Errorf("volume %s was made twice: %w", name, err)
			}
		}
	}
	return v, nil
}

// first is the oldest of a name by vCenter's clock, by id among equals.
func (d *Disks) first(ctx context.Context, all []*volume, name string) (*volume, error) {
	all = slices.DeleteFunc(slices.Clone(all), func(v *volume) bool { return v.name != name || v.deleted })
	if len(all) < 2 {
		return oldest(all), nil
	}
	for _, v := range all {
		info, err := d.diskInfo(ctx, v.id)
		switch {
		case notThere(err): // it goes just now
			v.deleted = true
		case err != nil:
			return nil, err
		case info.CreateTime != nil:
			v.made = *info.CreateTime
		}
	}
	return oldest(all), nil
}

// oldest of those that are there; all are sorted by id.
func oldest(all []*volume) (first *volume) {
	for _, v := range all {
		if !v.deleted && (first == nil || v.made.Before(first.made)) {
			first = v
		}
	}
	return first
}

// finish makes a volume whole that was begun: as large as its claim, and
// without what its making needed.
func (d *Disks) finish(ctx context.Context, v *volume) error {
	if v.mib < v.whole {
		if err := d.extend(ctx, v, v.whole); err != nil {
			return err
		}
	}
	if v.source != nil && v.source.VolumeID != "" {
		return d.dropCloneSnapshots(ctx, v.source.VolumeID, v.name)
	}
	return nil
}
