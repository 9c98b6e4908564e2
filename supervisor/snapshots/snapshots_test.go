package snapshots

import (
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotfake "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/fake"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/utils"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// seen is a cluster whose caches have what is there.
func seen(t *testing.T, core, kinds []runtime.Object, prepare func(*cluster)) (*cluster, *record.FakeRecorder) {
	t.Helper()
	events := record.NewFakeRecorder(10)
	w := newController(fake.NewClientset(core...), snapshotfake.NewSimpleClientset(kinds...), slog.New(slog.DiscardHandler)).watch(events)
	prepare(w)
	w.core.Start(t.Context().Done())
	w.kinds.Start(t.Context().Done())
	w.core.WaitForCacheSync(t.Context().Done())
	w.kinds.WaitForCacheSync(t.Context().Done())
	return w, events
}

func node(name string, ready corev1.ConditionStatus) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
}

func content(name, node string) *snapshotv1.VolumeSnapshotContent {
	c := &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Now()},
		Spec: snapshotv1.VolumeSnapshotContentSpec{Driver: v1alpha1.CSIDriverName, VolumeSnapshotRef: corev1.ObjectReference{Namespace: "ns", Name: "snap", UID: "uid"}}}
	if node != "" {
		c.Labels = map[string]string{managedBy: node}
	}
	return c
}

// The label of a node that is gone goes; what no node takes is said.
func TestKeep(t *testing.T) {
	var k *keeper
	other := content("other", "gone")
	other.Spec.Driver = "example.com"
	w, events := seen(t, []runtime.Object{node("n1", corev1.ConditionTrue)},
		[]runtime.Object{content("kept", "n1"), content("left", "gone"), other, content("free", ""), content("far", v1alpha1.ContentOfVCenter+"uuid")}, func(w *cluster) { k = newKeeper(w) })
	for name, want := range map[string]string{"kept": "n1", "left": "", "other": "gone", "far": v1alpha1.ContentOfVCenter + "uuid"} {
		if err := k.keep(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		got, err := w.snapshots.SnapshotV1().VolumeSnapshotContents().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || got.Labels[managedBy] != want {
			t.Errorf("%s: node %q, want %q (err %v)", name, got.Labels[managedBy], want, err)
		}
	}
	if e := <-events.Events; !strings.Contains(e, "NodeGone") {
		t.Errorf("event %s", e)
	}
	if err := k.keep(t.Context(), "free"); err != nil || len(events.Events) != 0 {
		t.Fatalf("%v, %d events at once", err, len(events.Events))
	}
	k.now = func() time.Time { return time.Now().Add(2 * takeTime) }
	if err := k.keep(t.Context(), "free"); err != nil {
		t.Fatal(err)
	}
	if got := []string{<-events.Events, <-events.Events}; !strings.Contains(got[0], "neither a node nor vCenter is known to have this snapshot") || !strings.Contains(got[1], "(free)") {
		t.Errorf("events %q", got)
	}
}

// A content that nobody has can go where nothing is to be deleted with it, and says
// so where something is.
func TestKeepLetsGo(t *testing.T) {
	deleted := func(name string, policy snapshotv1.DeletionPolicy, change func(*snapshotv1.VolumeSnapshotContent)) *snapshotv1.VolumeSnapshotContent {
		c := content(name, "")
		now := metav1.Now()
		c.DeletionTimestamp, c.Spec.DeletionPolicy = &now, policy
		c.Finalizers = []string{utils.VolumeSnapshotContentFinalizer, "example.com/other"}
		c.Annotations = map[string]string{utils.AnnVolumeSnapshotBeingDeleted: "yes"}
		change(c)
		return c
	}
	nothing := func(*snapshotv1.VolumeSnapshotContent) {}
	var k *keeper
	w, events := seen(t, nil, []runtime.Object{
		deleted("retained", snapshotv1.VolumeSnapshotContentRetain, nothing),
		deleted("unbound", snapshotv1.VolumeSnapshotContentRetain, func(c *snapshotv1.VolumeSnapshotContent) {
			c.Annotations, c.Spec.VolumeSnapshotRef.UID = nil, ""
		}),
		deleted("had", snapshotv1.VolumeSnapshotContentRetain, func(c *snapshotv1.VolumeSnapshotContent) { c.Annotations = nil }),
		deleted("unknown", snapshotv1.VolumeSnapshotContentDelete, nothing),
	}, func(w *cluster) { k = newKeeper(w) })
	k.now = func() time.Time { return time.Now().Add(2 * takeTime) }
	for name, want := range map[string]int{"retained": 1, "unbound": 1, "had": 2, "unknown": 2} {
		if err := k.keep(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		got, err := w.snapshots.SnapshotV1().VolumeSnapshotContents().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil || len(got.Finalizers) != want {
			t.Errorf("%s: finalizers %q, want %d (err %v)", name, got.Finalizers, want, err)
		}
	}
	if e := <-events.Events; !strings.Contains(e, "set spec.deletionPolicy to Retain") {
		t.Errorf("event %s", e)
	}
}

// The clients' stand-ins have no watches that begin with what is there.
func TestMain(m *testing.M) {
	if err := os.Setenv("KUBE_FEATURE_WatchListClient", "false"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}
