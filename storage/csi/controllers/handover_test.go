package controllers

import (
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotfake "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/fake"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/utils"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// heldBy is the driver's answer where another node alone can copy a volume.
func heldBy(t *testing.T, node string) error {
	t.Helper()
	s, err := status.New(codes.FailedPrecondition, "a VM writes to it").WithDetails(
		&errdetails.ErrorInfo{Domain: "csi.atoll.dev", Reason: "VOLUME_HELD_ELSEWHERE", Metadata: map[string]string{"host": node}})
	if err != nil {
		t.Fatal(err)
	}
	return s.Err()
}

func (g *group) addNode(t *testing.T, name string, ready corev1.ConditionStatus) {
	t.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
	if _, err := g.client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// What a try says of another node is kept until the next one, and the content is
// given to that when it changes. (With upstream's controller, and an API server that
// knows versions: TestSnapshots of supervisor/controlplane.)
func TestSnapshotIsHandedOver(t *testing.T) {
	_, c := snapshotOf()
	c.Status = &snapshotv1.VolumeSnapshotContentStatus{ReadyToUse: ptr(false), Error: &snapshotv1.VolumeSnapshotError{Message: ptr("why")}}
	d, client := &driver{err: heldBy(t, "n2")}, snapshotfake.NewSimpleClientset(c)
	g := newGroup(t, d, nil, nil)
	g.addNode(t, "n2", corev1.ConditionTrue)
	g.snapshots = client.SnapshotV1()
	s := newSnapshotting(g, client, g.NodeName)
	s.calls.begin(t.Context(), func() {})
	try := func() error {
		_, _, _, _, _, err := s.calls.CreateSnapshot(t.Context(), "snapshot-s-uid", "id", map[string]string{utils.PrefixedVolumeSnapshotContentNameKey: c.Name}, nil)
		return err
	}
	// Upstream takes the try for ended, and shows users the sentence alone.
	if err := try(); status.Code(err) != codes.FailedPrecondition || err.Error() != "a VM writes to it" || s.handover.named(c.Name) != "n2" {
		t.Fatalf("%v, named %q", err, s.handover.named(c.Name))
	}
	s.mine.Start(t.Context().Done())
	name, _ := s.handover.queue.Get()
	if err := s.handover.give(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	got, err := g.snapshots.VolumeSnapshotContents().Get(t.Context(), c.Name, metav1.GetOptions{})
	if err != nil || got.Labels[ContentKeeper] != "n2" {
		t.Errorf("%s is kept by %v (err %v)", name, got.Labels, err)
	}
	recorder, ok := g.events.(*record.FakeRecorder)
	if !ok {
		t.Fatal("another recorder")
	}
	for _, on := range []string{"content", "snapshot"} {
		if e := <-recorder.Events; !strings.Contains(e, "Normal SnapshotHandedOver node n2 takes this snapshot") {
			t.Errorf("event on the %s: %s", on, e)
		}
	}
	_ = try()
	d.err = nil
	if err := try(); err != nil || s.handover.named(c.Name) != "" {
		t.Errorf("%v, named %q", err, s.handover.named(c.Name))
	}
}

func TestHandedOverOnlyWhatIsNotBegun(t *testing.T) {
	failed := &snapshotv1.VolumeSnapshotContentStatus{ReadyToUse: ptr(false), Error: &snapshotv1.VolumeSnapshotError{Message: ptr("why")}}
	for name, tt := range map[string]struct {
		node   corev1.ConditionStatus // "": there is none
		change func(*snapshotv1.VolumeSnapshotContent)
		event  string
		want   string
	}{
		"as it should be": {corev1.ConditionTrue, func(*snapshotv1.VolumeSnapshotContent) {}, "SnapshotHandedOver", "n2"},
		"not ready":       {corev1.ConditionFalse, func(*snapshotv1.VolumeSnapshotContent) {}, "Warning SnapshotWaits node n2", "n1"},
		"gone":            {"", func(*snapshotv1.VolumeSnapshotContent) {}, "Warning SnapshotWaits node n2", "n1"},
		"being tried": {corev1.ConditionTrue, func(c *snapshotv1.VolumeSnapshotContent) {
			c.Annotations = map[string]string{utils.AnnVolumeSnapshotBeingCreated: "yes"}
		}, "", "n1"},
		"not told":  {corev1.ConditionTrue, func(c *snapshotv1.VolumeSnapshotContent) { c.Status = nil }, "", "n1"},
		"taken":     {corev1.ConditionTrue, func(c *snapshotv1.VolumeSnapshotContent) { c.Status.SnapshotHandle = ptr("s-1") }, "", "n1"},
		"being cut": {corev1.ConditionTrue, func(c *snapshotv1.VolumeSnapshotContent) { c.Status.CreationTime = ptr[int64](1) }, "", "n1"},
		"going": {corev1.ConditionTrue, func(c *snapshotv1.VolumeSnapshotContent) {
			c.DeletionTimestamp, c.Finalizers = ptr(metav1.Now()), []string{"f"}
		}, "", "n1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, c := snapshotOf()
			c.Status = failed.DeepCopy()
			tt.change(c)
			client := snapshotfake.NewSimpleClientset(c)
			g := newGroup(t, &driver{}, nil, nil)
			if tt.node != "" {
				g.addNode(t, "n2", tt.node)
			}
			g.snapshots = client.SnapshotV1()
			s := newSnapshotting(g, client, g.NodeName)
			if err := s.mine.Snapshot().V1().VolumeSnapshotContents().Informer().GetStore().Add(c); err != nil {
				t.Fatal(err)
			}
			s.handover.tried(c.Name, "n2")
			if err := s.handover.give(t.Context(), c.Name); err != nil {
				t.Fatal(err)
			}
			got, err := g.snapshots.VolumeSnapshotContents().Get(t.Context(), c.Name, metav1.GetOptions{})
			if err != nil || got.Labels[ContentKeeper] != tt.want {
				t.Errorf("kept by %v, want %s (err %v)", got.Labels, tt.want, err)
			}
			said := ""
			select {
			case said = <-g.events.(*record.FakeRecorder).Events:
			default:
			}
			if !strings.Contains(said, tt.event) || tt.event == "" && said != "" {
				t.Errorf("event %q, want %q in it", said, tt.event)
			}
			if left := s.handover.named(c.Name); (left == "") != (tt.want == "n2" || name == "going") {
				t.Errorf("remembered: %q", left)
			}
		})
	}
}

// A clone of what another node has open is refused in that one's favour, whatever its
// class, unless that node is down.
func TestCloneIsHandedOver(t *testing.T) {
	for name, tt := range map[string]struct {
		ready corev1.ConditionStatus
		want  string
	}{"ready": {corev1.ConditionTrue, v1alpha1.ClaimOfNode + "n2"}, "down": {corev1.ConditionFalse, ""}} {
		for _, mode := range []storagev1.VolumeBindingMode{storagev1.VolumeBindingImmediate, storagev1.VolumeBindingWaitForFirstConsumer} {
			t.Run(name+" "+string(mode), func(t *testing.T) {
				clone := claimOf("64Mi", "")
				clone.Name, clone.UID, clone.ResourceVersion = "clone", "clone-uid", "7"
				clone.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: "data"}
				p := &provisioner{newGroup(t, &driver{err: heldBy(t, "n2")}, claimOf("64Mi", "64Mi"), pvOf("64Mi", "n1"))}
				p.addNode(t, "n2", tt.ready)
				if _, err := p.client.CoreV1().PersistentVolumeClaims("ns").Create(t.Context(), clone, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
				_, state, err := p.Provision(t.Context(), controller.ProvisionOptions{PVC: clone, PVName: "pvc-clone", StorageClass: &storagev1.StorageClass{VolumeBindingMode: &mode}})
				if err == nil || !strings.Contains(err.Error(), "a VM writes to it") || state != controller.ProvisioningFinished {
					t.Errorf("%v, state %s", err, state)
				}
				got, err := p.client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "clone", metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				reason := ""
				for _, c := range got.Status.Conditions {
					if c.Type == v1alpha1.ClaimRefused && c.Status == corev1.ConditionTrue && c.Message == "node n1: a VM writes to it" {
						reason = c.Reason
					}
				}
				if reason != tt.want || p.refusals.stands(got) != (tt.want != "") {
					t.Errorf("conditions %+v, want reason %q", got.Status.Conditions, tt.want)
				}
			})
		}
	}
}
