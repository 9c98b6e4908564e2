package controlplane

import (
	"context"
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage/csi"
)

const provisionersFinalizer = "external-provisioner.volume.kubernetes.io/finalizer"

// nodesVolume is the PersistentVolume that a node makes for a claim, in places of
// which each is key, value, key, value and so on.
func nodesVolume(uid string, places ...[]string) *corev1.PersistentVolume {
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pvc-" + uid, Finalizers: []string{provisionersFinalizer}}, Spec: corev1.PersistentVolumeSpec{
		Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("1Gi")}, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		ClaimRef:                      &corev1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: "default", Name: "claim-" + uid, UID: types.UID(uid)},
		PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
		PersistentVolumeSource:        corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{Driver: csi.Name, VolumeHandle: "0123456789ab.v-x"}},
	}}
	if places != nil {
		pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{}}
	}
	for _, p := range places {
		var term corev1.NodeSelectorTerm
		for i := 0; i < len(p); i += 2 {
			term.MatchExpressions = append(term.MatchExpressions, requirement(p[i], corev1.NodeSelectorOpIn, p[i+1]))
		}
		pv.Spec.NodeAffinity.Required.NodeSelectorTerms = append(pv.Spec.NodeAffinity.Required.NodeSelectorTerms, term)
	}
	return pv
}

