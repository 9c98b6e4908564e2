package controlplane

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	_ "github.com/vmware/govmomi/cli/disk/snapshot"
	"github.com/vmware/govmomi/cns"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// snapshots of disks in vSphere, by VolumeSnapshots.
func (v *volumesTest) snapshots(t *testing.T) {
	v.apply(t, newClaim("snapped", "silver", "16Mi"))
	v.isBound(t, "snapped")
	t.Run("taken", v.taken)
	t.Run("restored", v.restores)
	t.Run("outlive their volume", v.outlives)
	t.Run("kept and brought back", v.retains)
	t.Run("bad days", v.badSnapshots)
	t.Run("killed", v.killedSnapshots)
	v.drop(t, v.claim(t, "snapped"))
}

func (v *volumesTest) take(t *testing.T, name, claim, class string) {
	t.Helper()
	s := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "data", Name: name}, Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claim}}}
	if class != "" {
		s.Spec.VolumeSnapshotClassName = &class
	}
	if err := v.admin.Create(t.Context(), s); err != nil {
		t.Fatal(err)
	}
}

// isReady returns a VolumeSnapshot and its content once there is a snapshot.
func (v *volumesTest) isReady(t *testing.T, name string) (*snapshotv1.VolumeSnapshot, *snapshotv1.VolumeSnapshotContent) {
	t.Helper()
	s, c := &snapshotv1.VolumeSnapshot{}, &snapshotv1.VolumeSnapshotContent{}
	eventually(t, "VolumeSnapshot "+name+" is ready", func() error {
		if err := v.admin.Get(t.Context(), client.ObjectKey{Namespace: "data", Name: name}, s); err != nil {
			return err
		}
		if s.Status == nil || s.Status.ReadyToUse == nil || !*s.Status.ReadyToUse {
			return fmt.Errorf("status %+v", s.Status)
		}
		return v.admin.Get(t.Context(), client.ObjectKey{Name: *s.Status.BoundVolumeSnapshotContentName}, c)
	})
	return s, c
}

// dropped deletes a VolumeSnapshot, which has to go.
func (v *volumesTest) dropped(t *testing.T, name string) {
	t.Helper()
	s := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "data", Name: name}}
	v.drop(t, s)
	v.left(t, s)
}

// left waits until an object is gone.
func (v *volumesTest) left(t *testing.T, o client.Object) {
	t.Helper()
	eventually(t, o.GetName()+" is gone", func() error {
		err := v.admin.Get(t.Context(), client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%v, finalizers %v", err, o.GetFinalizers())
	})
}

// inVCenter are the IDs of a disk's snapshots, as an administrator sees them.
func (v *volumesTest) inVCenter(t *testing.T, disk string) (ids []string) {
	t.Helper()
	c, err := cns.NewClient(t.Context(), v.vim.Client)
	if err != nil {
		t.Fatal(err)
	}
	task, err := c.QuerySnapshots(t.Context(), cnstypes.CnsSnapshotQueryFilter{SnapshotQuerySpecs: []cnstypes.CnsSnapshotQuerySpec{{VolumeId: cnstypes.CnsVolumeId{Id: disk}}}})
	if err != nil {
		t.Fatal(err)
	}
	info, err := cns.GetTaskInfo(t.Context(), task)
	if err != nil {
		t.Fatal(err)
	}
	res, err := cns.GetQuerySnapshotsTaskResult(t.Context(), info)
	if err != nil || res == nil {
		t.Fatal(res, err)
	}
	for _, e := range res.Entries {
		if e.Error == nil {
			ids = append(ids, e.Snapshot.SnapshotId.Id)
		}
	}
	return ids
}

// hasSnapshots waits until a disk has as many.
func (v *volumesTest) hasSnapshots(t *testing.T, disk string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("disk %s has %d snapshots", disk, want), func() error {
		if got := v.inVCenter(t, disk); len(got) != want {
			return fmt.Errorf("it has %q", got)
		}
		return nil
	})
}

