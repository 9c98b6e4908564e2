package controllers

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"
	storagehelpers "k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	atollcsi "github.com/openatoll/atoll/storage/csi"
)

// driver answers as told.
type driver struct {
	csi.ControllerClient // the calls that no test makes
	created              *csi.CreateVolumeRequest
	deleted, expanded    string
	err                  error
	room                 int64
	snapshots            map[string]*csi.Snapshot
}

func (d *driver) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest, _ ...grpc.CallOption) (*csi.CreateVolumeResponse, error) {
	d.created = r
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId: "id", CapacityBytes: 64 << 20, VolumeContext: map[string]string{"a": "b"},
		AccessibleTopology: []*csi.Topology{{Segments: map[string]string{atollcsi.TopologyHost: "n1"}}},
	}}, d.err
}

func (d *driver) DeleteVolume(_ context.Context, r *csi.DeleteVolumeRequest, _ ...grpc.CallOption) (*csi.DeleteVolumeResponse, error) {
	d.deleted = r.VolumeId
	return &csi.DeleteVolumeResponse{}, d.err
}

func (d *driver) ControllerExpandVolume(_ context.Context, r *csi.ControllerExpandVolumeRequest, _ ...grpc.CallOption) (*csi.ControllerExpandVolumeResponse, error) {
	d.expanded = r.VolumeId
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: r.CapacityRange.RequiredBytes, NodeExpansionRequired: true}, d.err
}

func (d *driver) GetCapacity(context.Context, *csi.GetCapacityRequest, ...grpc.CallOption) (*csi.GetCapacityResponse, error) {
	return &csi.GetCapacityResponse{AvailableCapacity: d.room}, d.err
}

func newGroup(t *testing.T, d *driver, claim *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume) *group {
	t.Helper()
	client := fake.NewClientset(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "node-uid"}})
	g := &group{Config: Config{NodeName: "n1", Namespace: "kube-system", Logger: slog.New(slog.DiscardHandler)}, Driver: atollcsi.Name, client: client, controller: d,
		factory: informers.NewSharedInformerFactory(client, 0), events: record.NewFakeRecorder(10), segments: map[string]string{atollcsi.TopologyHost: "n1"}}
	g.scope = nodeScope{"n1", g.segments}
	g.capacity, g.refusals = newCapacityController(g), newRefusals(g)
	if claim != nil {
		if _, err := client.CoreV1().PersistentVolumeClaims(claim.Namespace).Create(t.Context(), claim, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := g.factory.Core().V1().PersistentVolumeClaims().Informer().GetStore().Add(claim); err != nil {
			t.Fatal(err)
		}
	}
	if pv != nil {
		if _, err := client.CoreV1().PersistentVolumes().Create(t.Context(), pv, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := g.factory.Core().V1().PersistentVolumes().Informer().GetStore().Add(pv); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

func quantities(s string) corev1.ResourceList {
	return corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(s)}
}

func claimOf(asked, has string) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data", UID: "c-uid", Annotations: map[string]string{storagehelpers.AnnSelectedNode: "n1"}},
		Spec: corev1.PersistentVolumeClaimSpec{AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOncePod}, Resources: corev1.VolumeResourceRequirements{Requests: quantities(asked)}}}
	if has != "" {
		c.Spec.VolumeName = "pv"
		c.Status = corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound, Capacity: quantities(has)}
	}
	return c
}

func pvOf(has, host string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: corev1.PersistentVolumeSpec{
		Capacity: quantities(has), ClaimRef: &corev1.ObjectReference{UID: "c-uid"},
		NodeAffinity:           affinity([]*csi.Topology{{Segments: map[string]string{atollcsi.TopologyHost: host}}}),
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: atollcsi.Name, VolumeHandle: "id"}},
	}}
}

