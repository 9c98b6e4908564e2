package vcsim

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// First Class Disks. One catalogue is behind the three services that show it:
// the VStorageObjectManager of /sdk, that of /vslm/sdk, and CNS of /vsanHealth.
// A disk is a descriptor and a sparse file in its datastore's directory; one
// that is attached is a device of its VM. The server's mu guards all of it.

const (
	// maxDiskMiB is vSphere's largest virtual disk, 62 TiB (vSphere
	// Configuration Maximums).
	maxDiskMiB = 62 << 20
	// maxSnapshots of one disk (the same).
	maxSnapshots = 32
	// A VM takes so many disks on each of so many paravirtual controllers.
	disksPerController, controllers = 15, 4
	controllerKey                   = 1000
	diskKey                         = 2000
)

// A diskRecord is a First Class Disk as it is kept.
type diskRecord struct {
	ID        string            `json:"-"`
	Name      string            `json:"name"`
	MiB       int64             `json:"mib"`
	Datastore string            `json:"datastore"` // by name
	Thick     bool              `json:"thick,omitempty"`
	Policy    string            `json:"policy,omitempty"` // by id
	UUID      string            `json:"uuid"`             // that the guest sees
	Object    string            `json:"object"`
	Created   time.Time         `json:"created"`
	WithVM    bool              `json:"withVM,omitempty"` // goes when its VM goes
	Metadata  map[string]string `json:"metadata,omitempty"`
	Volume    *volumeRecord     `json:"volume,omitempty"` // CNS knows it
	Snapshots []snapshotRecord  `json:"snapshots,omitempty"`
	At        *attachment       `json:"at,omitempty"`
}

type snapshotRecord struct {
	ID      string    `json:"id"`
	Text    string    `json:"text"`
	MiB     int64     `json:"mib"`
	Object  string    `json:"object"`
	Created time.Time `json:"created"`
}

// An attachment is where a disk is plugged.
type attachment struct {
	VM         string `json:"vm"` // managed object id
	Controller int32  `json:"controller"`
	Unit       int32  `json:"unit"`
	Key        int32  `json:"key"`
	Mode       string `json:"mode"`
}

func (d *diskRecord) path() string { return fmt.Sprintf("[%s] fcd/%s.vmdk", d.Datastore, d.ID) }

func (d *diskRecord) snapshot(id string) int {
	return slices.IndexFunc(d.Snapshots, func(s snapshotRecord) bool { return s.ID == id })
}

// loadDisks reads the catalogue.
func (s *Server) loadDisks() error {
	s.disks, s.usage, s.used = map[string]*diskRecord{}, map[string]usage{}, map[string]usage{}
	for _, key := range sortedKeys(s.store.live) {
		id, ok := strings.CutPrefix(key, "disk/")
		if !ok {
			continue
		}
		d := &diskRecord{}
		if _, err := s.kept(key, d); err != nil {
			return err
		}
		d.ID = id
		s.disks[id] = d
		s.countDisk(d)
	}
	return nil
}

// keepDisk writes a disk down, or forgets one that is gone, and counts anew
// what its datastore has left.
func (s *Server) keepDisk(d *diskRecord) types.BaseMethodFault {
	var v any
	if s.disks[d.ID] == d {
		v = d
	}
	if err := s.store.put(map[string]any{"disk/" + d.ID: v}); err != nil {
		s.log.Error("a disk could not be kept", "disk", d.ID, "err", err)
		return brokenFault(err)
	}
	s.countDisk(d)
	return nil
}

func noDisk(id string) types.BaseMethodFault {
	return &types.NotFound{VimFault: vimReason("there is no disk " + id)}
}

func (s *Server) disk(id string) (*diskRecord, types.BaseMethodFault) {
	d, ok := s.disks[id]
	if !ok {
		return nil, noDisk(id)
	}
	return d, nil
}

// datastoreName of a reference.
func (s *Server) datastoreName(ref types.ManagedObjectReference) (string, bool) {
	for name, at := range s.inventory.stores {
		if at == ref {
			return name, true
		}
	}
	return "", false
}

