package vmdk

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// TestSnapshotOrphans: what no content has is told of, and left alone.
func TestSnapshotOrphans(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	made, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, name := range []string{"had", "waited", "forsaken"} {
		s, err := d.Snapshot(t.Context(), made.ID, name, nil)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, s.ID)
	}
	all, err := d.Orphans(t.Context(), func(id, name string) bool { return id == made.ID || id == ids[0] || name == "waited" })
	if err != nil || len(all) != 1 || all[0].ID != ids[2] || all[0].Disposable || !strings.Contains(all[0].Why, "holds data") {
		t.Fatalf("Orphans = %+v, %v", all, err)
	}
	if err := d.Discard(t.Context(), all[0]); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Discard = %v", err)
	}
	if left, err := d.ListSnapshots(t.Context(), made.ID); err != nil || len(left) != 3 {
		t.Errorf("left are %+v, %v", left, err)
	}
	if all, err := d.Orphans(t.Context(), nil); err != nil || len(all) != 0 {
		t.Errorf("without anybody to ask: %+v, %v", all, err)
	}
}

// TestSnapshotTakenTwice: of two that two processes took at once the older counts.
func TestSnapshotTakenTwice(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	made, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	of, err := d.whole(t.Context(), made.ID)
	if err != nil {
		t.Fatal(err)
	}
	var both []snap
	for range 2 {
		s, err := d.snapshot(t.Context(), of, note{Cluster: d.options.Cluster, Name: "snapshot-1", MiB: 1})
		if err != nil {
			t.Fatal(err)
		}
		both = append(both, s)
	}
	for _, s := range slices.Backward(both) {
		if first, err := d.firstSnapshot(t.Context(), s); err != nil || first.id != both[0].id {
			t.Errorf("first is %+v, %v; want %s", first, err, both[0].id)
		}
	}
	if left, err := d.ListSnapshots(t.Context(), made.ID); err != nil || len(left) != 1 || left[0].ID != both[0].snapshotID() {
		t.Errorf("left are %+v, %v", left, err)
	}
}

// TestSnapshotThatFailed: a failure that is final has left none behind.
func TestSnapshotThatFailed(t *testing.T) {
	v := startVCenter(t)
	d := v.open(t, v.options())
	made, err := d.Create(t.Context(), claim("pvc-1", 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	remove := v.Faults().Add(vcsim.Fault{Method: "CnsCreateSnapshots", Task: true, Fault: &types.InvalidState{}, Times: 1})
	_, err = d.Snapshot(t.Context(), made.ID, "snapshot-1", nil)
	remove()
	if !errdefs.IsFailedPrecondition(err) || errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "32 snapshots of a disk at most: delete some") {
		t.Errorf("a disk with too many: %v", err)
	}
	for i, late := range []bool{false, true} {
		remove := v.Faults().Add(vcsim.Fault{Method: "CnsCreateSnapshots", Task: true, Late: late, Fault: &types.NoDiskSpace{}, Times: 1})
		_, err := d.Snapshot(t.Context(), made.ID, "snapshot-1", nil)
		remove()
		if late && err != nil || !late && !errdefs.IsResourceExhausted(err) {
			t.Errorf("late %v: %v", late, err)
		}
		if left, err := d.ListSnapshots(t.Context(), made.ID); err != nil || len(left) != i {
			t.Errorf("late %v: left are %+v, %v", late, left, err)
		}
	}
}
