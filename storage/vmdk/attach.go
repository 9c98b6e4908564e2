package vmdk

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	vslmmethods "github.com/vmware/govmomi/vslm/methods"
	vslmtypes "github.com/vmware/govmomi/vslm/types"

	"github.com/openatoll/atoll/storage"
)

// Who has a volume is what vCenter says: the one virtual machine whose device
// its disk is. CNS attaches a disk to one VM at a time, and that is the fence;
// which pod VM and host it was is written beside it, for people.

// A machine is a VM that has a disk of ours.
type machine struct {
	id       ref
	name     string
	uuid     string // instance UUID
	host     string
	devices  []types.BaseVirtualDevice
	claimant storage.Holder
}

func (m *machine) refusal(v *volume) error {
	return &storage.HeldError{VolumeID: v.id, Holder: m.claimant, Detail: fmt.Sprintf("virtual machine %q, %s", m.name, m.id.Value)}
}

// associations are the VMs that have disks, by disk.
func (d *Disks) associations(ctx context.Context, volumes []*volume) (map[string]ref, error) {
	what := "ask vCenter " + d.session.Address() + " who has which disk"
	this, err := d.services.manager(ctx)
	if err != nil {
		return nil, err
	}
	has := map[string]ref{}
	for part := range slices.Chunk(volumes, batch) {
		req := &vslmtypes.VslmRetrieveVStorageObjectAssociations{This: this}
		for _, v := range part {
			req.Ids = append(req.Ids, types.ID{Id: v.id})
		}
		res, err := vslmmethods.VslmRetrieveVStorageObjectAssociations(ctx, d.services.vslm, req)
		if err != nil {
			return nil, wrap(what, err)
		}
		answered := map[string]bool{}
		for _, a := range res.Returnval {
			if a.Fault != nil {
				if err := wrap(what, localFault(a.Fault)); !notThere(err) {
					return nil, err
				}
			}
			answered[a.Id.Id] = true
			for _, vm := range a.VmDiskAssociation {
				has[a.Id.Id] = ref{Type: "VirtualMachine", Value: vm.VmId}
			}
		}
		for _, v := range part {
			if !answered[v.id] {
				return nil, fmt.Errorf("%s: it says nothing of %s: %w", what, v.id, errdefs.ErrUnavailable)
			}
		}
	}
	return has, nil
}

// machines reads VMs; one that vCenter says is gone is not among them.
func (d *Disks) machines(ctx context.Context, ids []ref) (map[ref]*machine, error) {
	want := map[ref][]string{}
	for _, id := range ids {
		want[id] = []string{"name", "config.instanceUuid", "config.hardware.device", "runtime.host"}
	}
	if len(want) == 0 {
		return nil, nil
	}
	if _, err := d.stores.list(ctx); err != nil { // and with them the hosts' names
		return nil, err
	}
	found, err := d.session.Retrieve(ctx, want)
	if err != nil {
		return nil, wrap("read the virtual machines that have disks", err)
	}
	all := map[ref]*machine{}
	for id := range want {
		props, ok := found[id]
		m := &machine{id: id}
		m.name, _ = props["name"].(string)
		m.uuid, _ = props["config.instanceUuid"].(string)
		if at, ok := props["runtime.host"].(ref); ok {
			m.host = d.stores.host(at)
		}
		if devices, ok := props["config.hardware.device"].(types.ArrayOfVirtualDevice); ok {
			m.devices = devices.VirtualDevice
		}
		if !ok || m.uuid == "" {
			there, err := d.session.Exists(ctx, id)
			if err != nil {
				return nil, wrap("look at virtual machine "+id.Value+", which has a disk", err)
			}
			if !there {
				continue
			}
		}
		all[id] = m
	}
	return all, nil
}

// holderOf is the VM that has a volume; nil: none.
func (d *Disks) holderOf(ctx context.Context, v *volume) (*machine, error) {
	has, err := d.associations(ctx, []*volume{v})
	if err != nil {
		return nil, err
	}
	id, ok := has[v.id]
	if !ok {
		return nil, nil
	}
	all, err := d.machines(ctx, []ref{id})
	if err != nil || all[id] == nil {
		return nil, err
	}
	return d.claimed(all[id], v), nil
}

// claimed says as which pod VM a machine has a volume: the one that was written
// down, if it is this machine.
func (d *Disks) claimed(m *machine, v *volume) *machine {
	out := *m
	for _, vm := range []string{v.lastVM(), m.uuid + "_0"} {
		if uuid, err := d.options.Instance(vm); vm != "" && err == nil && uuid == m.uuid {
			out.claimant = storage.Holder{VM: vm, Host: m.host}
			break
		}
	}
	if out.claimant.VM == "" {
		out.claimant = storage.Holder{VM: m.uuid, Host: m.host}
	}
	return &out
}

func (v *volume) lastVM() string {
	if v.holder == nil {
		return ""
	}
	return v.holder.VM
}

