package controllers

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotfake "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/fake"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"github.com/openatoll/atoll/api/v1alpha1"
	atollcsi "github.com/openatoll/atoll/storage/csi"
)

func (d *driver) CreateSnapshot(_ context.Context, r *csi.CreateSnapshotRequest, _ ...grpc.CallOption) (*csi.CreateSnapshotResponse, error) {
	if d.err != nil {
		return nil, d.err
	}
	d.snapshots = map[string]*csi.Snapshot{"s-1": {SnapshotId: "s-1", SourceVolumeId: r.SourceVolumeId, SizeBytes: 64 << 20, ReadyToUse: true}}
	return &csi.CreateSnapshotResponse{Snapshot: d.snapshots["s-1"]}, nil
}

func (d *driver) DeleteSnapshot(context.Context, *csi.DeleteSnapshotRequest, ...grpc.CallOption) (*csi.DeleteSnapshotResponse, error) {
	return &csi.DeleteSnapshotResponse{}, d.err
}

func (d *driver) ListSnapshots(_ context.Context, r *csi.ListSnapshotsRequest, _ ...grpc.CallOption) (*csi.ListSnapshotsResponse, error) {
	resp := &csi.ListSnapshotsResponse{}
	if s := d.snapshots[r.SnapshotId]; s != nil {
		resp.Entries = append(resp.Entries, &csi.ListSnapshotsResponse_Entry{Snapshot: s})
	}
	return resp, d.err
}

func (d *driver) ControllerGetVolume(_ context.Context, r *csi.ControllerGetVolumeRequest, _ ...grpc.CallOption) (*csi.ControllerGetVolumeResponse, error) {
	if d.err != nil {
		return nil, d.err
	}
	if r.VolumeId != "id" {
		return nil, status.Error(codes.NotFound, "there is none")
	}
	return &csi.ControllerGetVolumeResponse{}, nil
}

func ptr[T any](v T) *T { return &v }

// snapshotOf is a VolumeSnapshot that is ready, and its content of node n1.
func snapshotOf() (*snapshotv1.VolumeSnapshot, *snapshotv1.VolumeSnapshotContent) {
	s := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "snap", UID: "s-uid"},
		Status: &snapshotv1.VolumeSnapshotStatus{ReadyToUse: ptr(true), BoundVolumeSnapshotContentName: ptr("content")}}
	c := &snapshotv1.VolumeSnapshotContent{
		ObjectMeta: metav1.ObjectMeta{Name: "content", ResourceVersion: "1", Labels: map[string]string{ContentKeeper: "n1"}},
		Spec: snapshotv1.VolumeSnapshotContentSpec{
			Driver: atollcsi.Name, DeletionPolicy: snapshotv1.VolumeSnapshotContentDelete, SourceVolumeMode: ptr(corev1.PersistentVolumeFilesystem),
			VolumeSnapshotRef: corev1.ObjectReference{Namespace: "ns", Name: "snap", UID: "s-uid"},
			Source:            snapshotv1.VolumeSnapshotContentSource{VolumeHandle: ptr("id")},
		},
		Status: &snapshotv1.VolumeSnapshotContentStatus{SnapshotHandle: ptr("s-1"), ReadyToUse: ptr(true), RestoreSize: ptr[int64](64 << 20)},
	}
	return s, c
}