// taken: both objects say what there is, and govc shows it; also where upstream's
// controller has given the content to a node.
func (v *volumesTest) taken(t *testing.T) {
	uuid := v.vim.ServiceContent.About.InstanceUuid
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "esx-1"}}
	for _, c := range v.isBound(t, "snapped").Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions {
		if node.Labels == nil {
			node.Labels = map[string]string{}
		}
		node.Labels[c.Key] = c.Values[0]
	}
	v.apply(t, node)
	before := time.Now().Add(-time.Second)
	v.take(t, "first", "snapped", "")
	s, c := v.isReady(t, "first")
	v.drop(t, node)
	disk := v.isBound(t, "snapped").Spec.CSI.VolumeHandle
	ids := v.inVCenter(t, disk)
	if len(ids) != 1 || *c.Status.SnapshotHandle != disk+"."+ids[0] {
		t.Errorf("vCenter has %q, the content %+v", ids, c.Status)
	}
	if c.Labels[managedBy] != v1alpha1.ContentOfVCenter+uuid || c.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentDelete {
		t.Errorf("content %+v", c)
	}
	if size := s.Status.RestoreSize; size == nil || size.Value() != 16<<20 || s.Status.CreationTime == nil || s.Status.CreationTime.Time.Before(before.Truncate(time.Second)) || *s.Status.BoundVolumeSnapshotContentName != c.Name {
		t.Errorf("VolumeSnapshot %+v", s.Status)
	}
	var out struct {
		Info types.VStorageObjectSnapshotInfo `json:"info"`
	}
	text := v.govc(t, "disk.snapshot.ls", "-json", disk)
	if err := json.Unmarshal([]byte(text), &out); err != nil || len(out.Info.Snapshots) != 1 || out.Info.Snapshots[0].Id.Id != ids[0] {
		t.Fatalf("disk.snapshot.ls: %v\n%s", err, text)
	}
	for _, want := range []string{`"volumesnapshot-name":"first"`, `"volumesnapshot-namespace":"data"`, c.Name} {
		if got := out.Info.Snapshots[0].Description; !strings.Contains(got, want) {
			t.Errorf("description %s, want %s in it", got, want)
		}
	}
}

func fromSnapshot(c *corev1.PersistentVolumeClaim, name string) *corev1.PersistentVolumeClaim {
	group := snapshotv1.GroupName
	c.Spec.DataSource = &corev1.TypedLocalObjectReference{APIGroup: &group, Kind: "VolumeSnapshot", Name: name}
	return c
}

// restores: claims begin as the snapshot, with the policies of their own classes.
func (v *volumesTest) restores(t *testing.T) {
	v.apply(t, fromSnapshot(newClaim("larger", "silver", "32Mi"), "first"))
	v.apply(t, fromSnapshot(newClaim("golden", "gold-fast", "16Mi"), "first"))
	v.apply(t, fromSnapshot(newClaim("small", "silver", "8Mi"), "first"))
	local := fromSnapshot(newClaim("on-a-node", v1alpha1.DefaultPolicy, "16Mi"), "first")
	if err := v.admin.Create(t.Context(), local, client.DryRunAll); !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) {
		t.Errorf("a class that the namespace was not given: %v", err)
	}
	for name, mib := range map[string]int64{"larger": 32, "golden": 16} {
		v.hasSize(t, name, mib)
		policy, pv := &v1alpha1.StoragePolicy{}, v.isBound(t, name)
		if err := v.admin.Get(t.Context(), client.ObjectKey{Name: *v.claim(t, name).Spec.StorageClassName}, policy); err != nil {
			t.Fatal(err)
		}
		if l := v.listed(t)[pv.Name]; len(l) != 1 || l[0].StoragePolicyID != policy.Spec.ID || pv.Spec.CSI.VolumeAttributes["policy"] != policy.Name {
			t.Errorf("%s: %+v, attributes %v", name, l, pv.Spec.CSI.VolumeAttributes)
		}
		v.shown(t, pv.Name, "PERSISTENT_VOLUME_CLAIM", "data/"+name+" [app="+name+"]")
	}
	v.tells(t, "small", "ProvisioningFailed", "8Mi is less than the 16Mi of VolumeSnapshot first")

	// What a disk with snapshots does not do.
	edit(t, v.namespacesTest, v.claim(t, "snapped"), func(c *corev1.PersistentVolumeClaim) { c.Spec.Resources.Requests["storage"] = *quantity("24Mi") })
	v.tells(t, "snapped", "VolumeResizeFailed", "vSphere expands no disk that has snapshots: delete them first")
	// While a claim is to be made from it, a snapshot stays.
	s, c := v.isReady(t, "first")
	v.drop(t, s)
	v.tells(t, "first", "SnapshotDeletePending", "being used to restore a PVC")
	v.drop(t, v.claim(t, "small"))
	v.left(t, s)
	v.left(t, c)
	v.hasSnapshots(t, v.isBound(t, "snapped").Spec.CSI.VolumeHandle, 0)
	v.hasSize(t, "snapped", 24)
	for _, name := range []string{"larger", "golden"} {
		v.drop(t, v.claim(t, name))
	}
}

