package vmdk

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cnsmethods "github.com/vmware/govmomi/cns/methods"
	cnstypes "github.com/vmware/govmomi/cns/types"

	"github.com/openatoll/atoll/storage"
)

// TestDiscard: what is proven to be nobody's goes, and nothing else.
func TestDiscard(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	h := v.vm(t, hostA, 1)
	make := func(name string) string {
		t.Helper()
		made, err := d.Create(t.Context(), claim(name, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		return made.ID
	}
	had, waited, blank, attached, bound := make("had"), make("waited"), make("blank"), make("attached"), make("bound")
	if _, err := d.Attach(t.Context(), attached, h, storage.AttachOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := d.Detach(t.Context(), attached, h); err != nil {
		t.Fatal(err)
	}
	if err := d.Relabel(t.Context(), bound, map[string]string{storage.LabelPVC: "data"}); err != nil {
		t.Fatal(err)
	}
	// A clone has its source's bytes, whoever had it or not.
	c := claim("clone", 1<<20)
	c.Source = &storage.Source{VolumeID: had}
	clone, err := d.Create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	p, err := d.policy(t.Context(), "any-datastore")
	if err != nil {
		t.Fatal(err)
	}
	half := v.raw(t, d, &volume{name: "half", policy: p.Name, policyID: p.id, mib: 1, whole: 2, created: now()})
	growing := v.raw(t, d, &volume{name: "growing", policy: p.Name, policyID: p.id, mib: 1, whole: 2, created: now()})

	claimed := func(id, name string) bool { return id == had || name == "waited" || name == "growing" }
	want := map[string]bool{blank: true, attached: false, bound: false, clone.ID: false, half: true}
	found := map[string]bool{}
	all, err := d.Orphans(t.Context(), claimed)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range all {
		found[o.ID] = o.Disposable
		err := d.Discard(t.Context(), o)
		if o.Disposable && err != nil || !o.Disposable && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("Discard(%+v) = %v", o, err)
		}
	}
	if !maps.Equal(found, want) {
		t.Errorf("Orphans = %+v, want %v", all, want)
	}
	left := v.ids(t, d)
	for id, kept := range map[string]bool{had: true, waited: true, attached: true, bound: true, clone.ID: true, growing: true, blank: false, half: false} {
		if slices.Contains(left, id) != kept {
			t.Errorf("%s: kept %v, want %v", id, !kept, kept)
		}
	}

	// One that a VM got in between is no longer what was found.
	late := storage.Orphan{ID: waited, Name: "waited", Disposable: true}
	if _, err := d.Attach(t.Context(), waited, h, storage.AttachOptions{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if err := d.Discard(t.Context(), late); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Discard of a volume that a VM has = %v", err)
	}
}

// TestRelabel: vSphere shows who has a volume now, and no one else.
func TestRelabel(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	made, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{storage.LabelNamespace: "team-b", storage.LabelPVC: "other", storage.LabelPV: "pv-2", "tier": "one"}
	for range 2 {
		if err := d.Relabel(t.Context(), made.ID, labels); err != nil {
			t.Fatal(err)
		}
	}
	now, err := d.Get(t.Context(), made.ID)
	if err != nil || !maps.Equal(now.Labels, labels) || now.Policy != made.Policy || now.Name != made.Name {
		t.Errorf("Get = %+v, %v", now, err)
	}
	filter := cnstypes.CnsQueryFilter{VolumeIds: []cnstypes.CnsVolumeId{{Id: made.ID}}}
	res, err := cnsmethods.CnsQueryVolume(t.Context(), d.services.cns, &cnstypes.CnsQueryVolume{This: manager, Filter: &filter})
	if err != nil || len(res.Returnval.Volumes) != 1 {
		t.Fatalf("%+v, %v", res, err)
	}
	var entities []string
	for _, base := range res.Returnval.Volumes[0].Metadata.EntityMetadata {
		e := base.(*cnstypes.CnsKubernetesEntityMetadata)
		entities = append(entities, e.EntityType+" "+e.Namespace+"/"+e.EntityName)
	}
	slices.Sort(entities)
	if want := []string{"PERSISTENT_VOLUME /pv-2", "PERSISTENT_VOLUME_CLAIM team-b/other"}; !slices.Equal(entities, want) {
		t.Errorf("CNS has %q, want %q", entities, want)
	}
	if err := d.Relabel(t.Context(), made.ID, map[string]string{labelDeleted: "true"}); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), labelDeleted) {
		t.Errorf("one of our own labels: %v", err)
	}
}

// TestAudit asks about many at once, also where one is just gone.
func TestAudit(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	gold := claim("gold", 1<<20)
	gold.Policy = "gold"
	var ids []string
	for _, c := range []storage.Claim{claim("a", 1<<20), claim("b", 1<<20), gold} {
		made, err := d.Create(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, made.ID)
	}
	before := v.Faults().Calls()["PbmCheckCompliance"]
	all, err := d.Audit(t.Context())
	if err != nil || len(all) != len(ids) {
		t.Fatalf("Audit = %v, %v", all, err)
	}
	for _, id := range ids {
		if all[id].State != storage.Compliant {
			t.Errorf("%s: %+v", id, all[id])
		}
	}
	if calls := v.Faults().Calls()["PbmCheckCompliance"] - before; calls != 2 {
		t.Errorf("%d calls for two policies", calls)
	}
}
