package vcsim

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	vslmmethods "github.com/vmware/govmomi/vslm/methods"
	vslmtypes "github.com/vmware/govmomi/vslm/types"
)

// First Class Disks by the VStorageObjectManager, which wants to be told the
// datastore, and by the VslmVStorageObjectManager, which looks it up. A vCenter
// gives both the same work, so both are here.

// diskMethods are those of the two managers, and of virtual machines.
func diskMethods() map[string]method {
	task := func(needs func(*call) []demand, do func(*call) (types.AnyType, types.BaseMethodFault)) method {
		return method{needs: needs, do: func(c *call) soap.HasFault {
			return c.work(func() (types.AnyType, types.BaseMethodFault) { return do(c) })
		}}
	}
	files, attach := onDatastore("Datastore.FileManagement"), diskVMNeeds("VirtualMachine.Config.AddExistingDisk")
	all := map[string]method{
		"CreateDisk_Task":                        task(files, (*call).fcdCreate),
		"DeleteVStorageObject_Task":              task(files, (*call).fcdDelete),
		"ExtendDisk_Task":                        task(files, (*call).fcdExtend),
		"CloneVStorageObject_Task":               task(files, (*call).fcdClone),
		"VStorageObjectCreateSnapshot_Task":      task(files, (*call).fcdSnapshot),
		"DeleteSnapshot_Task":                    task(files, (*call).fcdDeleteSnapshot),
		"CreateDiskFromSnapshot_Task":            task(files, (*call).fcdFromSnapshot),
		"ListVStorageObject":                     {needs: onDatastore(privRead), do: (*call).fcdList},
		"RetrieveVStorageObject":                 {needs: onDatastore(privRead), do: (*call).fcdRetrieve},
		"RetrieveSnapshotInfo":                   {needs: onDatastore(privRead), do: (*call).fcdSnapshots},
		"AttachDisk_Task":                        task(attach, (*call).fcdAttach),
		"DetachDisk_Task":                        task(diskVMNeeds("VirtualMachine.Config.RemoveDisk"), (*call).fcdDetach),
		"ReconfigVM_Task":                        {needs: reconfigNeeds, do: (*call).reconfigure},
		"RetrieveContent":                        {anyone: true, do: (*call).vslmContent},
		"VslmCreateDisk_Task":                    task(files, (*call).fcdCreate),
		"VslmDeleteVStorageObject_Task":          task(files, (*call).fcdDelete),
		"VslmExtendDisk_Task":                    task(files, (*call).fcdExtend),
		"VslmCloneVStorageObject_Task":           task(files, (*call).fcdClone),
		"VslmCreateSnapshot_Task":                task(files, (*call).fcdSnapshot),
		"VslmDeleteSnapshot_Task":                task(files, (*call).fcdDeleteSnapshot),
		"VslmCreateDiskFromSnapshot_Task":        task(files, (*call).fcdFromSnapshot),
		"VslmAttachDisk_Task":                    task(attach, (*call).fcdAttach),
		"VslmListVStorageObjectForSpec":          {do: (*call).fcdList},
		"VslmRetrieveVStorageObject":             {needs: onDatastore(privRead), do: (*call).fcdRetrieve},
		"VslmRetrieveVStorageObjects":            {do: (*call).fcdResults},
		"VslmRetrieveSnapshotInfo":               {needs: onDatastore(privRead), do: (*call).fcdSnapshots},
		"VslmRetrieveVStorageObjectMetadata":     {needs: onDatastore(privRead), do: (*call).fcdMetadata},
		"VslmRetrieveVStorageObjectAssociations": {do: (*call).fcdAssociations},
		"VslmQueryInfo":                          {do: (*call).vslmTaskInfo},
		"VslmQueryTaskResult":                    {do: (*call).vslmTaskResult},
	}
	return all
}

