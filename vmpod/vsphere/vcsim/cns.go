package vcsim

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vmware/govmomi/cns"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Cloud Native Storage: First Class Disks and what a cluster of containers says
// of them. Its tasks succeed where one volume's work failed; the fault is in
// the result, as in a vCenter.

// A volumeRecord is what CNS knows of a disk.
type volumeRecord struct {
	Cluster  clusterRecord  `json:"cluster"`
	Entities []entityRecord `json:"entities,omitempty"`
}

type clusterRecord struct {
	Type         string `json:"type"`
	ID           string `json:"id"`
	User         string `json:"user"`
	Flavor       string `json:"flavor,omitempty"`
	Distribution string `json:"distribution,omitempty"`
}

type entityRecord struct {
	Type      string            `json:"type"`
	Name      string            `json:"name"`
	Namespace string            `json:"namespace,omitempty"`
	Cluster   string            `json:"cluster,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"`
	Refers    []entityRecord    `json:"refers,omitempty"`
}

// maxVolumes in one answer of CnsQueryVolume, CNS's own limit.
const maxVolumes = 1000

func (s *Server) buildCNS() {
	r := simulator.NewRegistry()
	r.Namespace, r.Path, r.Handler = cns.Namespace, cns.Path, s.handle
	r.Cookie = func(ctx *simulator.Context) string {
		if v := simulator.HTTPCookie(ctx); v != "" {
			return v
		}
		return simulator.SOAPCookie(ctx)
	}
	s.svc.RegisterSDK(r)
	s.mux.HandleFunc("GET "+vim25.Path+"/vsanServiceVersions.xml", s.svc.ServiceVersionsVsan)
}

// cnsMethods need Cns.Searchable at the root beside what they do (vSphere
// Container Storage Plug-in, "vSphere Roles and Privileges").
func cnsMethods() map[string]method {
	task := func(do func(*call) (types.AnyType, types.BaseMethodFault), more func(*call) []demand) method {
		needs := func(c *call) []demand {
			demands := []demand{{"Cns.Searchable", c.s.root}}
			if more != nil {
				demands = append(demands, more(c)...)
			}
			return demands
		}
		return method{needs: needs, do: func(c *call) soap.HasFault {
			return c.work(func() (types.AnyType, types.BaseMethodFault) { return do(c) })
		}}
	}
	return map[string]method{
		"CnsCreateVolume":         task((*call).cnsCreate, cnsFiles),
		"CnsDeleteVolume":         task((*call).cnsDelete, cnsFiles),
		"CnsExtendVolume":         task((*call).cnsExtend, cnsFiles),
		"CnsUpdateVolumeMetadata": task((*call).cnsUpdate, nil),
		"CnsAttachVolume":         task((*call).cnsAttach, cnsVM("VirtualMachine.Config.AddExistingDisk", "VirtualMachine.Config.AddRemoveDevice")),
		"CnsDetachVolume":         task((*call).cnsDetach, cnsVM("VirtualMachine.Config.AddRemoveDevice")),
		"CnsCreateSnapshots":      task((*call).cnsSnapshot, cnsFiles),
		"CnsDeleteSnapshots":      task((*call).cnsDeleteSnapshot, cnsFiles),
		"CnsQuerySnapshots":       task((*call).cnsQuerySnapshots, nil),
		"CnsQueryVolumeInfo":      task((*call).cnsInfo, nil),
		"CnsQueryVolume":          {needs: atRoot("Cns.Searchable"), do: (*call).cnsQuery},
		"CnsQueryAllVolume":       {needs: atRoot("Cns.Searchable"), do: (*call).cnsQuery},
	}
}

// cnsFiles: the files of each volume, on its datastore.
func cnsFiles(c *call) (demands []demand) {
	on := func(id string, named ...types.ManagedObjectReference) {
		for _, ref := range append(named, types.ManagedObjectReference{}) {
			if ref.Value != "" || len(named) == 0 {
				demands = append(demands, demand{"Datastore.FileManagement", c.s.storeOf(id, ref)})
			}
		}
	}
	switch r := c.body.(type) {
	case *cnstypes.CnsCreateVolume:
		for _, spec := range r.CreateSpecs {
			on("", spec.Datastores...)
		}
	case *cnstypes.CnsDeleteVolume:
		for _, id := range r.VolumeIds {
			on(id.Id)
		}
	case *cnstypes.CnsExtendVolume:
		for _, spec := range r.ExtendSpecs {
			on(spec.VolumeId.Id)
		}
	case *cnstypes.CnsCreateSnapshots:
		for _, spec := range r.SnapshotSpecs {
			on(spec.VolumeId.Id)
		}
	case *cnstypes.CnsDeleteSnapshots:
		for _, spec := range r.SnapshotDeleteSpecs {
			on(spec.VolumeId.Id)
		}
	}
	return demands
}