// TestNodesLeaveVCenterAlone: neither claims nor volumes of its policies are a
// node's, whatever says that they are in reach.
func TestNodesLeaveVCenterAlone(t *testing.T) {
	d := &driver{}
	pv := pvOf("64Mi", "n1")
	pv.Spec.CSI.VolumeAttributes = map[string]string{VCenterAttribute: "uuid"}
	p := &provisioner{newGroup(t, d, nil, pv)}
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "gold"}, Parameters: map[string]string{"storagePolicyID": "id"}}
	claim := claimOf("64Mi", "")
	claim.Spec.StorageClassName = &class.Name
	if !p.ShouldProvision(t.Context(), claim) {
		t.Error("a class that the cache has not seen is not waited for")
	}
	if _, _, err := p.Provision(t.Context(), controller.ProvisionOptions{PVC: claim, PVName: "pvc-1", StorageClass: class}); !ignored(err) || d.created != nil {
		t.Errorf("Provision = %v, %v", err, d.created)
	}
	if err := p.factory.Storage().V1().StorageClasses().Informer().GetStore().Add(class); err != nil {
		t.Fatal(err)
	}
	if p.ShouldProvision(t.Context(), claim) || p.ShouldDelete(t.Context(), pv) {
		t.Error("a node takes what is vCenter's")
	}
	if err := p.Delete(t.Context(), pv); !ignored(err) || d.deleted != "" {
		t.Errorf("Delete = %v, %q", err, d.deleted)
	}
}

func ignored(err error) bool {
	var i *controller.IgnoredError
	return errors.As(err, &i)
}

func TestProvision(t *testing.T) {
	d := &driver{}
	p := &provisioner{newGroup(t, d, nil, nil)}
	claim := claimOf("64Mi", "")
	retain := corev1.PersistentVolumeReclaimRetain
	pv, state, err := p.Provision(t.Context(), controller.ProvisionOptions{PVC: claim, PVName: "pvc-1", StorageClass: &storagev1.StorageClass{
		Parameters: map[string]string{"policy": "gold", parameterFSType: "xfs"}, MountOptions: []string{"noatime"}, ReclaimPolicy: &retain,
	}})
	if err != nil || state != controller.ProvisioningFinished {
		t.Fatalf("%v, %v", state, err)
	}
	c := d.created.VolumeCapabilities[0]
	if c.GetMount().GetFsType() != "xfs" || c.GetMount().GetMountFlags()[0] != "noatime" || c.AccessMode.Mode != csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER {
		t.Errorf("capability %v", c)
	}
	if d.created.Parameters["policy"] != "gold" || d.created.Parameters[parameterFSType] != "" || d.created.Parameters[parameterPrefix+"pvc/name"] != "data" {
		t.Errorf("parameters %v", d.created.Parameters)
	}
	if pv.Spec.CSI.FSType != "xfs" || pv.Spec.PersistentVolumeReclaimPolicy != retain || !p.mine(pv) {
		t.Errorf("PersistentVolume %+v", pv.Spec)
	}
	other := pv.DeepCopy()
	other.Spec.NodeAffinity = affinity([]*csi.Topology{{Segments: map[string]string{atollcsi.TopologyHost: "n2"}}})
	if p.ShouldDelete(t.Context(), other) || p.Delete(t.Context(), other) == nil || d.deleted != "" {
		t.Error("a volume of another node was deleted")
	}
	if err := p.Delete(t.Context(), pv); err != nil || d.deleted != "id" {
		t.Errorf("deleted %q, %v", d.deleted, err)
	}
	claim.Annotations[storagehelpers.AnnSelectedNode] = "n2"
	if p.ShouldProvision(t.Context(), claim) {
		t.Error("a claim of another node is provisioned")
	}
}

// A volume that may be in the making is asked for until it is known.
func TestProvisionStates(t *testing.T) {
	for code, want := range map[codes.Code]controller.ProvisioningState{
		codes.Unavailable: controller.ProvisioningInBackground, codes.DeadlineExceeded: controller.ProvisioningInBackground,
		codes.ResourceExhausted: controller.ProvisioningFinished, codes.InvalidArgument: controller.ProvisioningFinished,
	} {
		p := &provisioner{newGroup(t, &driver{err: status.Error(code, "why")}, nil, nil)}
		_, got, err := p.Provision(t.Context(), controller.ProvisionOptions{PVC: claimOf("1Mi", ""), PVName: "x", StorageClass: &storagev1.StorageClass{}})
		if got != want || err == nil {
			t.Errorf("%s: %s, %v", code, got, err)
		}
	}
}

