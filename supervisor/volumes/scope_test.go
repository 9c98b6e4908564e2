package volumes

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"
	storagehelpers "k8s.io/component-helpers/storage/volume"
	ctrlfake "sigs.k8s.io/controller-runtime/pkg/client/fake"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/csi/controllers"
)

// A store answers as which vCenter it is.
type store struct {
	Store
	uuid string
	err  error
}

func (s *store) VCenter(context.Context) (string, error) { return s.uuid, s.err }

func newScope(t *testing.T, at *store, policies ...v1alpha1.StoragePolicy) *scope {
	t.Helper()
	scheme, err := newScheme()
	if err != nil {
		t.Fatal(err)
	}
	objects := ctrlfake.NewClientBuilder().WithScheme(scheme).WithLists(&v1alpha1.StoragePolicyList{Items: policies}).Build()
	node := func(name string, labels map[string]string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	}
	b := &base{objects: objects, events: record.NewFakeRecorder(10), client: fake.NewClientset(
		node("kvm", nil), node("esx", map[string]string{"datastore.topology.atoll.dev/datastore-1": "true"}))}
	return &scope{&connection{base: b, address: "vc.example.com", store: at}}
}

func policyOf(name, id string, ready *metav1.Condition, stores ...v1alpha1.DatastoreStatus) v1alpha1.StoragePolicy {
	p := v1alpha1.StoragePolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.StoragePolicySpec{ID: id}}
	p.Status.PolicyName, p.Status.Datastores = strings.ToUpper(name), stores
	if ready != nil {
		p.Status.Conditions = []metav1.Condition{*ready}
	}
	return p
}

func datastore(id, free string) v1alpha1.DatastoreStatus {
	return v1alpha1.DatastoreStatus{ID: id, Name: id, Free: resource.MustParse(free)}
}

func TestWhere(t *testing.T) {
	gone := &metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: v1alpha1.ReasonPolicyGone}
	s := newScope(t, nil,
		policyOf("gold", "id-gold", nil, datastore("datastore-1", "1Gi"), datastore("datastore-2", "3Gi"), datastore("datastore-3", "2Gi")),
		policyOf("gone", "id-gone", gone, datastore("datastore-1", "1Gi")), policyOf("empty", "id-empty", nil))
	for _, c := range []struct {
		policy, node string
		want         []string
		err          string
	}{
		{policy: "id-gold", want: []string{"datastore-2", "datastore-3", "datastore-1"}},
		{policy: "id-gold", node: "esx", want: []string{"datastore-1"}},
		{policy: "id-gold", node: "kvm", err: "node kvm, which the scheduler has selected, reaches no datastore"},
		{policy: "id-gone", err: `vc.example.com has no storage policy "GONE" any more`},
		{policy: "id-empty", err: "storage policy empty fits no datastore"},
		{policy: "id-other", err: "names storage policy id-other, which vCenter vc.example.com is not known to have"},
		{policy: "", err: "names no policy of vCenter"},
	} {
		claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{storagehelpers.AnnSelectedNode: c.node}}}
		class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "class"}, Parameters: map[string]string{v1alpha1.PolicyIDParameter: c.policy}}
		where, err := s.Where(t.Context(), claim, class)
		var got []string
		for _, r := range where.GetRequisite() {
			for k := range r.Segments {
				got = append(got, strings.TrimPrefix(k, "datastore.topology.atoll.dev/"))
			}
		}
		if !slices.Equal(got, c.want) || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%+v: %v, %v", c, got, err)
		}
	}
}

// TestMade: whatever nodes are called, only hosts of the volume's vCenter take
// its pods, and only its vCenter is asked to delete it.
func TestMade(t *testing.T) {
	at := &store{uuid: "uuid-1"}
	s := newScope(t, at)
	pv := &corev1.PersistentVolume{Spec: corev1.PersistentVolumeSpec{
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: v1alpha1.CSIDriverName, VolumeHandle: "disk"}},
		NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: "topology.atoll.dev/host", Operator: corev1.NodeSelectorOpIn, Values: []string{"kvm"}}},
		}}}},
	}}
	if err := s.Made(t.Context(), pv, &corev1.PersistentVolumeClaim{}, &storagev1.StorageClass{}); err != nil {
		t.Fatal(err)
	}
	terms := pv.Spec.NodeAffinity.Required.NodeSelectorTerms
	if len(terms) != 1 || len(terms[0].MatchExpressions) != 2 || terms[0].MatchExpressions[1].Key != "topology.atoll.dev/vcenter" || terms[0].MatchExpressions[1].Values[0] != "uuid-1" {
		t.Errorf("terms %+v", terms)
	}
	if !s.Volume(pv) || !controllers.OfVCenter(pv) {
		t.Error("the volume is nobody's")
	}
	if err := s.Reach(t.Context(), pv); err != nil {
		t.Error(err)
	}
	at.uuid = "uuid-2"
	if err := s.Reach(t.Context(), pv); err == nil || !strings.Contains(err.Error(), "uuid-1") {
		t.Errorf("another vCenter: %v", err)
	}
	at.err = errdefs.ErrUnavailable
	if err := s.Reach(t.Context(), pv); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("no vCenter: %v", err)
	}
}

func TestWanted(t *testing.T) {
	got := wanted(bound{
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}},
		&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "data", Labels: map[string]string{
			"app": "db", "atoll.dev/mib": "1", storage.LabelPVC: "a lie",
		}}},
	})
	if want := map[string]string{"app": "db", storage.LabelNamespace: "ns", storage.LabelPVC: "data", storage.LabelPV: "pv"}; !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