func cnsVM(privileges ...string) func(*call) []demand {
	return func(c *call) (demands []demand) {
		var specs []cnstypes.CnsVolumeAttachDetachSpec
		switch r := c.body.(type) {
		case *cnstypes.CnsAttachVolume:
			specs = r.AttachSpecs
		case *cnstypes.CnsDetachVolume:
			specs = r.DetachSpecs
		}
		for _, spec := range specs {
			for _, p := range privileges {
				demands = append(demands, demand{p, spec.Vm})
			}
		}
		return demands
	}
}

func localized(fault types.BaseMethodFault) *types.LocalizedMethodFault {
	if fault == nil {
		return nil
	}
	return &types.LocalizedMethodFault{Fault: fault, LocalizedMessage: messageOf(fault)}
}

func outcome(id string, fault types.BaseMethodFault) cnstypes.CnsVolumeOperationResult {
	return cnstypes.CnsVolumeOperationResult{VolumeId: cnstypes.CnsVolumeId{Id: id}, Fault: localized(fault)}
}

func batch(results ...cnstypes.BaseCnsVolumeOperationResult) types.AnyType {
	return cnstypes.CnsVolumeOperationBatchResult{VolumeResults: results}
}

// one is the only spec of a batch: CNS takes several of some and does one.
func one[T any](list []T) (first T, fault types.BaseMethodFault) {
	if len(list) != 1 {
		return first, &types.InvalidArgument{RuntimeFault: reason("one volume at a time"), InvalidProperty: "InputSpec"}
	}
	return list[0], nil
}

// volume is a disk that CNS knows.
func (s *Server) volume(id string) (*diskRecord, types.BaseMethodFault) {
	d, ok := s.disks[id]
	if !ok || d.Volume == nil {
		return nil, &types.NotFound{VimFault: vimReason("there is no volume " + id)}
	}
	return d, nil
}

func (c *call) cnsCreate() (types.AnyType, types.BaseMethodFault) {
	spec, fault := one(c.body.(*cnstypes.CnsCreateVolume).CreateSpecs)
	if fault != nil {
		return nil, fault
	}
	d, fault := c.s.createVolume(spec)
	r := &cnstypes.CnsVolumeCreateResult{CnsVolumeOperationResult: outcome("", fault), Name: spec.Name}
	if fault == nil {
		r.VolumeId.Id = d.ID
		r.PlacementResults = []cnstypes.CnsPlacementResult{{Datastore: c.s.inventory.stores[d.Datastore]}}
	}
	return batch(r), nil
}

func (s *Server) createVolume(spec cnstypes.CnsVolumeCreateSpec) (*diskRecord, types.BaseMethodFault) {
	block, ok := spec.BackingObjectDetails.(*cnstypes.CnsBlockBackingDetails)
	if !ok || spec.VolumeType != string(cnstypes.CnsVolumeTypeBlock) {
		return nil, &types.NotSupported{RuntimeFault: reason("volumes are block volumes here")}
	}
	record := &volumeRecord{}
	record.Cluster = clusterOf(spec.Metadata.ContainerCluster)
	record.update(spec.Metadata.EntityMetadata)
	if block.BackingDiskId != "" {
		d, fault := s.disk(block.BackingDiskId)
		switch {
		case fault != nil:
			return nil, fault
		case d.Volume != nil:
			return nil, &cnstypes.CnsAlreadyRegisteredFault{CnsFault: cnstypes.CnsFault{Reason: "CNS knows the disk"}, VolumeId: cnstypes.CnsVolumeId{Id: d.ID}}
		}
		d.Volume, d.Name = record, spec.Name
		d.describe()
		return d, s.keepDisk(d)
	}
	n := newDisk{name: spec.Name, mib: block.CapacityInMb, datastores: spec.Datastores, policy: profileOf(spec.Profile), volume: record}
	if src, ok := spec.VolumeSource.(*cnstypes.CnsSnapshotVolumeSource); ok {
		file, size, fault := s.sourceOf(src.VolumeId.Id, src.SnapshotId.Id)
		switch {
		case fault != nil:
			return nil, fault
		case n.mib != 0 && n.mib != size:
			return nil, &types.InvalidArgument{RuntimeFault: reason(fmt.Sprintf("the snapshot has %d MiB, and so has what is made from it", size)), InvalidProperty: "capacityInMb"}
		}
		n.from, n.mib = file, size
	}
	d, fault := s.createDisk(n)
	if fault != nil {
		return nil, fault
	}
	d.describe()
	return d, s.keepDisk(d)
}

