package placement

import (
	"log/slog"
	"os"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotfake "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/fake"
	snapshotinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"
	storagehelpers "k8s.io/component-helpers/storage/volume"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const host = "topology.atoll.dev/host"

func ptr[T any](v T) *T { return &v }

// seen is a cluster whose caches have what is there.
func seen(t *testing.T, core, kinds []runtime.Object, prepare func(Cluster)) (Cluster, *record.FakeRecorder) {
	t.Helper()
	events, client := record.NewFakeRecorder(10), fake.NewClientset(core...)
	w := Cluster{Client: client, Events: events, Log: slog.New(slog.DiscardHandler), Core: informers.NewSharedInformerFactory(client, 0),
		Kinds: snapshotinformers.NewSharedInformerFactory(snapshotfake.NewSimpleClientset(kinds...), 0)}
	prepare(w)
	w.Core.Start(t.Context().Done())
	w.Kinds.Start(t.Context().Done())
	w.Core.WaitForCacheSync(t.Context().Done())
	w.Kinds.WaitForCacheSync(t.Context().Done())
	return w, events
}

func node(name string, ready corev1.ConditionStatus) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{host: name, "shared": "true"}},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
}

func claim(name string, change func(*corev1.PersistentVolumeClaim)) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, ResourceVersion: "7"}, Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: ptr("ours")}}
	change(c)
	return c
}

func restores(kind, name string) func(*corev1.PersistentVolumeClaim) {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.DataSourceRef = &corev1.TypedObjectReference{Kind: kind, Name: name}
		if kind == kindSnapshot {
			c.Spec.DataSourceRef.APIGroup = ptr(snapshotv1.GroupName)
		}
	}
}

func volume(name, key, value string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
		NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: key, Operator: corev1.NodeSelectorOpIn, Values: []string{value}}}}}}},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: v1alpha1.CSIDriverName}},
	}}
}

func content(name, node string) *snapshotv1.VolumeSnapshotContent {
	c := &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Now()},
		Spec: snapshotv1.VolumeSnapshotContentSpec{Driver: v1alpha1.CSIDriverName, VolumeSnapshotRef: corev1.ObjectReference{Namespace: "ns", Name: "snap", UID: "uid"}}}
	if node != "" {
		c.Labels = map[string]string{managedBy: node}
	}
	return c
}

// A claim goes where its source is: the scheduler's choice stands if that is such
// a place, and is changed if not.
func TestPlace(t *testing.T) {
	bound := func(volume string) func(*corev1.PersistentVolumeClaim) {
		return func(c *corev1.PersistentVolumeClaim) {
			c.Spec.VolumeName, c.Status.Phase = volume, corev1.ClaimBound
		}
	}
	chosen := func(node string, and func(*corev1.PersistentVolumeClaim)) func(*corev1.PersistentVolumeClaim) {
		return func(c *corev1.PersistentVolumeClaim) {
			and(c)
			c.Annotations = map[string]string{storagehelpers.AnnSelectedNode: node}
		}
	}
	for name, tt := range map[string]struct {
		claim func(*corev1.PersistentVolumeClaim)
		want  string
	}{
		"a snapshot":                        {restores(kindSnapshot, "snap"), "n2"},
		"against the scheduler":             {chosen("n1", restores(kindSnapshot, "snap")), "n2"},
		"a snapshot that is not ready":      {restores(kindSnapshot, "unready"), ""},
		"a snapshot that is not there":      {chosen("n1", restores(kindSnapshot, "none")), "n1"},
		"a claim":                           {restores(kindClaim, "local"), "n2"},
		"a shared claim, on a node that is": {restores(kindClaim, "shared"), "n2"},
		"a shared claim, as scheduled":      {chosen("n1", restores(kindClaim, "shared")), "n1"},
		"an unbound claim":                  {restores(kindClaim, "unbound"), ""},
		"a snapshot in vCenter":             {restores(kindSnapshot, "far"), ""},
		"vCenter's class": {func(c *corev1.PersistentVolumeClaim) {
			restores(kindSnapshot, "snap")(c)
			c.Spec.StorageClassName = ptr("vcenter")
		}, ""},
		"nothing": {func(*corev1.PersistentVolumeClaim) {}, ""},
		"another class": {func(c *corev1.PersistentVolumeClaim) {
			restores(kindSnapshot, "snap")(c)
			c.Spec.StorageClassName = ptr("theirs")
		}, ""},
		"another namespace's": {func(c *corev1.PersistentVolumeClaim) {
			restores(kindSnapshot, "snap")(c)
			c.Spec.DataSourceRef.Namespace = ptr("other")
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			snap := func(name string, ready bool) *snapshotv1.VolumeSnapshot {
				return &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name},
					Status: &snapshotv1.VolumeSnapshotStatus{ReadyToUse: &ready, BoundVolumeSnapshotContentName: ptr("content")}}
			}
			far := snap("far", true)
			far.Status.BoundVolumeSnapshotContentName = ptr("in-vcenter")
			var p *Placer
			w, events := seen(t, []runtime.Object{
				node("n1", corev1.ConditionFalse), node("n2", corev1.ConditionTrue),
				&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "ours"}, Provisioner: v1alpha1.CSIDriverName},
				&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "theirs"}, Provisioner: "example.com"},
				&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "vcenter"}, Provisioner: v1alpha1.CSIDriverName, Parameters: map[string]string{v1alpha1.PolicyIDParameter: "id"}},
				volume("pv-local", host, "n2"), volume("pv-shared", "shared", "true"),
				claim("local", bound("pv-local")), claim("shared", bound("pv-shared")), claim("unbound", func(*corev1.PersistentVolumeClaim) {}),
				claim("new", tt.claim),
			}, []runtime.Object{snap("snap", true), snap("unready", false), far, content("content", "n2"), content("in-vcenter", v1alpha1.ContentOfVCenter+"uuid")}, func(w Cluster) { p = New(w) })
			if err := p.place(t.Context(), "ns/new"); err != nil {
				t.Fatal(err)
			}
			got, err := w.Client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "new", metav1.GetOptions{})
			if err != nil || got.Annotations[storagehelpers.AnnSelectedNode] != tt.want {
				t.Errorf("selected node %q, want %q (err %v)", got.Annotations[storagehelpers.AnnSelectedNode], tt.want, err)
			}
			if name == "a snapshot in vCenter" {
				if e := <-events.Events; !strings.Contains(e, "NotPlaced VolumeSnapshot far is of a disk in vCenter, and StorageClass ours") {
					t.Errorf("event %s", e)
				}
			}
		})
	}
}

// A claim is looked at again when its source changes.
func TestSourcesWakeClaims(t *testing.T) {
	var p *Placer
	seen(t, []runtime.Object{claim("new", restores(kindSnapshot, "snap")), claim("plain", func(*corev1.PersistentVolumeClaim) {})}, nil, func(w Cluster) { p = New(w) })
	if key, _ := p.queue.Get(); key != "ns/new" {
		t.Fatalf("in the queue first: %s", key)
	}
	p.queue.Done("ns/new")
	p.changed(source{kindSnapshot, "other"}.key("ns"))
	if n := p.queue.Len(); n != 0 {
		t.Errorf("%d claims woken by a snapshot that is none of theirs", n)
	}
	p.changed(source{kindSnapshot, "snap"}.key("ns"))
	if key, _ := p.queue.Get(); key != "ns/new" {
		t.Errorf("woken: %s", key)
	}
}

// The clients' stand-ins have no watches that begin with what is there.
func TestMain(m *testing.M) {
	if err := os.Setenv("KUBE_FEATURE_WatchListClient", "false"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}