// A newDisk is what a disk is made from.
type newDisk struct {
	name       string
	mib        int64
	datastores []types.ManagedObjectReference // the first with room
	thick      bool
	withVM     bool
	policy     string
	metadata   map[string]string
	volume     *volumeRecord
	from       string // file in a datastore whose bytes it has; empty: zeroes
}

// profileOf is the storage policy in a spec.
func profileOf(profiles []types.BaseVirtualMachineProfileSpec) string {
	for _, p := range profiles {
		if defined, ok := p.(*types.VirtualMachineDefinedProfileSpec); ok {
			return defined.ProfileId
		}
	}
	return ""
}

// placeDisk picks the datastore.
func (s *Server) placeDisk(n newDisk) (string, types.BaseMethodFault) {
	if n.policy != "" {
		if p, ok := s.policies[n.policy]; !ok || p.Gone {
			return "", &types.InvalidArgument{RuntimeFault: reason("there is no storage policy " + n.policy), InvalidProperty: "profile"}
		}
	}
	if len(n.datastores) == 0 {
		for _, name := range sortedKeys(s.inventory.stores) {
			n.datastores = append(n.datastores, s.inventory.stores[name])
		}
	}
	full := ""
	for _, ref := range n.datastores {
		name, ok := s.datastoreName(ref)
		if !ok {
			return "", &types.ManagedObjectNotFound{Obj: ref}
		}
		if n.policy != "" && !s.fitsPolicy(n.policy, ref) {
			continue
		}
		if s.freeOf(name) >= n.mib*mib {
			return name, nil
		}
		full = name
	}
	if full == "" {
		return "", &types.InvalidArgument{RuntimeFault: reason("no datastore that was named is compatible with the storage policy"), InvalidProperty: "profile"}
	}
	return "", &types.NoDiskSpace{FileFault: types.FileFault{VimFault: vimReason(fmt.Sprintf("datastore %s has no room for %d MiB", full, n.mib))}, Datastore: full}
}

func (s *Server) createDisk(n newDisk) (*diskRecord, types.BaseMethodFault) {
	switch {
	case n.name == "" || len(n.name) > 255:
		return nil, &types.InvalidArgument{RuntimeFault: reason("a disk has a name of 1 to 255 characters"), InvalidProperty: "spec.name"}
	case n.mib < 1 || n.mib > maxDiskMiB:
		return nil, &types.InvalidArgument{RuntimeFault: reason("a disk has 1 MiB to 62 TiB"), InvalidProperty: "spec.capacityInMB"}
	}
	name, fault := s.placeDisk(n)
	if fault != nil {
		return nil, fault
	}
	id := uuid.NewString()
	d := &diskRecord{
		ID: id, Name: n.name, MiB: n.mib, Datastore: name, Thick: n.thick, Policy: n.policy, WithVM: n.withVM,
		UUID: "6000c29" + uuid.NewString()[7:], Object: uuid.NewString(), Created: time.Now().UTC(), Metadata: n.metadata, Volume: n.volume,
	}
	if err := s.files().create(d, n.from); err != nil {
		s.files().remove(d)
		return nil, fileFault(err, name)
	}
	s.disks[id] = d
	return d, s.keepDisk(d)
}

func (s *Server) deleteDisk(id string) types.BaseMethodFault {
	d, fault := s.disk(id)
	switch {
	case fault != nil:
		return fault
	case d.At != nil:
		return &types.ResourceInUse{VimFault: vimReason("disk " + id + " is attached to " + s.vmName(d.At.VM)), Type: "disk", Name: id}
	case len(d.Snapshots) > 0:
		return &types.InvalidState{VimFault: vimReason("disk " + id + " has snapshots")}
	}
	delete(s.disks, id)
	if fault := s.keepDisk(d); fault != nil {
		return fault
	}
	s.files().remove(d)
	s.showDatastore(d.Datastore)
	return nil
}