// outlives: a claim that has snapshots is deleted at once, its disk with the last
// of them.
func (v *volumesTest) outlives(t *testing.T) {
	v.apply(t, newClaim("short", "silver", "1Mi"))
	pv := v.isBound(t, "short")
	v.take(t, "long", "short", "")
	v.isReady(t, "long")
	v.drop(t, v.claim(t, "short"))
	v.left(t, pv)
	if l := v.listed(t)[pv.Name]; len(l) != 1 || len(v.inVCenter(t, l[0].VolumeID.ID)) != 1 {
		t.Fatalf("vCenter has %+v", l)
	}
	v.apply(t, fromSnapshot(newClaim("again", "silver", "1Mi"), "long"))
	v.once(t, "again")
	v.dropped(t, "long")
	eventually(t, "the disk has gone with it", func() error {
		if l := v.listed(t)[pv.Name]; len(l) != 0 {
			return fmt.Errorf("there is %+v", l)
		}
		return nil
	})
	v.drop(t, v.claim(t, "again"))
}

// retains: what a class with Retain leaves is told of, not deleted, and found again
// by its handle.
func (v *volumesTest) retains(t *testing.T) {
	class := &snapshotv1.VolumeSnapshotClass{ObjectMeta: metav1.ObjectMeta{Name: "retain"}, Driver: v1alpha1.CSIDriverName, DeletionPolicy: snapshotv1.VolumeSnapshotContentRetain}
	if err := v.admin.Create(t.Context(), class); err != nil {
		t.Fatal(err)
	}
	v.take(t, "monday", "snapped", "retain")
	_, c := v.isReady(t, "monday")
	handle, disk := *c.Status.SnapshotHandle, v.isBound(t, "snapped").Spec.CSI.VolumeHandle
	v.dropped(t, "monday")
	v.drop(t, c)
	v.left(t, c)
	v.tells(t, "default", "OrphanedVolume", "no VolumeSnapshotContent has this snapshot")
	if ids := v.inVCenter(t, disk); len(ids) != 1 || disk+"."+ids[0] != handle {
		t.Fatalf("vCenter has %q, want %s", ids, handle)
	}
	back := &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: "back"}, Spec: snapshotv1.VolumeSnapshotContentSpec{
		Driver: v1alpha1.CSIDriverName, DeletionPolicy: snapshotv1.VolumeSnapshotContentDelete,
		Source:            snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
		VolumeSnapshotRef: corev1.ObjectReference{Namespace: "data", Name: "back"},
	}}
	s := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "data", Name: "back"}, Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{VolumeSnapshotContentName: &back.Name}}}
	for _, o := range []client.Object{back, s} {
		if err := v.admin.Create(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	if s, c := v.isReady(t, "back"); s.Status.RestoreSize.Value() != 24<<20 || !strings.HasPrefix(c.Labels[managedBy], v1alpha1.ContentOfVCenter) {
		t.Errorf("%+v, labels %v", s.Status, c.Labels)
	}
	v.apply(t, fromSnapshot(newClaim("of-back", "silver", "24Mi"), "back"))
	v.once(t, "of-back")
	v.drop(t, v.claim(t, "of-back"))
	v.dropped(t, "back")
	v.left(t, back)
	v.hasSnapshots(t, disk, 0)
}

// isTold waits for words in the error of a VolumeSnapshot.
func (v *volumesTest) isTold(t *testing.T, name, words string) {
	t.Helper()
	eventually(t, fmt.Sprintf("VolumeSnapshot %s says %q", name, words), func() error {
		s := &snapshotv1.VolumeSnapshot{}
		err := v.admin.Get(t.Context(), client.ObjectKey{Namespace: "data", Name: name}, s)
		if err == nil && (s.Status == nil || s.Status.Error == nil || !strings.Contains(*s.Status.Error.Message, words)) {
			err = fmt.Errorf("status %+v", s.Status)
		}
		return err
	})
}

// badSnapshots: each is told, and over when its cause is; what is not known is
// neither made twice nor taken for gone.
func (v *volumesTest) badSnapshots(t *testing.T) {
	faults, disk := v.vc.Faults(), v.isBound(t, "snapped").Spec.CSI.VolumeHandle
	for _, day := range []struct {
		name, told string
		fault      vcsim.Fault
	}{
		{"fails", "", vcsim.Fault{Method: "CnsCreateSnapshots", Task: true, Fault: &types.SystemError{}, Times: 1}},
		{"fails-late", "", vcsim.Fault{Method: "CnsCreateSnapshots", Task: true, Late: true, Fault: &types.NoDiskSpace{}, Times: 1}},
		{"answer-lost", "", vcsim.Fault{Method: "CnsCreateSnapshots", Drop: true, Late: true, Times: 1}},
		{"away", "vCenter", vcsim.Fault{Method: "CnsCreateSnapshots", Drop: true}},
		{"full", "has no room", vcsim.Fault{Method: "CnsCreateSnapshots", Task: true, Fault: &types.NoDiskSpace{}}},
	} {
		t.Run(day.name, func(t *testing.T) {
			remove := faults.Add(day.fault)
			defer remove()
			v.take(t, day.name, "snapped", "")
			if day.told != "" {
				v.isTold(t, day.name, day.told)
				if day.name == "full" { // it need not wait for room
					v.dropped(t, day.name)
					return
				}
				remove()
			}
			v.isReady(t, day.name)
			v.hasSnapshots(t, disk, 1)
			v.dropped(t, day.name)
			v.hasSnapshots(t, disk, 0)
		})
	}
	t.Run("not let in", func(t *testing.T) {
		v.take(t, "unseen", "snapped", "")
		s, _ := v.isReady(t, "unseen")
		remove := faults.Add(vcsim.Fault{Method: "CnsQueryVolume", Fault: &types.NoPermission{PrivilegeId: "Cns.Searchable"}})
		v.drop(t, s)
		v.tells(t, "unseen", "SnapshotDeleteFailed", "Cns.Searchable")
		if n := len(v.inVCenter(t, disk)); n != 1 {
			t.Errorf("vCenter has %d snapshots", n)
		}
		remove()
		v.left(t, s)
		v.hasSnapshots(t, disk, 0)
	})
}

// killedSnapshots: as killed, for a snapshot, a claim of it, and its deletion.
func (v *volumesTest) killedSnapshots(t *testing.T) {
	disk := v.isBound(t, "snapped").Spec.CSI.VolumeHandle
	for i, late := range []bool{false, true} {
		fault := func(method string) (vcsim.Fault, func()) {
			if !late {
				return vcsim.Fault{Method: method, Delay: time.Minute}, func() {}
			}
			hold := make(chan struct{})
			return vcsim.Fault{Method: method, Hold: hold}, func() { close(hold) }
		}
		name := fmt.Sprint("snapshot-", i)
		t.Run(map[bool]string{false: "before", true: "after"}[late], func(t *testing.T) {
			f, end := fault("CnsCreateSnapshots")
			v.during(t, f, func() { v.take(t, name, "snapped", "") })
			v.start(t)
			end()
			s, c := v.isReady(t, name)
			if ids := v.inVCenter(t, disk); len(ids) != 1 || *c.Status.SnapshotHandle != disk+"."+ids[0] {
				t.Errorf("vCenter has %q, the content %+v", ids, c.Status)
			}

			f, end = fault("CnsCreateVolume")
			v.during(t, f, func() { v.apply(t, fromSnapshot(newClaim(name, "silver", "32Mi"), name)) })
			v.start(t)
			end()
			v.once(t, name)
			v.hasSize(t, name, 32)
			v.drop(t, v.claim(t, name))

			f, end = fault("CnsDeleteSnapshots")
			v.during(t, f, func() { v.drop(t, s) })
			v.start(t)
			end()
			v.left(t, s)
			v.left(t, c)
			v.hasSnapshots(t, disk, 0)
		})
	}
}