// A diskCall is what calls of the two managers have in common.
type diskCall struct {
	id, snapshot, text, name string
	mib                      int64
	spec                     *types.VslmCreateSpec
	clone                    *types.VslmCloneSpec
	profile                  []types.BaseVirtualMachineProfileSpec
	vm                       types.ManagedObjectReference
	datastore                types.ManagedObjectReference // empty where it is looked up
}

func (c *call) disk() (d diskCall) {
	switch r := c.body.(type) {
	case *types.CreateDisk_Task:
		d.spec = &r.Spec
	case *vslmtypes.VslmCreateDisk_Task:
		d.spec = &r.Spec
	case *types.DeleteVStorageObject_Task:
		d.id, d.datastore = r.Id.Id, r.Datastore
	case *vslmtypes.VslmDeleteVStorageObject_Task:
		d.id = r.Id.Id
	case *types.ExtendDisk_Task:
		d.id, d.datastore, d.mib = r.Id.Id, r.Datastore, r.NewCapacityInMB
	case *vslmtypes.VslmExtendDisk_Task:
		d.id, d.mib = r.Id.Id, r.NewCapacityInMB
	case *types.CloneVStorageObject_Task:
		d.id, d.datastore, d.clone = r.Id.Id, r.Datastore, &r.Spec
	case *vslmtypes.VslmCloneVStorageObject_Task:
		d.id, d.clone = r.Id.Id, &r.Spec
	case *types.VStorageObjectCreateSnapshot_Task:
		d.id, d.datastore, d.text = r.Id.Id, r.Datastore, r.Description
	case *vslmtypes.VslmCreateSnapshot_Task:
		d.id, d.text = r.Id.Id, r.Description
	case *types.DeleteSnapshot_Task:
		d.id, d.datastore, d.snapshot = r.Id.Id, r.Datastore, r.SnapshotId.Id
	case *vslmtypes.VslmDeleteSnapshot_Task:
		d.id, d.snapshot = r.Id.Id, r.SnapshotId.Id
	case *types.CreateDiskFromSnapshot_Task:
		d.id, d.datastore, d.snapshot, d.name, d.profile = r.Id.Id, r.Datastore, r.SnapshotId.Id, r.Name, r.Profile
	case *vslmtypes.VslmCreateDiskFromSnapshot_Task:
		d.id, d.snapshot, d.name, d.profile = r.Id.Id, r.SnapshotId.Id, r.Name, nil
		// VSLM's type of a profile has no id: the source's policy stays.
	case *types.ListVStorageObject:
		d.datastore = r.Datastore
	case *types.RetrieveVStorageObject:
		d.id, d.datastore = r.Id.Id, r.Datastore
	case *vslmtypes.VslmRetrieveVStorageObject:
		d.id = r.Id.Id
	case *types.RetrieveSnapshotInfo:
		d.id, d.datastore = r.Id.Id, r.Datastore
	case *vslmtypes.VslmRetrieveSnapshotInfo:
		d.id = r.Id.Id
	case *vslmtypes.VslmRetrieveVStorageObjectMetadata:
		d.id, d.text = r.Id.Id, r.Prefix
	case *types.AttachDisk_Task:
		d.id, d.datastore, d.vm = r.DiskId.Id, r.Datastore, c.this
	case *vslmtypes.VslmAttachDisk_Task:
		d.id, d.vm = r.Id.Id, r.Vm
	case *types.DetachDisk_Task:
		d.id, d.vm = r.DiskId.Id, c.this
	}
	return d
}

// wanted is the disk that a call is about: where it names a datastore, there.
func (c *call) wanted(d diskCall) (*diskRecord, types.BaseMethodFault) {
	have, fault := c.s.disk(d.id)
	if fault == nil && d.datastore.Value != "" && c.s.inventory.stores[have.Datastore] != d.datastore {
		return nil, noDisk(d.id)
	}
	return have, fault
}