func (s *Server) extendDisk(id string, to int64) types.BaseMethodFault {
	d, fault := s.disk(id)
	switch {
	case fault != nil:
		return fault
	case to < d.MiB || to > maxDiskMiB:
		return &types.InvalidArgument{RuntimeFault: reason(fmt.Sprintf("disk %s has %d MiB and only grows, to 62 TiB at most", id, d.MiB)), InvalidProperty: "newCapacityInMB"}
	case len(d.Snapshots) > 0:
		return &types.InvalidState{VimFault: vimReason("disk " + id + " has snapshots and cannot be extended")}
	case s.freeOf(d.Datastore) < (to-d.MiB)*mib:
		return &types.NoDiskSpace{Datastore: d.Datastore}
	}
	if err := s.files().extend(d, to); err != nil {
		return fileFault(err, d.Datastore)
	}
	d.MiB = to
	s.showDevices(d.At)
	return s.keepDisk(d)
}

func (s *Server) snapshotDisk(id, text string) (snapshotRecord, types.BaseMethodFault) {
	d, fault := s.disk(id)
	switch {
	case fault != nil:
		return snapshotRecord{}, fault
	case len(d.Snapshots) >= maxSnapshots:
		return snapshotRecord{}, &types.InvalidState{VimFault: vimReason(fmt.Sprintf("disk %s has %d snapshots already", id, maxSnapshots))}
	}
	snap := snapshotRecord{ID: uuid.NewString(), Text: text, MiB: d.MiB, Object: uuid.NewString(), Created: time.Now().UTC()}
	if err := s.files().snapshot(d, snap.ID); err != nil {
		return snap, fileFault(err, d.Datastore)
	}
	d.Snapshots = append(d.Snapshots, snap)
	return snap, s.keepDisk(d)
}

func (s *Server) deleteSnapshot(id, snap string) types.BaseMethodFault {
	d, fault := s.disk(id)
	if fault != nil {
		return fault
	}
	i := d.snapshot(snap)
	if i < 0 {
		return &types.NotFound{VimFault: vimReason("disk " + id + " has no snapshot " + snap)}
	}
	d.Snapshots = slices.Delete(d.Snapshots, i, i+1)
	if fault := s.keepDisk(d); fault != nil {
		return fault
	}
	s.files().removeSnapshot(d, snap)
	s.countDisk(d)
	return nil
}

// sourceOf is the file that a copy of a disk, or of its snapshot, is made from.
func (s *Server) sourceOf(id, snap string) (file string, size int64, fault types.BaseMethodFault) {
	d, fault := s.disk(id)
	if fault != nil {
		return "", 0, fault
	}
	if snap == "" {
		return s.files().flat(d), d.MiB, nil
	}
	i := d.snapshot(snap)
	if i < 0 {
		return "", 0, &types.NotFound{VimFault: vimReason("disk " + id + " has no snapshot " + snap)}
	}
	return s.files().snapshotFile(d, snap), d.Snapshots[i].MiB, nil
}

func (s *Server) vmName(vm string) string {
	if name := s.nameOf(types.ManagedObjectReference{Type: "VirtualMachine", Value: vm}); name != "" {
		return name + " (" + vm + ")"
	}
	return vm
}

// attachDisk plugs a disk into a VM: it is then one of its devices.
func (s *Server) attachDisk(id string, vm types.ManagedObjectReference, mode string) (*diskRecord, types.BaseMethodFault) {
	d, fault := s.disk(id)
	if fault != nil {
		return nil, fault
	}
	if _, ok := s.vim.Get(vm).(*simulator.VirtualMachine); !ok {
		return nil, &types.ManagedObjectNotFound{Obj: vm}
	}
	if d.At != nil {
		return nil, &types.ResourceInUse{VimFault: vimReason("disk " + id + " is attached to " + s.vmName(d.At.VM)), Type: "disk", Name: id}
	}
	switch mode {
	case "":
		mode = string(types.VirtualDiskModePersistent)
	case string(types.VirtualDiskModePersistent), string(types.VirtualDiskModeIndependent_persistent), string(types.VirtualDiskModeIndependent_nonpersistent):
	default:
		return nil, &types.InvalidArgument{RuntimeFault: reason("there is no disk mode " + mode), InvalidProperty: "diskMode"}
	}
	used := map[int32]bool{diskKey: true} // the pod's own
	for _, other := range s.disks {
		if other.At != nil && other.At.VM == vm.Value {
			used[other.At.Key] = true
		}
	}
	for n := range int32(controllers * disksPerController) {
		controller, unit := n/disksPerController, n%disksPerController
		if unit >= 7 { // the controller's own
			unit++
		}
		key := diskKey + 16*controller + unit
		if used[key] {
			continue
		}
		d.At = &attachment{VM: vm.Value, Controller: controllerKey + controller, Unit: unit, Key: key, Mode: mode}
		s.showDevices(d.At)
		return d, s.keepDisk(d)
	}
	return nil, &types.TooManyDevices{InvalidVmConfig: types.InvalidVmConfig{VmConfigFault: types.VmConfigFault{VimFault: vimReason("the virtual machine has as many disks as it can have")}}}
}