// describe puts on a disk what CNS puts there.
func (d *diskRecord) describe() {
	m := map[string]string{
		"cns.containerCluster.clusterId": d.Volume.Cluster.ID, "cns.containerCluster.clusterType": d.Volume.Cluster.Type,
		"cns.containerCluster.vSphereUser": d.Volume.Cluster.User, "cns.containerCluster.clusterFlavor": d.Volume.Cluster.Flavor,
		"cns.containerCluster.clusterDistribution": d.Volume.Cluster.Distribution,
	}
	for _, e := range d.Volume.Entities {
		switch e.Type {
		case string(cnstypes.CnsKubernetesEntityTypePVC):
			m["cns.k8s.pvc.name"], m["cns.k8s.pvc.namespace"] = e.Name, e.Namespace
		case string(cnstypes.CnsKubernetesEntityTypePV):
			m["cns.k8s.pv.name"] = e.Name
		case string(cnstypes.CnsKubernetesEntityTypePOD):
			m["cns.k8s.pod.name"], m["cns.k8s.pod.namespace"] = e.Name, e.Namespace
		}
	}
	d.Metadata = m
}

func clusterOf(c cnstypes.CnsContainerCluster) clusterRecord {
	return clusterRecord{c.ClusterType, c.ClusterId, c.VSphereUser, c.ClusterFlavor, c.ClusterDistribution}
}

// update joins entities by type and name; one that says so goes.
func (v *volumeRecord) update(entities []cnstypes.BaseCnsEntityMetadata) {
	for _, base := range entities {
		k, ok := base.(*cnstypes.CnsKubernetesEntityMetadata)
		if !ok {
			continue
		}
		v.Entities = slices.DeleteFunc(slices.Clone(v.Entities), func(e entityRecord) bool {
			return e.Type == k.EntityType && e.Name == k.EntityName && e.Namespace == k.Namespace
		})
		if k.Delete {
			continue
		}
		e := entityRecord{Type: k.EntityType, Name: k.EntityName, Namespace: k.Namespace, Cluster: k.ClusterID, Labels: pairs(k.Labels)}
		for _, r := range k.ReferredEntity {
			e.Refers = append(e.Refers, entityRecord{Type: r.EntityType, Name: r.EntityName, Namespace: r.Namespace, Cluster: r.ClusterID})
		}
		v.Entities = append(v.Entities, e)
	}
}

func (e entityRecord) shown() cnstypes.BaseCnsEntityMetadata {
	k := &cnstypes.CnsKubernetesEntityMetadata{EntityType: e.Type, Namespace: e.Namespace}
	k.EntityName, k.ClusterID, k.Labels = e.Name, e.Cluster, listed(e.Labels)
	for _, r := range e.Refers {
		k.ReferredEntity = append(k.ReferredEntity, cnstypes.CnsKubernetesEntityReference{EntityType: r.Type, EntityName: r.Name, Namespace: r.Namespace, ClusterID: r.Cluster})
	}
	return k
}

func (c *call) cnsDelete() (types.AnyType, types.BaseMethodFault) {
	r := c.body.(*cnstypes.CnsDeleteVolume)
	id, fault := one(r.VolumeIds)
	if fault != nil {
		return nil, fault
	}
	d, fault := c.s.volume(id.Id)
	switch {
	case fault != nil:
	case r.DeleteDisk:
		fault = c.s.deleteDisk(id.Id)
	default:
		d.Volume = nil
		fault = c.s.keepDisk(d)
	}
	result := outcome(id.Id, fault)
	return batch(&result), nil
}

