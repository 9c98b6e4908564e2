package vmdk

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/pbm"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/storagetest"
)

// TestSuite is what every back end must do.
func TestSuite(t *testing.T) {
	var all vcenters
	storagetest.TestDisks(t, storagetest.Disks{
		Open: func(t *testing.T, _ string) storage.Disks { v := all.of(t); return v.open(t, v.options()) },
		Thin: "any-datastore", Shared: "any-datastore", LiveSnapshots: true,
		Write: func(t *testing.T, a storage.Attachment, at int64, data []byte) { all.of(t).write(t, a, at, data) },
		Read:  func(t *testing.T, a storage.Attachment, at, n int64) []byte { return all.of(t).read(t, a, at, n) },
		VM:    func(t *testing.T, host string, i int) string { return all.of(t).vm(t, host, i).VM },
	})
}

// cnsVolume is a volume as the vSphere client shows it.
func (v *vcenter) cnsVolume(t *testing.T, d *Disks, id string) cnstypes.CnsVolume {
	t.Helper()
	res, err := cnsmethods.CnsQueryVolume(t.Context(), d.services.cns, &cnstypes.CnsQueryVolume{This: manager, Filter: &cnstypes.CnsQueryFilter{VolumeIds: []cnstypes.CnsVolumeId{{Id: id}}}})
	if err != nil || len(res.Returnval.Volumes) != 1 {
		t.Fatalf("CNS shows %+v, %v", res, err)
	}
	return res.Returnval.Volumes[0]
}

// TestWhatVSphereShows: whose a disk is, its policy, and the pod that has it.
func TestWhatVSphereShows(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	c := claim("pvc-1", 5<<20)
	c.Policy = "gold"
	made, err := d.Create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if made.Datastore != "fast" || made.At.Host != "" {
		t.Errorf("a volume of policy gold is at %+v", made)
	}
	h := v.vm(t, hostA, 1)
	if _, err := d.Attach(t.Context(), made.ID, h, storage.AttachOptions{}); err != nil {
		t.Fatal(err)
	}
	shown := v.cnsVolume(t, d, made.ID)
	entities := map[string]string{}
	for _, e := range shown.Metadata.EntityMetadata {
		k := e.(*cnstypes.CnsKubernetesEntityMetadata)
		entities[k.EntityType] = k.Namespace + "/" + k.EntityName
	}
	if entities["PERSISTENT_VOLUME"] != "/pvc-1" || entities["PERSISTENT_VOLUME_CLAIM"] != "team-a/data" || entities["POD"] != "team-a/pod-1" {
		t.Errorf("CNS knows %v", entities)
	}
	if cc := shown.Metadata.ContainerCluster; cc.ClusterId != cluster || cc.ClusterType != "KUBERNETES" || cc.ClusterDistribution != "Atoll" || !strings.EqualFold(cc.VSphereUser, `VSPHERE.LOCAL\Administrator`) {
		t.Errorf("its cluster is %+v", cc)
	}
	if p, err := d.policy(t.Context(), "gold"); err != nil || shown.StoragePolicyId != p.id {
		t.Errorf("its policy is %s, want %s (%v)", shown.StoragePolicyId, p.id, err)
	}
	if err := d.Detach(t.Context(), made.ID, h); err != nil {
		t.Fatal(err)
	}
	for _, e := range v.cnsVolume(t, d, made.ID).Metadata.EntityMetadata {
		if k := e.(*cnstypes.CnsKubernetesEntityMetadata); k.EntityType == "POD" {
			t.Errorf("after Detach CNS still knows pod %s", k.EntityName)
		}
	}
}

// TestForeignDisksAreLeftAlone: what does not bear the mark is neither listed
// nor touched.
func TestForeignDisksAreLeftAlone(t *testing.T) {
	v := startVCenter(t)
	other := v.options()
	other.Cluster = "another-cluster"
	theirs, d := v.open(t, other), v.open(t, v.options())
	made, err := theirs.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if all, err := d.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("List = %v, %v", all, err)
	}
	if err := d.Delete(t.Context(), made.ID); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "mark") {
		t.Errorf("Delete of another cluster's disk: %v", err)
	}
	if _, err := d.Attach(t.Context(), made.ID, v.vm(t, hostA, 1), storage.AttachOptions{}); !errdefs.IsNotFound(err) {
		t.Errorf("Attach of another cluster's disk: %v", err)
	}
	mine, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil || mine.ID == made.ID {
		t.Errorf("two clusters' claims of one name: %v, %v", mine.ID, err)
	}
	if freed, err := d.Fence(t.Context(), storage.Holder{Host: hostA}); err != nil || len(freed) != 0 {
		t.Errorf("Fence = %v, %v", freed, err)
	}
	if _, err := theirs.Get(t.Context(), made.ID); err != nil {
		t.Error(err)
	}
}

