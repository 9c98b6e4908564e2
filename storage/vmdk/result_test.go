package vmdk

import (
	"testing"

	cnstypes "github.com/vmware/govmomi/cns/types"
)

// TestResultOfATask is read in CNS's namespace where the watch was not told.
func TestResultOfATask(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	p, err := d.policy(t.Context(), "any-datastore")
	if err != nil {
		t.Fatal(err)
	}
	made := &volume{name: "pvc-1", policy: p.Name, policyID: p.id, mib: 1, whole: 1, created: now()}
	if err := d.services.ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	id, err := made.create(d, d.anyStore(t))(t.Context(), d.services.cns)
	if err != nil {
		t.Fatal(err)
	}
	if id.Value == "" {
		t.Fatal("no task")
	}
	if _, err := d.tasks.Join(t.Context(), id.Value); err != nil {
		t.Fatal(err)
	}
	result, err := d.result(t.Context(), id.Value)
	if err != nil {
		t.Fatal(err)
	}
	batch, ok := result.(cnstypes.CnsVolumeOperationBatchResult)
	if !ok || len(batch.VolumeResults) != 1 || batch.VolumeResults[0].GetCnsVolumeOperationResult().VolumeId.Id == "" {
		t.Errorf("the result is %T %+v", result, result)
	}
}