func (c *call) cnsExtend() (types.AnyType, types.BaseMethodFault) {
	spec, fault := one(c.body.(*cnstypes.CnsExtendVolume).ExtendSpecs)
	if fault != nil {
		return nil, fault
	}
	if _, fault = c.s.volume(spec.VolumeId.Id); fault == nil {
		fault = c.s.extendDisk(spec.VolumeId.Id, spec.CapacityInMb)
	}
	result := outcome(spec.VolumeId.Id, fault)
	return batch(&result), nil
}

func (c *call) cnsUpdate() (types.AnyType, types.BaseMethodFault) {
	var results []cnstypes.BaseCnsVolumeOperationResult
	for _, spec := range c.body.(*cnstypes.CnsUpdateVolumeMetadata).UpdateSpecs {
		d, fault := c.s.volume(spec.VolumeId.Id)
		if fault == nil {
			changed := *d.Volume
			changed.update(spec.Metadata.EntityMetadata)
			d.Volume = &changed
			d.describe()
			fault = c.s.keepDisk(d)
		}
		result := outcome(spec.VolumeId.Id, fault)
		results = append(results, &result)
	}
	return batch(results...), nil
}

func (c *call) cnsAttach() (types.AnyType, types.BaseMethodFault) {
	spec, fault := one(c.body.(*cnstypes.CnsAttachVolume).AttachSpecs)
	if fault != nil {
		return nil, fault
	}
	d, fault := c.s.volume(spec.VolumeId.Id)
	if fault == nil {
		d, fault = c.s.attachDisk(spec.VolumeId.Id, spec.Vm, spec.DiskMode)
	}
	result := &cnstypes.CnsVolumeAttachResult{CnsVolumeOperationResult: outcome(spec.VolumeId.Id, fault)}
	if fault == nil {
		result.DiskUUID = strings.ReplaceAll(d.UUID, "-", "")
	}
	return batch(result), nil
}

func (c *call) cnsDetach() (types.AnyType, types.BaseMethodFault) {
	spec, fault := one(c.body.(*cnstypes.CnsDetachVolume).DetachSpecs)
	if fault != nil {
		return nil, fault
	}
	result := outcome(spec.VolumeId.Id, c.s.detachDisk(spec.VolumeId.Id, spec.Vm))
	return batch(&result), nil
}

func (c *call) cnsSnapshot() (types.AnyType, types.BaseMethodFault) {
	spec, fault := one(c.body.(*cnstypes.CnsCreateSnapshots).SnapshotSpecs)
	if fault != nil {
		return nil, fault
	}
	var snap snapshotRecord
	if _, fault = c.s.volume(spec.VolumeId.Id); fault == nil {
		snap, fault = c.s.snapshotDisk(spec.VolumeId.Id, spec.Description)
	}
	result := &cnstypes.CnsSnapshotCreateResult{}
	result.CnsVolumeOperationResult = outcome(spec.VolumeId.Id, fault)
	if fault == nil {
		result.Snapshot = snap.shown(spec.VolumeId.Id)
	}
	return batch(result), nil
}

func (r snapshotRecord) shown(volume string) cnstypes.CnsSnapshot {
	return cnstypes.CnsSnapshot{SnapshotId: cnstypes.CnsSnapshotId{Id: r.ID}, VolumeId: cnstypes.CnsVolumeId{Id: volume}, Description: r.Text, CreateTime: r.Created}
}

func (c *call) cnsDeleteSnapshot() (types.AnyType, types.BaseMethodFault) {
	spec, fault := one(c.body.(*cnstypes.CnsDeleteSnapshots).SnapshotDeleteSpecs)
	if fault != nil {
		return nil, fault
	}
	d, fault := c.s.volume(spec.VolumeId.Id)
	switch {
	case fault != nil:
	case d.snapshot(spec.SnapshotId.Id) < 0:
		fault = &cnstypes.CnsSnapshotNotFoundFault{CnsFault: cnstypes.CnsFault{Reason: "there is no such snapshot"}, VolumeId: spec.VolumeId, SnapshotId: spec.SnapshotId}
	default:
		fault = c.s.deleteSnapshot(spec.VolumeId.Id, spec.SnapshotId.Id)
	}
	result := &cnstypes.CnsSnapshotDeleteResult{SnapshotId: spec.SnapshotId}
	result.CnsVolumeOperationResult = outcome(spec.VolumeId.Id, fault)
	return batch(result), nil
}