// onDatastore is for what is done on the datastore of a disk.
func onDatastore(privilege string) func(*call) []demand {
	return func(c *call) []demand {
		d := c.disk()
		on := d.datastore
		if d.spec != nil && d.spec.BackingSpec != nil {
			on = d.spec.BackingSpec.GetVslmCreateSpecBackingSpec().Datastore
		}
		return []demand{{privilege, c.s.storeOf(d.id, on)}}
	}
}

// storeOf is a disk's datastore; of a disk that is not there what was named, or
// the root.
func (s *Server) storeOf(id string, named types.ManagedObjectReference) types.ManagedObjectReference {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d, ok := s.disks[id]; ok {
		return s.inventory.stores[d.Datastore]
	}
	if named.Value != "" {
		return named
	}
	return s.root
}

func diskVMNeeds(privilege string) func(*call) []demand {
	return func(c *call) []demand { return []demand{{privilege, c.disk().vm}} }
}

func (c *call) fcdCreate() (types.AnyType, types.BaseMethodFault) {
	spec := c.disk().spec
	backing, ok := spec.BackingSpec.(*types.VslmCreateSpecDiskFileBackingSpec)
	if !ok {
		return nil, &types.InvalidArgument{RuntimeFault: reason("a disk is backed by a file"), InvalidProperty: "spec.backingSpec"}
	}
	n := newDisk{
		name: spec.Name, mib: spec.CapacityInMB, datastores: []types.ManagedObjectReference{backing.Datastore}, policy: profileOf(spec.Profile),
		thick:  backing.ProvisioningType != "" && backing.ProvisioningType != string(types.BaseConfigInfoDiskFileBackingInfoProvisioningTypeThin),
		withVM: spec.KeepAfterDeleteVm != nil && !*spec.KeepAfterDeleteVm, metadata: pairs(spec.Metadata),
	}
	d, fault := c.s.createDisk(n)
	if fault != nil {
		return nil, fault
	}
	return c.s.storageObject(d), nil
}

func pairs(list []types.KeyValue) map[string]string {
	if len(list) == 0 {
		return nil
	}
	m := make(map[string]string, len(list))
	for _, kv := range list {
		m[kv.Key] = kv.Value
	}
	return m
}

func listed(m map[string]string) (list []types.KeyValue) {
	for _, k := range sortedKeys(m) {
		list = append(list, types.KeyValue{Key: k, Value: m[k]})
	}
	return list
}

func (c *call) fcdDelete() (types.AnyType, types.BaseMethodFault) {
	d, fault := c.wanted(c.disk())
	if fault != nil {
		return nil, fault
	}
	return nil, c.s.deleteDisk(d.ID)
}

func (c *call) fcdExtend() (types.AnyType, types.BaseMethodFault) {
	r := c.disk()
	d, fault := c.wanted(r)
	if fault != nil {
		return nil, fault
	}
	return nil, c.s.extendDisk(d.ID, r.mib)
}

func (c *call) fcdClone() (types.AnyType, types.BaseMethodFault) {
	r := c.disk()
	d, fault := c.wanted(r)
	switch {
	case fault != nil:
		return nil, fault
	case d.At != nil:
		return nil, &types.ResourceInUse{Type: "disk", Name: d.ID}
	}
	file, size, _ := c.s.sourceOf(d.ID, "")
	to := c.s.inventory.stores[d.Datastore]
	if r.clone.BackingSpec != nil {
		to = r.clone.BackingSpec.GetVslmCreateSpecBackingSpec().Datastore
	}
	made, fault := c.s.createDisk(newDisk{name: r.clone.Name, mib: size, datastores: []types.ManagedObjectReference{to}, policy: profileOf(r.clone.Profile), metadata: pairs(r.clone.Metadata), from: file})
	if fault != nil {
		return nil, fault
	}
	return c.s.storageObject(made), nil
}