// TestRoom: too much now, and too much for ever.
func TestRoom(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	for bytes, is := range map[int64]func(error) bool{10 << 30: errdefs.IsResourceExhausted, 17 << 30: errdefs.IsOutOfRange, 63 << 40: errdefs.IsOutOfRange} {
		if _, err := d.Create(t.Context(), claim("large", bytes)); !is(err) || !strings.Contains(err.Error(), "any-datastore") {
			t.Errorf("a claim for %d GiB: %v", bytes>>30, err)
		}
	}
	c, err := d.Capacity(t.Context(), "gold", storage.Topology{})
	if err != nil || c.Total != 4<<30 || c.MaxVolume != c.Available {
		t.Errorf("Capacity of gold = %+v, %v", c, err)
	}
	if left := v.files(t); len(left) != 0 {
		t.Errorf("refused claims left %q", left)
	}
}

// TestCompliance follows a policy that moves away from a volume.
func TestCompliance(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	made, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if c, err := d.Compliance(t.Context(), made.ID); err != nil || c.State != storage.Compliant {
		t.Fatalf("Compliance = %+v, %v", c, err)
	}
	p, err := d.policy(t.Context(), made.Policy)
	if err != nil {
		t.Fatal(err)
	}
	admin, err := pbm.NewClient(t.Context(), v.admin(t).Client())
	if err != nil {
		t.Fatal(err)
	}
	tagged := pbmtypes.PbmCapabilityInstance{
		Id: pbmtypes.PbmCapabilityMetadataUniqueId{Namespace: "http://www.vmware.com/storage/tag", Id: "tier"},
		Constraint: []pbmtypes.PbmCapabilityConstraintInstance{{PropertyInstance: []pbmtypes.PbmCapabilityPropertyInstance{{
			Id: "com.vmware.storage.tag.tier.property", Value: pbmtypes.PbmCapabilityDiscreteSet{Values: []types.AnyType{"nvme"}},
		}}}},
	}
	err = admin.UpdateProfile(t.Context(), pbmtypes.PbmProfileId{UniqueId: p.id}, pbmtypes.PbmCapabilityProfileUpdateSpec{
		Constraints: &pbmtypes.PbmCapabilitySubProfileConstraints{SubProfiles: []pbmtypes.PbmCapabilitySubProfile{{Name: "sp", Capability: []pbmtypes.PbmCapabilityInstance{tagged}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.Compliance(t.Context(), made.ID)
	if err != nil || c.State != storage.NonCompliant || !strings.Contains(c.Message, made.Policy) {
		t.Errorf("Compliance after the policy changed = %+v, %v", c, err)
	}
}

// TestOrphans: what interrupted calls left is told of and left.
func TestOrphans(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	made, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	if all, err := d.Orphans(t.Context(), nil); err != nil || len(all) != 0 {
		t.Fatalf("Orphans = %v, %v", all, err)
	}
	// A second one of the name, as a request makes it that vCenter did long
	// after its caller was gone.
	p, err := d.policy(t.Context(), "any-datastore")
	if err != nil {
		t.Fatal(err)
	}
	twin := &volume{name: "pvc-1", policy: p.Name, policyID: p.id, mib: 1, whole: 1, created: now()}
	id := v.raw(t, d, twin)
	all, err := d.Orphans(t.Context(), nil)
	if err != nil || len(all) != 1 || all[0].ID != id || !strings.Contains(all[0].Why, made.ID) {
		t.Errorf("Orphans = %+v, %v; want %s", all, err, id)
	}
	again, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil || again.ID != made.ID {
		t.Errorf("Create = %s, %v; want %s", again.ID, err, made.ID)
	}
	if ids := v.ids(t, d); !slices.Contains(ids, id) {
		t.Errorf("an orphan was deleted: %q are left", ids)
	}
}

// raw makes a volume with CNS alone.
func (v *vcenter) raw(t *testing.T, d *Disks, of *volume) string {
	t.Helper()
	res, err := d.doOne(t.Context(), "make a volume", "raw", of.create(d, d.anyStore(t)))
	if err != nil {
		t.Fatal(err)
	}
	return res.GetCnsVolumeOperationResult().VolumeId.Id
}

func (d *Disks) anyStore(t *testing.T) store {
	t.Helper()
	all, err := d.stores.list(t.Context())
	if err != nil || len(all) == 0 {
		t.Fatalf("datastores: %v, %v", all, err)
	}
	return all[0]
}

// ids are those of all our disks that there are.
func (v *vcenter) ids(t *testing.T, d *Disks) (ids []string) {
	t.Helper()
	all, err := d.query(t.Context(), cnstypes.CnsQueryFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range all {
		ids = append(ids, x.id)
	}
	return ids
}