// disk is the device that a volume is in a VM.
func (m *machine) disk(id string) *types.VirtualDisk {
	for _, device := range m.devices {
		if disk, ok := device.(*types.VirtualDisk); ok && disk.VDiskId != nil && disk.VDiskId.Id == id {
			return disk
		}
	}
	return nil
}

// readOnly: what the guest writes goes to a file of the VM's own, which its end
// throws away; the disk itself is not opened for writing.
const readOnly = string(types.VirtualDiskModeIndependent_nonpersistent)

func mode(ro bool) string {
	if ro {
		return readOnly
	}
	return string(types.VirtualDiskModeIndependent_persistent)
}

// backing is the file of a disk, as "[datastore] path", and how it is opened.
func (m *machine) backing(id string) (path, mode string) {
	if disk := m.disk(id); disk != nil {
		if b, ok := disk.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
			return b.FileName, b.DiskMode
		}
	}
	return "", ""
}

// Attach plugs a volume into its holder's VM.
func (d *Disks) Attach(ctx context.Context, id string, h storage.Holder, o storage.AttachOptions) (storage.Attachment, error) {
	var none storage.Attachment
	if h.VM == "" || h.Host == "" {
		return none, fmt.Errorf("attach volume %s: a holder is a pod VM and a host: %w", id, errdefs.ErrInvalidArgument)
	}
	if len(o.Key) > 0 {
		return none, fmt.Errorf("attach volume %s: it has no key of its own: %w", id, errdefs.ErrInvalidArgument)
	}
	release, err := d.hold(ctx, id)
	if err != nil {
		return none, err
	}
	defer release()
	v, err := d.whole(ctx, id)
	if err != nil {
		return none, err
	}
	uuid, err := d.options.Instance(h.VM)
	if err != nil {
		return none, fmt.Errorf("attach volume %s to %s: %w: %w", id, h, err, errdefs.ErrInvalidArgument)
	}
	has, err := d.holderOf(ctx, v)
	if err != nil {
		return none, err
	}
	if v.unused { // from now on it may hold data, whatever becomes of this call
		v.unused = false
		if err := d.update(ctx, v, d.metadata(v).EntityMetadata); err != nil {
			return none, err
		}
	}
	if has == nil {
		if has, err = d.plug(ctx, v, h, uuid, o.ReadOnly); err != nil {
			return none, err
		}
	}
	path, how := has.backing(v.id)
	switch {
	case has.uuid != uuid:
		return none, has.refusal(v)
	case (how == readOnly) != o.ReadOnly:
		return none, fmt.Errorf("volume %s is attached to %s with read-only %v: detach it first: %w", id, h, !o.ReadOnly, errdefs.ErrFailedPrecondition)
	}
	d.describe(ctx, v, h, has.name)
	return storage.Attachment{VolumeID: v.id, DiskID: storage.DiskID(v.id), Path: path, Format: storage.FormatVMDK, Bytes: v.mib * mib, ReadOnly: o.ReadOnly}, nil
}