func (c *call) cnsQuerySnapshots() (types.AnyType, types.BaseMethodFault) {
	filter := c.body.(*cnstypes.CnsQuerySnapshots).SnapshotQueryFilter
	if len(filter.SnapshotQuerySpecs) == 0 {
		for _, id := range sortedKeys(c.s.disks) {
			filter.SnapshotQuerySpecs = append(filter.SnapshotQuerySpecs, cnstypes.CnsSnapshotQuerySpec{VolumeId: cnstypes.CnsVolumeId{Id: id}})
		}
	}
	res := cnstypes.CnsSnapshotQueryResult{}
	for _, spec := range filter.SnapshotQuerySpecs {
		d, fault := c.s.volume(spec.VolumeId.Id)
		if fault != nil {
			if len(c.body.(*cnstypes.CnsQuerySnapshots).SnapshotQueryFilter.SnapshotQuerySpecs) > 0 {
				missing := &cnstypes.CnsVolumeNotFoundFault{CnsFault: cnstypes.CnsFault{Reason: messageOf(fault)}, VolumeId: spec.VolumeId}
				res.Entries = append(res.Entries, cnstypes.CnsSnapshotQueryResultEntry{Error: localized(missing)})
			}
			continue
		}
		found := false
		for _, snap := range d.Snapshots {
			if spec.SnapshotId == nil || spec.SnapshotId.Id == snap.ID {
				found = true
				res.Entries = append(res.Entries, cnstypes.CnsSnapshotQueryResultEntry{Snapshot: snap.shown(d.ID)})
			}
		}
		if spec.SnapshotId != nil && !found {
			missing := &cnstypes.CnsSnapshotNotFoundFault{VolumeId: spec.VolumeId, SnapshotId: *spec.SnapshotId}
			res.Entries = append(res.Entries, cnstypes.CnsSnapshotQueryResultEntry{Error: localized(missing)})
		}
	}
	n := int64(len(res.Entries))
	res.Cursor = cnstypes.CnsCursor{Offset: n, Limit: n, TotalRecords: n}
	return res, nil
}

func (c *call) cnsInfo() (types.AnyType, types.BaseMethodFault) {
	var results []cnstypes.BaseCnsVolumeOperationResult
	for _, id := range c.body.(*cnstypes.CnsQueryVolumeInfo).VolumeIds {
		d, fault := c.s.volume(id.Id)
		r := &cnstypes.CnsQueryVolumeInfoResult{CnsVolumeOperationResult: outcome(id.Id, fault)}
		if fault == nil {
			r.VolumeInfo = &cnstypes.CnsBlockVolumeInfo{VStorageObject: c.s.storageObject(d)}
		}
		results = append(results, r)
	}
	return batch(results...), nil
}

func (c *call) cnsQuery() soap.HasFault {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	var filter cnstypes.CnsQueryFilter
	var k8s *cnstypes.CnsKubernetesQueryFilter
	switch r := c.body.(type) {
	case *cnstypes.CnsQueryVolume:
		if r.Filter != nil {
			filter = *r.Filter.GetCnsQueryFilter()
			k8s, _ = r.Filter.(*cnstypes.CnsKubernetesQueryFilter)
		}
	case *cnstypes.CnsQueryAllVolume:
		filter = r.Filter
	}
	var all []cnstypes.CnsVolume
	asked := func(d *diskRecord) bool {
		return d.Volume != nil && c.s.selects(filter, d) && (k8s == nil || d.Volume.selectedBy(k8s))
	}
	for _, d := range c.seenDisks(asked) {
		all = append(all, c.s.shownVolume(d))
	}
	from, limit := int64(0), int64(maxVolumes)
	if p := filter.Cursor; p != nil {
		from = min(max(p.Offset, 0), int64(len(all)))
		if p.Limit > 0 {
			limit = min(limit, p.Limit)
		}
	}
	to := min(from+limit, int64(len(all)))
	res := cnstypes.CnsQueryResult{Volumes: all[from:to], Cursor: cnstypes.CnsCursor{Offset: to, Limit: limit, TotalRecords: int64(len(all))}}
	if _, ok := c.body.(*cnstypes.CnsQueryAllVolume); ok {
		return &cnsmethods.CnsQueryAllVolumeBody{Res: &cnstypes.CnsQueryAllVolumeResponse{Returnval: res}}
	}
	return &cnsmethods.CnsQueryVolumeBody{Res: &cnstypes.CnsQueryVolumeResponse{Returnval: res}}
}