func TestClonesOnlyOfWhatIsHere(t *testing.T) {
	for host, ok := range map[string]bool{"n1": true, "n2": false} {
		d := &driver{}
		p := &provisioner{newGroup(t, d, claimOf("64Mi", "64Mi"), pvOf("64Mi", host))}
		clone := claimOf("64Mi", "")
		clone.Name, clone.Spec.DataSource = "clone", &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: "data"}
		_, _, err := p.Provision(t.Context(), controller.ProvisionOptions{PVC: clone, PVName: "x", StorageClass: &storagev1.StorageClass{}})
		if (err == nil) != ok || ok && d.created.VolumeContentSource.GetVolume().GetVolumeId() != "id" {
			t.Errorf("source on %s: %v", host, err)
		}
	}
}

func TestResize(t *testing.T) {
	for _, tt := range []struct {
		name, pv, host string
		err            error
		want           corev1.ClaimResourceStatus
		capacity       string
		fails          bool
	}{
		{"driver first", "64Mi", "n1", nil, corev1.PersistentVolumeClaimNodeResizePending, "128Mi", false},
		{"the kubelet's turn is announced again", "128Mi", "n1", nil, corev1.PersistentVolumeClaimNodeResizePending, "128Mi", false},
		{"another node's", "64Mi", "n2", nil, "", "64Mi", false},
		{"no room", "64Mi", "n1", status.Error(codes.ResourceExhausted, "full"), corev1.PersistentVolumeClaimControllerResizeInProgress, "64Mi", true},
		{"never", "64Mi", "n1", status.Error(codes.OutOfRange, "too large"), corev1.PersistentVolumeClaimControllerResizeInfeasible, "64Mi", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			g := newGroup(t, &driver{err: tt.err}, claimOf("128Mi", "64Mi"), pvOf(tt.pv, tt.host))
			r := newResizer(g)
			if err := r.sync(t.Context(), "ns/data"); (err != nil) != tt.fails {
				t.Fatal(err)
			}
			claim, err := g.client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "data", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got := claim.Status.AllocatedResourceStatuses[corev1.ResourceStorage]; got != tt.want {
				t.Errorf("state %q, want %q", got, tt.want)
			}
			pv, err := g.client.CoreV1().PersistentVolumes().Get(t.Context(), "pv", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if got := pv.Spec.Capacity[corev1.ResourceStorage]; got.Cmp(resource.MustParse(tt.capacity)) != 0 {
				t.Errorf("the volume has %s, want %s", got.String(), tt.capacity)
			}
		})
	}
}

func TestCapacity(t *testing.T) {
	d := &driver{room: 1 << 30}
	g := newGroup(t, d, nil, nil)
	classes := g.factory.Storage().V1().StorageClasses().Informer().GetStore()
	ours := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "ours"}, Provisioner: atollcsi.Name}
	for _, c := range []*storagev1.StorageClass{ours, {ObjectMeta: metav1.ObjectMeta{Name: "theirs"}, Provisioner: "example.com"}} {
		if err := classes.Add(c); err != nil {
			t.Fatal(err)
		}
	}
	published := func(want ...int64) {
		t.Helper()
		if err := g.capacity.publish(t.Context()); err != nil {
			t.Fatal(err)
		}
		list, err := g.client.StorageV1().CSIStorageCapacities("kube-system").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(list.Items) != len(want) {
			t.Fatalf("%+v, %v", list, err)
		}
		for i, o := range list.Items {
			if o.Capacity.Value() != want[i] || o.StorageClassName != "ours" || o.NodeTopology.MatchLabels[atollcsi.TopologyHost] != "n1" || o.OwnerReferences[0].UID != "node-uid" {
				t.Errorf("%+v", o)
			}
		}
	}
	published(1 << 30)
	d.room = 5
	published(5)
	d.err = status.Error(codes.Unavailable, "not mounted")
	published(0)
	d.err = nil
	published(5)
	if err := classes.Delete(ours); err != nil {
		t.Fatal(err)
	}
	published()
}