// plug attaches a disk that nobody has, and returns who has it then.
func (d *Disks) plug(ctx context.Context, v *volume, h storage.Holder, uuid string, ro bool) (*machine, error) {
	vm, err := d.findVM(ctx, uuid)
	if err != nil {
		return nil, fmt.Errorf("attach volume %s to %s: %w", v.id, h, err)
	}
	_, attached := d.doOne(ctx, fmt.Sprintf("attach volume %s to %s", v.id, h), v.id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		spec := cnstypes.CnsVolumeAttachDetachSpec{VolumeId: cnstypes.CnsVolumeId{Id: v.id}, Vm: vm, DiskMode: mode(ro)}
		res, err := cnsmethods.CnsAttachVolume(ctx, rt, &cnstypes.CnsAttachVolume{This: manager, AttachSpecs: []cnstypes.CnsVolumeAttachDetachSpec{spec}})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if attached != nil && !inUse(attached) && !lost(attached) {
		return nil, attached
	}
	// Whatever was said: the VMs tell who has it.
	has, err := d.holderOf(ctx, v)
	switch {
	case attached != nil && (err != nil || has == nil):
		return nil, attached
	case err != nil:
		return nil, err
	case has == nil:
		return nil, fmt.Errorf("volume %s was attached to %s, and is no longer: %w", v.id, h, errdefs.ErrUnavailable)
	}
	return has, nil
}

func (d *Disks) findVM(ctx context.Context, uuid string) (ref, error) {
	if err := d.session.Login(ctx); err != nil {
		return ref{}, err
	}
	instance := true
	res, err := methods.FindByUuid(ctx, d.session, &types.FindByUuid{This: *d.session.Client().ServiceContent.SearchIndex, Uuid: uuid, VmSearch: true, InstanceUuid: &instance})
	if err != nil {
		return ref{}, wrap("find the virtual machine with instance UUID "+uuid, err)
	}
	if res.Returnval == nil {
		return ref{}, fmt.Errorf("vCenter %s shows no virtual machine with instance UUID %s: %w", d.session.Address(), uuid, errdefs.ErrUnavailable)
	}
	return *res.Returnval, nil
}

// describe tells CNS which pod has a volume. It is for people: what fails is
// logged, and done by the next Attach.
func (d *Disks) describe(ctx context.Context, v *volume, h storage.Holder, name string) {
	if v.holder != nil && *v.holder == h {
		return
	}
	entities := v.withoutPods(d.options.Cluster)
	e := entity(cnstypes.CnsKubernetesEntityTypePOD, name, v.labels[storage.LabelNamespace], d.options.Cluster, map[string]string{labelVM: h.VM, labelHost: h.Host})
	if claim := v.labels[storage.LabelPVC]; claim != "" {
		e.ReferredEntity = []cnstypes.CnsKubernetesEntityReference{{EntityType: string(cnstypes.CnsKubernetesEntityTypePVC), EntityName: claim, Namespace: e.Namespace, ClusterID: d.options.Cluster}}
	}
	if err := d.update(ctx, v, append(entities, e)); err != nil {
		d.log.Warn("vSphere is not told which pod has a volume", "volume", v.id, "vm", h.VM, "err", err)
	}
}

// withoutPods takes the pods that had a volume out of what CNS knows.
func (v *volume) withoutPods(cluster string) (all []cnstypes.BaseCnsEntityMetadata) {
	for _, p := range v.pods {
		e := entity(cnstypes.CnsKubernetesEntityTypePOD, p.name, p.namespace, cluster, nil)
		e.Delete = true
		all = append(all, e)
	}
	return all
}

// Detach unplugs a volume from its holder's VM.
func (d *Disks) Detach(ctx context.Context, id string, h storage.Holder) error {
	release, err := d.hold(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	v, err := d.byID(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	has, err := d.holderOf(ctx, v)
	if err != nil || has == nil {
		return err
	}
	if uuid, err := d.options.Instance(h.VM); err != nil || uuid != has.uuid {
		return nil
	}
	return d.unplug(ctx, v, has)
}

func (d *Disks) unplug(ctx context.Context, v *volume, m *machine) error {
	_, err := d.doOne(ctx, fmt.Sprintf("detach volume %s from virtual machine %q (%s)", v.id, m.name, m.id.Value), v.id, func(ctx context.Context, rt soap.RoundTripper) (ref, error) {
		spec := cnstypes.CnsVolumeAttachDetachSpec{VolumeId: cnstypes.CnsVolumeId{Id: v.id}, Vm: m.id}
		res, err := cnsmethods.CnsDetachVolume(ctx, rt, &cnstypes.CnsDetachVolume{This: manager, DetachSpecs: []cnstypes.CnsVolumeAttachDetachSpec{spec}})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if err != nil && !notThere(err) {
		return err
	}
	if len(v.pods) > 0 {
		if err := d.update(ctx, v, v.withoutPods(d.options.Cluster)); err != nil {
			d.log.Warn("vSphere is not told that no pod has a volume", "volume", v.id, "err", err)
		}
	}
	return nil
}

// Holders returns who has a volume.
func (d *Disks) Holders(ctx context.Context, id string) ([]storage.Holder, error) {
	v, err := d.whole(ctx, id)
	if err != nil {
		return nil, err
	}
	m, err := d.holderOf(ctx, v)
	if err != nil || m == nil {
		return nil, err
	}
	return []storage.Holder{m.claimant}, nil
}

// Fence unplugs all that a holder has, or that the VMs of a host have.
func (d *Disks) Fence(ctx context.Context, h storage.Holder) ([]string, error) {
	if h.Host == "" {
		return nil, fmt.Errorf("fence %s: a host has to be named: %w", h, errdefs.ErrInvalidArgument)
	}
	uuid := ""
	if h.VM != "" {
		var err error
		if uuid, err = d.options.Instance(h.VM); err != nil {
			return nil, fmt.Errorf("fence %s: %w: %w", h, err, errdefs.ErrInvalidArgument)
		}
	}
	volumes, err := d.query(ctx, cnstypes.CnsQueryFilter{})
	if err != nil {
		return nil, err
	}
	has, err := d.associations(ctx, volumes)
	if err != nil {
		return nil, err
	}
	var ids []ref
	for _, id := range has {
		ids = append(ids, id)
	}
	vms, err := d.machines(ctx, ids)
	if err != nil {
		return nil, err
	}
	var freed []string
	var errs []error
	for _, v := range volumes {
		m := vms[has[v.id]]
		// A VM is its UUID, wherever vSphere has moved it.
		if m == nil || uuid == "" && m.host != h.Host || uuid != "" && m.uuid != uuid {
			continue
		}
		if err := d.fenceOne(ctx, v.id, m); err != nil {
			errs = append(errs, err)
			continue
		}
		freed = append(freed, v.id)
	}
	return freed, errors.Join(errs...)
}

// fenceOne unplugs a volume if the VM still has it.
func (d *Disks) fenceOne(ctx context.Context, id string, m *machine) error {
	release, err := d.hold(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	v, err := d.byID(ctx, id)
	if err != nil {
		return err
	}
	return d.unplug(ctx, v, m)
}