// selects tells whether a volume is what a filter asks for: one of each list
// that is not empty.
func (s *Server) selects(f cnstypes.CnsQueryFilter, d *diskRecord) bool {
	in := func(list []string, value string) bool { return len(list) == 0 || slices.Contains(list, value) }
	is := func(want, value string) bool { return want == "" || want == value }
	named := len(f.VolumeIds) == 0 || slices.ContainsFunc(f.VolumeIds, func(id cnstypes.CnsVolumeId) bool { return id.Id == d.ID })
	labelled := len(f.Labels) == 0 || slices.ContainsFunc(f.Labels, func(want types.KeyValue) bool {
		return slices.ContainsFunc(d.Volume.Entities, func(e entityRecord) bool {
			v, ok := e.Labels[want.Key]
			return ok && v == want.Value
		})
	})
	at := s.inventory.stores[d.Datastore]
	return named && in(f.Names, d.Name) && in(f.ContainerClusterIds, d.Volume.Cluster.ID) && is(f.StoragePolicyId, d.Policy) &&
		(len(f.Datastores) == 0 || slices.Contains(f.Datastores, at)) && labelled &&
		is(f.ComplianceStatus, s.complianceOf(d)) && is(f.HealthStatus, "green") && is(f.DatastoreAccessibilityStatus, "accessible")
}

func (v *volumeRecord) selectedBy(f *cnstypes.CnsKubernetesQueryFilter) bool {
	named := func(kind cnstypes.CnsKubernetesEntityType, names []string) bool {
		return len(names) == 0 || slices.ContainsFunc(v.Entities, func(e entityRecord) bool { return e.Type == string(kind) && slices.Contains(names, e.Name) })
	}
	there := len(f.Namespaces) == 0 || slices.ContainsFunc(v.Entities, func(e entityRecord) bool { return slices.Contains(f.Namespaces, e.Namespace) })
	return there && named(cnstypes.CnsKubernetesEntityTypePOD, f.PodNames) && named(cnstypes.CnsKubernetesEntityTypePVC, f.PvcNames) && named(cnstypes.CnsKubernetesEntityTypePV, f.PvNames)
}

func (s *Server) shownVolume(d *diskRecord) cnstypes.CnsVolume {
	backing := &cnstypes.CnsBlockBackingDetails{BackingDiskId: d.ID, BackingDiskPath: d.path(), BackingDiskObjectId: d.Object}
	backing.CapacityInMb = d.MiB
	for _, snap := range d.Snapshots {
		backing.AggregatedSnapshotCapacityInMb += allocated(s.files().snapshotFile(d, snap.ID)) / mib
	}
	cluster := d.Volume.Cluster
	shown := cnstypes.CnsContainerCluster{ClusterType: cluster.Type, ClusterId: cluster.ID, VSphereUser: cluster.User, ClusterFlavor: cluster.Flavor, ClusterDistribution: cluster.Distribution}
	v := cnstypes.CnsVolume{
		VolumeId: cnstypes.CnsVolumeId{Id: d.ID}, Name: d.Name, VolumeType: string(cnstypes.CnsVolumeTypeBlock), StoragePolicyId: d.Policy,
		DatastoreUrl: "ds:///vmfs/volumes/" + d.Datastore + "/", BackingObjectDetails: backing,
		Metadata:         cnstypes.CnsVolumeMetadata{ContainerCluster: shown, ContainerClusterArray: []cnstypes.CnsContainerCluster{shown}},
		ComplianceStatus: s.complianceOf(d), DatastoreAccessibilityStatus: "accessible", HealthStatus: "green",
	}
	for _, e := range d.Volume.Entities {
		v.Metadata.EntityMetadata = append(v.Metadata.EntityMetadata, e.shown())
	}
	return v
}