// volumesOfNodes: a node writes what lies in its own datastores, and of that what
// its provisioner, resizer and audit write.
func (p *policyTest) volumesOfNodes(t *testing.T) {
	shared := csi.DatastoreKey("0123456789ab")
	here, there, both := []string{csi.TopologyHost, "n1"}, []string{csi.TopologyHost, "n2"}, []string{shared, csi.Reachable}
	zoned := append([]string{csi.TopologyZone, "a"}, here...)
	n1 := p.as(t, "system:node:n1", "system:nodes", "system:authenticated").CoreV1().PersistentVolumes()
	with := func(pv *corev1.PersistentVolume, change func(*corev1.PersistentVolume)) *corev1.PersistentVolume {
		change(pv)
		return pv
	}
	for name, tc := range map[string]struct {
		pv   *corev1.PersistentVolume
		word string // of the refusal
	}{
		"its own":               {nodesVolume("a", here), ""},
		"its own, of a zone":    {nodesVolume("b", zoned), ""},
		"a shared one":          {nodesVolume("c", both), ""},
		"another node's":        {nodesVolume("d", there), "neither on system:node:n1 nor in a shared datastore"},
		"its own and another's": {nodesVolume("e", here, there), "neither on system:node:n1"},
		"of a zone alone":       {nodesVolume("f", []string{csi.TopologyZone, "a"}), "neither on system:node:n1"},
		"anywhere":              {nodesVolume("g"), "neither on system:node:n1"},
		"of another driver":     {with(nodesVolume("h", here), func(pv *corev1.PersistentVolume) { pv.Spec.CSI.Driver = "example.com" }), "in no datastore of a node"},
		"of no driver": {with(nodesVolume("i", here), func(pv *corev1.PersistentVolume) {
			pv.Spec.CSI, pv.Spec.Local = nil, &corev1.LocalVolumeSource{Path: "/etc"}
		}), "in no datastore of a node"},
		"in a vCenter": {with(nodesVolume("j", here), func(pv *corev1.PersistentVolume) {
			pv.Spec.CSI.VolumeAttributes = map[string]string{"vcenter": "uuid"}
		}), "in no datastore of a node"},
		"in another datastore than it says": {with(nodesVolume("k", both), func(pv *corev1.PersistentVolume) { pv.Spec.CSI.VolumeHandle = "fedcba987654.v-x" }), "in another datastore"},
		"under another name":                {with(nodesVolume("l", here), func(pv *corev1.PersistentVolume) { pv.Name = "mine" }), "not named after the claim"},
		"for no claim":                      {with(nodesVolume("m", here), func(pv *corev1.PersistentVolume) { pv.Spec.ClaimRef = nil }), "not named after the claim"},
	} {
		_, err := n1.Create(t.Context(), tc.pv, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if tc.word == "" {
			allowed(t, "to make "+name, err)
		} else {
			refused(t, "to make "+name, err, tc.word)
		}
	}
	p.changesOfNodes(t, n1, here, there, both)
}

type volumeWriter interface {
	Patch(ctx context.Context, name string, pt types.PatchType, data []byte, o metav1.PatchOptions, sub ...string) (*corev1.PersistentVolume, error)
	Delete(ctx context.Context, name string, o metav1.DeleteOptions) error
}

// changesOfNodes are those of volumes that are there.
func (p *policyTest) changesOfNodes(t *testing.T, n1 volumeWriter, here, there, both []string) {
	// No claims have these: the controller manager releases them.
	for name, places := range map[string][][]string{"own": {here}, "other": {there}, "shared": {both}, "free": nil} {
		pv := nodesVolume(name, places...)
		pv.Finalizers, pv.Spec.PersistentVolumeReclaimPolicy = []string{"example.com/kept"}, corev1.PersistentVolumeReclaimRetain
		if _, err := p.admin.CoreV1().PersistentVolumes().Create(t.Context(), pv, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	dry := []string{metav1.DryRunAll}
	for _, tc := range []struct{ pv, what, patch, word string }{
		{"own", "its compliance", `{"metadata":{"annotations":{"` + v1alpha1.AnnotationPolicyCompliance + `":"Compliant"}}}`, ""},
		{"shared", "its compliance", `{"metadata":{"annotations":{"` + v1alpha1.AnnotationPolicyCompliance + `":"Compliant"}}}`, ""},
		{"free", "its compliance", `{"metadata":{"annotations":{"` + v1alpha1.AnnotationPolicyCompliance + `":"Compliant"}}}`, ""},
		{"other", "its compliance", `{"metadata":{"annotations":{"` + v1alpha1.AnnotationPolicyCompliance + `":"Compliant"}}}`, "neither on system:node:n1"},
		{"own", "its capacity", `{"spec":{"capacity":{"storage":"2Gi"}}}`, ""},
		{"other", "its capacity", `{"spec":{"capacity":{"storage":"2Gi"}}}`, "neither on system:node:n1"},
		{"own", "the provisioner's finalizer", `{"metadata":{"finalizers":["example.com/kept","kubernetes.io/pv-protection","` + provisionersFinalizer + `"]}}`, ""},
		{"own", "another's finalizer", `{"metadata":{"finalizers":["kubernetes.io/pv-protection","` + provisionersFinalizer + `"]}}`, "nor the finalizers of others"},
		{"own", "another annotation", `{"metadata":{"annotations":{"pv.kubernetes.io/provisioned-by":"example.com"}}}`, "whether it complies with its policy, and no more"},
		{"own", "a label", `{"metadata":{"labels":{"a":"b"}}}`, "neither labels and owners"},
		{"own", "its claim", `{"spec":{"claimRef":{"namespace":"kube-system","name":"x","uid":"x"}}}`, "nothing but the capacity"},
		{"own", "its reclaim policy", `{"spec":{"persistentVolumeReclaimPolicy":"Delete"}}`, "nothing but the capacity"},
		{"own", "its access modes", `{"spec":{"accessModes":["ReadWriteMany"]}}`, "nothing but the capacity"},
	} {
		_, err := n1.Patch(t.Context(), "pvc-"+tc.pv, types.MergePatchType, []byte(tc.patch), metav1.PatchOptions{DryRun: dry})
		if what := tc.what + " of " + tc.pv; tc.word == "" {
			allowed(t, what, err)
		} else {
			refused(t, what, err, tc.word)
		}
	}
	_, err := n1.Patch(t.Context(), "pvc-own", types.MergePatchType, []byte(`{"status":{"phase":"Released"}}`), metav1.PatchOptions{DryRun: dry}, "status")
	refused(t, "the phase", err, "forbidden")
	p.deletedByNodes(t, n1)
}

// deletedByNodes: what its claim has released, and that node has.
func (p *policyTest) deletedByNodes(t *testing.T, n1 volumeWriter) {
	bound := nodesVolume("bound", []string{csi.TopologyHost, "n1"})
	bound.Spec.ClaimRef, bound.Finalizers, bound.Spec.StorageClassName = nil, nil, "none" // Available
	if _, err := p.admin.CoreV1().PersistentVolumes().Create(t.Context(), bound, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, phase := range map[string]corev1.PersistentVolumePhase{"own": corev1.VolumeReleased, "shared": corev1.VolumeReleased, "other": corev1.VolumeReleased, "bound": corev1.VolumeAvailable} {
		eventually(t, name+" "+string(phase), func() error {
			pv, err := p.admin.CoreV1().PersistentVolumes().Get(t.Context(), "pvc-"+name, metav1.GetOptions{})
			if err == nil && pv.Status.Phase != phase {
				err = fmt.Errorf("phase %s", pv.Status.Phase)
			}
			return err
		})
	}
	dry := metav1.DeleteOptions{DryRun: []string{metav1.DryRunAll}}
	allowed(t, "to delete its own", n1.Delete(t.Context(), "pvc-own", dry))
	allowed(t, "to delete a shared one", n1.Delete(t.Context(), "pvc-shared", dry))
	refused(t, "to delete another's", n1.Delete(t.Context(), "pvc-other", dry), "neither on system:node:n1")
	refused(t, "to delete what is not released", n1.Delete(t.Context(), "pvc-bound", dry), "is Available: a node deletes what its claim has released")
	allowed(t, "an administrator deletes", p.admin.CoreV1().PersistentVolumes().Delete(t.Context(), "pvc-other", dry))
}

// roomOfNodes: a node says what room it has, and which host it is.
func (p *policyTest) roomOfNodes(t *testing.T) {
	dry := []string{metav1.DryRunAll}
	room := func(c kubernetes.Interface, host string) error {
		_, err := c.StorageV1().CSIStorageCapacities(metav1.NamespaceSystem).Create(t.Context(), &storagev1.CSIStorageCapacity{
			ObjectMeta: metav1.ObjectMeta{Name: "room-" + host}, StorageClassName: "atoll-local", Capacity: resource.NewQuantity(1, resource.BinarySI),
			NodeTopology: &metav1.LabelSelector{MatchLabels: map[string]string{csi.TopologyHost: host}},
		}, metav1.CreateOptions{})
		return err
	}
	n1 := p.as(t, "system:node:n1", "system:nodes", "system:authenticated")
	allowed(t, "its own room", room(n1, "n1"))
	refused(t, "another's room", room(n1, "n2"), "is not about system:node:n1")
	allowed(t, "an administrator says n2's room", room(p.admin, "n2"))
	of := n1.StorageV1().CSIStorageCapacities(metav1.NamespaceSystem)
	refused(t, "to delete another's room", of.Delete(t.Context(), "room-n2", metav1.DeleteOptions{DryRun: dry}), "is not about system:node:n1")
	allowed(t, "to delete its own room", of.Delete(t.Context(), "room-n1", metav1.DeleteOptions{DryRun: dry}))

	p.node(t, "n5", nil)
	n5 := p.as(t, "system:node:n5", "system:nodes", "system:authenticated").CoreV1().Nodes()
	label := func(host string) error {
		_, err := n5.Patch(t.Context(), "n5", types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, csi.TopologyHost, host), metav1.PatchOptions{DryRun: dry}, "status")
		return err
	}
	allowed(t, "to be itself", label("n5"))
	refused(t, "to be another host", label("n2"), "node n5 is not n2")
}