func TestRestore(t *testing.T) {
	type objects struct {
		s *snapshotv1.VolumeSnapshot
		c *snapshotv1.VolumeSnapshotContent
		p *corev1.PersistentVolumeClaim
		d *driver
	}
	for name, tt := range map[string]struct {
		change func(o objects)
		want   string // in the error; "" if it is to succeed
	}{
		"as it should be": {func(objects) {}, ""},
		"larger":          {func(o objects) { o.p.Spec.Resources.Requests = quantities("1Gi") }, ""},
		"too small":       {func(o objects) { o.p.Spec.Resources.Requests = quantities("32Mi") }, "32Mi is less than the 64Mi of VolumeSnapshot snap"},
		"none":            {func(o objects) { o.p.Spec.DataSource.Name = "other" }, "VolumeSnapshot other is not there"},
		"not ready":       {func(o objects) { o.s.Status.ReadyToUse = ptr(false) }, "not ready"},
		"being deleted": {func(o objects) {
			o.s.DeletionTimestamp, o.s.Finalizers = ptr(metav1.Now()), []string{"f"}
		}, "is being deleted"},
		"bound to another": {func(o objects) { o.c.Spec.VolumeSnapshotRef.UID = "other" }, "bound to another VolumeSnapshot"},
		"another driver's": {func(o objects) { o.c.Spec.Driver = "example.com" }, "of driver example.com"},
		"a device of a file system": {func(o objects) {
			o.p.Spec.VolumeMode = ptr(corev1.PersistentVolumeBlock)
		}, "is of a volume with mode Filesystem"},
		"allowed by an admin": {func(o objects) {
			o.p.Spec.VolumeMode, o.c.Annotations = ptr(corev1.PersistentVolumeBlock), map[string]string{annVolumeMode: "true"}
		}, ""},
		"vCenter's": {func(o objects) {
			o.d.snapshots, o.c.Labels[ContentKeeper] = nil, v1alpha1.ContentOfVCenter+"uuid"
		}, "is of a disk in vCenter, which node n1 does not reach"},
		"another node's": {func(o objects) {
			o.d.snapshots, o.c.Labels[ContentKeeper] = nil, "n2"
		}, `cannot be reached from node n1, node "n2" cares for it`},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := snapshotOf()
			d := &driver{snapshots: map[string]*csi.Snapshot{"s-1": {SnapshotId: "s-1"}}}
			p := &provisioner{newGroup(t, d, nil, nil)}
			claim := claimOf("64Mi", "")
			claim.Spec.DataSource = &corev1.TypedLocalObjectReference{APIGroup: ptr(snapshotGroup), Kind: "VolumeSnapshot", Name: "snap"}
			tt.change(objects{s, c, claim, d})
			p.snapshots = snapshotfake.NewSimpleClientset(s, c).SnapshotV1()
			_, _, err := p.Provision(t.Context(), controller.ProvisionOptions{PVC: claim, PVName: "x", StorageClass: &storagev1.StorageClass{}})
			switch {
			case tt.want == "" && (err != nil || d.created.VolumeContentSource.GetSnapshot().GetSnapshotId() != "s-1"):
				t.Errorf("%v, asked for %v", err, d.created)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want) || d.created != nil):
				t.Errorf("error %v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestCloneIsNoSmallerThanItsSource(t *testing.T) {
	d := &driver{}
	p := &provisioner{newGroup(t, d, claimOf("64Mi", "64Mi"), pvOf("64Mi", "n1"))}
	clone := claimOf("32Mi", "")
	clone.Name, clone.Spec.DataSource = "clone", &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: "data"}
	_, _, err := p.Provision(t.Context(), controller.ProvisionOptions{PVC: clone, PVName: "x", StorageClass: &storagev1.StorageClass{}})
	if err == nil || !strings.Contains(err.Error(), "32Mi is less than the 64Mi of claim data") || d.created != nil {
		t.Errorf("error %v, asked for %v", err, d.created)
	}
}

// running runs the snapshots' half of a node n1 over a content.
func running(t *testing.T, d *driver, c *snapshotv1.VolumeSnapshotContent) func() *snapshotv1.VolumeSnapshotContent {
	t.Helper()
	client := snapshotfake.NewSimpleClientset(c, &snapshotv1.VolumeSnapshotClass{ObjectMeta: metav1.ObjectMeta{Name: "atoll"}, Driver: atollcsi.Name})
	g := newGroup(t, d, nil, nil)
	g.snapshots = client.SnapshotV1()
	s := newSnapshotting(g, client, g.NodeName)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	return func() *snapshotv1.VolumeSnapshotContent {
		got, err := g.snapshots.VolumeSnapshotContents().Get(t.Context(), c.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in 20 s: %s", what)
		}
	}
}

// A content of this node gets its snapshot; what the driver says goes to users.
func TestSnapshotIsTaken(t *testing.T) {
	_, c := snapshotOf()
	c.Status, c.Spec.VolumeSnapshotClassName = nil, ptr("atoll")
	content := running(t, &driver{}, c)
	until(t, "a snapshot", func() bool {
		s := content().Status
		return s != nil && s.ReadyToUse != nil && *s.ReadyToUse && *s.SnapshotHandle == "s-1" && *s.RestoreSize == 64<<20
	})

	c.Status = nil
	content = running(t, &driver{err: status.Error(codes.FailedPrecondition, "a VM writes to it")}, c)
	// Between two tries upstream's controller may tell of its own cache, which lags.
	until(t, "the driver's error", func() bool {
		s := content().Status
		return s != nil && s.Error != nil && strings.HasSuffix(*s.Error.Message, `: "a VM writes to it"`)
	})
}

// The clients' stand-ins have no watches that begin with what is there.
func TestMain(m *testing.M) {
	if err := os.Setenv("KUBE_FEATURE_WatchListClient", "false"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}