func (c *call) fcdSnapshot() (types.AnyType, types.BaseMethodFault) {
	r := c.disk()
	d, fault := c.wanted(r)
	if fault != nil {
		return nil, fault
	}
	snap, fault := c.s.snapshotDisk(d.ID, r.text)
	if fault != nil {
		return nil, fault
	}
	return types.ID{Id: snap.ID}, nil
}

func (c *call) fcdDeleteSnapshot() (types.AnyType, types.BaseMethodFault) {
	r := c.disk()
	d, fault := c.wanted(r)
	if fault != nil {
		return nil, fault
	}
	return nil, c.s.deleteSnapshot(d.ID, r.snapshot)
}

func (c *call) fcdFromSnapshot() (types.AnyType, types.BaseMethodFault) {
	r := c.disk()
	d, fault := c.wanted(r)
	if fault != nil {
		return nil, fault
	}
	file, size, fault := c.s.sourceOf(d.ID, r.snapshot)
	if fault != nil {
		return nil, fault
	}
	made, fault := c.s.createDisk(newDisk{name: r.name, mib: size, datastores: []types.ManagedObjectReference{c.s.inventory.stores[d.Datastore]}, policy: profileOf(r.profile), from: file})
	if fault != nil {
		return nil, fault
	}
	return c.s.storageObject(made), nil
}

func (c *call) fcdAttach() (types.AnyType, types.BaseMethodFault) {
	r := c.disk()
	d, fault := c.wanted(r)
	if fault == nil {
		_, fault = c.s.attachDisk(d.ID, r.vm, "")
	}
	return nil, fault
}

func (c *call) fcdDetach() (types.AnyType, types.BaseMethodFault) {
	r := c.disk()
	return nil, c.s.detachDisk(r.id, r.vm)
}

// storageObject is a disk as vSphere describes it.
func (s *Server) storageObject(d *diskRecord) types.VStorageObject {
	kind := types.BaseConfigInfoDiskFileBackingInfoProvisioningTypeThin
	if d.Thick {
		kind = types.BaseConfigInfoDiskFileBackingInfoProvisioningTypeLazyZeroedThick
	}
	backing := &types.BaseConfigInfoDiskFileBackingInfo{ProvisioningType: string(kind)}
	backing.Datastore, backing.FilePath, backing.BackingObjectId = s.inventory.stores[d.Datastore], d.path(), d.Object
	o := types.VStorageObject{Config: types.VStorageObjectConfigInfo{CapacityInMB: d.MiB, ConsumptionType: []string{"disk"}}}
	o.Config.BaseConfigInfo = types.BaseConfigInfo{
		Id: types.ID{Id: d.ID}, Name: d.Name, CreateTime: d.Created, KeepAfterDeleteVm: types.NewBool(!d.WithVM),
		RelocationDisabled: types.NewBool(false), NativeSnapshotSupported: types.NewBool(false), ChangedBlockTrackingEnabled: types.NewBool(false),
		Backing: backing, Metadata: listed(d.Metadata),
	}
	if d.At != nil {
		o.Config.ConsumerId = []types.ID{{Id: d.At.VM}}
	}
	return o
}