func (s *Server) detachDisk(id string, vm types.ManagedObjectReference) types.BaseMethodFault {
	d, fault := s.disk(id)
	if fault != nil {
		return fault
	}
	if d.At == nil || d.At.VM != vm.Value {
		return &types.NotFound{VimFault: vimReason("disk " + id + " is not attached to " + vm.Value)}
	}
	at := d.At
	d.At = nil
	s.showDevices(at)
	return s.keepDisk(d)
}

// releaseDisks takes disks out of a VM that goes, and removes those that were
// to go with it.
func (s *Server) releaseDisks(vm types.ManagedObjectReference) {
	for _, id := range sortedKeys(s.disks) {
		d := s.disks[id]
		if d.At == nil || d.At.VM != vm.Value {
			continue
		}
		d.At = nil
		if s.keepDisk(d) == nil && d.WithVM {
			s.deleteDisk(id)
		}
	}
}

// showDevices makes a VM's devices those that it has.
func (s *Server) showDevices(at *attachment) {
	if at == nil {
		return
	}
	ref := types.ManagedObjectReference{Type: "VirtualMachine", Value: at.VM}
	vm, ok := s.vim.Get(ref).(*simulator.VirtualMachine)
	if !ok {
		return
	}
	s.mirrors.mu.RLock()
	m := s.mirrors.specs[ref]
	s.mirrors.mu.RUnlock()
	var config types.VirtualMachineConfigInfo
	s.locked(vm, func() { config = *vm.Config })
	config.Hardware.Device = append(devices(m), s.diskDevices(ref)...)
	s.update(vm, set("config", &config))
}

// diskDevices are a VM's controllers and attached disks.
func (s *Server) diskDevices(vm types.ManagedObjectReference) (all []types.BaseVirtualDevice) {
	var disks []*diskRecord
	for _, d := range s.disks {
		if d.At != nil && d.At.VM == vm.Value {
			disks = append(disks, d)
		}
	}
	slices.SortFunc(disks, func(a, b *diskRecord) int { return int(a.At.Key - b.At.Key) })
	shown := map[int32]bool{}
	for _, d := range disks {
		if !shown[d.At.Controller] {
			shown[d.At.Controller] = true
			bus := d.At.Controller - controllerKey
			c := &types.ParaVirtualSCSIController{}
			c.Key, c.BusNumber, c.SharedBus, c.ScsiCtlrUnitNumber = d.At.Controller, bus, types.VirtualSCSISharingNoSharing, 7
			c.DeviceInfo = &types.Description{Label: fmt.Sprintf("SCSI controller %d", bus), Summary: "VMware paravirtual SCSI"}
			all = append(all, c)
		}
		all = append(all, s.diskDevice(d))
	}
	return all
}

func (s *Server) diskDevice(d *diskRecord) *types.VirtualDisk {
	ref := s.inventory.stores[d.Datastore]
	backing := &types.VirtualDiskFlatVer2BackingInfo{DiskMode: d.At.Mode, ThinProvisioned: types.NewBool(!d.Thick), Uuid: d.UUID}
	backing.FileName, backing.Datastore, backing.BackingObjectId = d.path(), &ref, &d.Object
	disk := &types.VirtualDisk{CapacityInKB: d.MiB << 10, CapacityInBytes: d.MiB * mib, VDiskId: &types.ID{Id: d.ID}}
	disk.Key, disk.ControllerKey, disk.UnitNumber, disk.Backing = d.At.Key, d.At.Controller, types.NewInt32(d.At.Unit), backing
	disk.DeviceInfo = &types.Description{Label: "Hard disk " + d.Name, Summary: fmt.Sprintf("%d KB", d.MiB<<10)}
	return disk
}