// seenDisks are those that match, on datastores that the caller may read, by
// id; nil matches all.
func (c *call) seenDisks(match func(*diskRecord) bool) (all []*diskRecord) {
	may := map[string]bool{}
	for name, ref := range c.s.inventory.stores {
		may[name] = c.s.has(c.who, privRead, ref)
	}
	for _, d := range c.s.disks {
		if may[d.Datastore] && (match == nil || match(d)) {
			all = append(all, d)
		}
	}
	slices.SortFunc(all, func(a, b *diskRecord) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

func (c *call) fcdList() soap.HasFault {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if r, ok := c.body.(*types.ListVStorageObject); ok {
		res := &types.ListVStorageObjectResponse{}
		for _, d := range c.seenDisks(nil) {
			if c.s.inventory.stores[d.Datastore] == r.Datastore {
				res.Returnval = append(res.Returnval, types.ID{Id: d.ID})
			}
		}
		return &methods.ListVStorageObjectBody{Res: res}
	}
	r := c.body.(*vslmtypes.VslmListVStorageObjectForSpec)
	res := &vslmtypes.VslmVsoVStorageObjectQueryResult{AllRecordsReturned: true}
	for _, d := range c.seenDisks(nil) {
		match, fault := c.s.matchesAll(d, r.Query)
		if fault != nil {
			return refuse(fault)
		}
		if !match {
			continue
		}
		if r.MaxResult > 0 && len(res.Id) == int(r.MaxResult) {
			res.AllRecordsReturned = false
			break
		}
		res.Id = append(res.Id, types.ID{Id: d.ID})
		created := d.Created
		res.QueryResults = append(res.QueryResults, vslmtypes.VslmVsoVStorageObjectResult{Id: types.ID{Id: d.ID}, Name: d.Name, CapacityInMB: d.MiB, CreateTime: &created, Metadata: listed(d.Metadata)})
	}
	return &vslmmethods.VslmListVStorageObjectForSpecBody{Res: &vslmtypes.VslmListVStorageObjectForSpecResponse{Returnval: res}}
}

func (s *Server) matchesAll(d *diskRecord, query []vslmtypes.VslmVsoVStorageObjectQuerySpec) (bool, types.BaseMethodFault) {
	for _, q := range query {
		if len(q.QueryValue) != 1 { // as a vCenter has it
			return false, &types.InvalidArgument{InvalidProperty: "values"}
		}
		match, ok := s.matches(d, q.QueryField, q.QueryOperator, q.QueryValue[0])
		if !ok {
			return false, &types.InvalidArgument{RuntimeFault: reason("no disk can be asked for by " + q.QueryField + " " + q.QueryOperator), InvalidProperty: "query"}
		}
		if !match {
			return false, nil
		}
	}
	return true, nil
}

func (s *Server) matches(d *diskRecord, field, operator, value string) (match, ok bool) {
	switch field {
	case "id":
		return compared(operator, cmp.Compare(d.ID, value), d.ID, value)
	case "name":
		return compared(operator, cmp.Compare(d.Name, value), d.Name, value)
	case "capacity":
		n, err := strconv.ParseInt(value, 10, 64)
		match, ok := compared(operator, cmp.Compare(d.MiB, n), "", value)
		return match, ok && err == nil
	case "createTime":
		at, err := time.Parse(time.RFC3339Nano, value)
		match, ok := compared(operator, d.Created.Compare(at), "", value)
		return match, ok && err == nil
	case "datastoreMoId":
		at := s.inventory.stores[d.Datastore].Value
		return compared(operator, cmp.Compare(at, value), at, value)
	case "metadataKey", "metadataValue":
		for k, v := range d.Metadata {
			text := k
			if field == "metadataValue" {
				text = v
			}
			if match, ok := compared(operator, cmp.Compare(text, value), text, value); match || !ok {
				return match, ok
			}
		}
		return false, true
	}
	return false, false
}

func compared(operator string, order int, text, value string) (match, ok bool) {
	switch operator {
	case "equals":
		return order == 0, true
	case "notEquals":
		return order != 0, true
	case "lessThan":
		return order < 0, true
	case "greaterThan":
		return order > 0, true
	case "lessThanOrEqual":
		return order <= 0, true
	case "greaterThanOrEqual":
		return order >= 0, true
	case "contains":
		return strings.Contains(text, value), true
	case "startsWith":
		return strings.HasPrefix(text, value), true
	case "endsWith":
		return strings.HasSuffix(text, value), true
	}
	return false, false
}

func (c *call) fcdRetrieve() soap.HasFault {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	d, fault := c.wanted(c.disk())
	if fault != nil {
		return refuse(fault)
	}
	if _, ok := c.body.(*types.RetrieveVStorageObject); ok {
		return &methods.RetrieveVStorageObjectBody{Res: &types.RetrieveVStorageObjectResponse{Returnval: c.s.storageObject(d)}}
	}
	return &vslmmethods.VslmRetrieveVStorageObjectBody{Res: &vslmtypes.VslmRetrieveVStorageObjectResponse{Returnval: c.s.storageObject(d)}}
}

func (c *call) fcdSnapshots() soap.HasFault {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	d, fault := c.wanted(c.disk())
	if fault != nil {
		return refuse(fault)
	}
	var info types.VStorageObjectSnapshotInfo
	for _, s := range d.Snapshots {
		info.Snapshots = append(info.Snapshots, types.VStorageObjectSnapshotInfoVStorageObjectSnapshot{Id: &types.ID{Id: s.ID}, BackingObjectId: s.Object, CreateTime: s.Created, Description: s.Text})
	}
	if _, ok := c.body.(*types.RetrieveSnapshotInfo); ok {
		return &methods.RetrieveSnapshotInfoBody{Res: &types.RetrieveSnapshotInfoResponse{Returnval: info}}
	}
	return &vslmmethods.VslmRetrieveSnapshotInfoBody{Res: &vslmtypes.VslmRetrieveSnapshotInfoResponse{Returnval: info}}
}

// fcdResults are disks with what they take.
func (c *call) fcdResults() soap.HasFault {
	r := c.body.(*vslmtypes.VslmRetrieveVStorageObjects)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	res := &vslmtypes.VslmRetrieveVStorageObjectsResponse{}
	for _, id := range r.Ids {
		o := vslmtypes.VslmVsoVStorageObjectResult{Id: id}
		d, fault := c.s.disk(id.Id)
		if fault == nil && !c.s.has(c.who, privRead, c.s.inventory.stores[d.Datastore]) {
			fault = noPermission(demand{privRead, c.s.inventory.stores[d.Datastore]})
		}
		if fault != nil {
			o.Error = localized(fault)
		} else {
			o.Name, o.CapacityInMB, o.CreateTime, o.DiskPath = d.Name, d.MiB, &d.Created, d.path()
			o.UsedCapacityInMB = (c.s.files().taken(d) + mib - 1) / mib
			o.Metadata = listed(d.Metadata)
		}
		res.Returnval = append(res.Returnval, o)
	}
	return &vslmmethods.VslmRetrieveVStorageObjectsBody{Res: res}
}

func (c *call) fcdMetadata() soap.HasFault {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	r := c.disk()
	d, fault := c.wanted(r)
	if fault != nil {
		return refuse(fault)
	}
	res := &vslmtypes.VslmRetrieveVStorageObjectMetadataResponse{}
	for _, kv := range listed(d.Metadata) {
		if strings.HasPrefix(kv.Key, r.text) {
			res.Returnval = append(res.Returnval, kv)
		}
	}
	return &vslmmethods.VslmRetrieveVStorageObjectMetadataBody{Res: res}
}

func (c *call) fcdAssociations() soap.HasFault {
	r := c.body.(*vslmtypes.VslmRetrieveVStorageObjectAssociations)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	res := &vslmtypes.VslmRetrieveVStorageObjectAssociationsResponse{}
	for _, id := range r.Ids {
		a := vslmtypes.VslmVsoVStorageObjectAssociations{Id: id}
		d, fault := c.s.disk(id.Id)
		if fault == nil && !c.s.has(c.who, privRead, c.s.inventory.stores[d.Datastore]) {
			fault = noPermission(demand{privRead, c.s.inventory.stores[d.Datastore]})
		}
		if fault != nil {
			a.Fault = localized(fault)
		} else if at := d.At; at != nil {
			a.VmDiskAssociation = []vslmtypes.VslmVsoVStorageObjectAssociationsVmDiskAssociation{{VmId: at.VM, DiskKey: at.Key}}
		}
		res.Returnval = append(res.Returnval, a)
	}
	return &vslmmethods.VslmRetrieveVStorageObjectAssociationsBody{Res: res}
}
