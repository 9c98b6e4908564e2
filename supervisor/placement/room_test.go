package placement

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	storagehelpers "k8s.io/component-helpers/storage/volume"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func capacity(node, class, free, most string) *storagev1.CSIStorageCapacity {
	return &storagev1.CSIStorageCapacity{
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: node + "-" + class}, StorageClassName: class,
		NodeTopology: &metav1.LabelSelector{MatchLabels: map[string]string{host: node}},
		Capacity:     ptr(resource.MustParse(free)), MaximumVolumeSize: ptr(resource.MustParse(most)),
	}
}

func classOf(name string, change func(*storagev1.StorageClass)) *storagev1.StorageClass {
	c := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: v1alpha1.CSIDriverName, Parameters: map[string]string{"policy": "gold"}}
	change(c)
	return c
}

// wants is a claim that the controller manager has left to the driver.
func wants(class, size, selected string) *corev1.PersistentVolumeClaim {
	return claim("new", func(c *corev1.PersistentVolumeClaim) {
		c.UID, c.Spec.StorageClassName = "uid", &class
		c.Spec.Resources.Requests = corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)}
		c.Annotations = map[string]string{storagehelpers.AnnStorageProvisioner: v1alpha1.CSIDriverName}
		if selected != "" {
			c.Annotations[storagehelpers.AnnSelectedNode] = selected
		}
	})
}

// roomy is a cluster with nodes of all sorts and a claim.
func roomy(t *testing.T, c *corev1.PersistentVolumeClaim, more ...runtime.Object) (p *Placer, look func() (node, event string)) {
	t.Helper()
	cordoned, tainted := node("cordoned", corev1.ConditionTrue), node("tainted", corev1.ConditionTrue)
	cordoned.Spec.Unschedulable = true
	tainted.Spec.Taints = []corev1.Taint{{Key: "k", Effect: corev1.TaintEffectNoSchedule}}
	wait := storagev1.VolumeBindingWaitForFirstConsumer
	zone := func(values ...string) func(*storagev1.StorageClass) {
		return func(c *storagev1.StorageClass) {
			c.AllowedTopologies = []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{{Key: host, Values: values}}}}
		}
	}
	objects := []runtime.Object{
		node("n1", corev1.ConditionTrue), node("n2", corev1.ConditionTrue), node("n3", corev1.ConditionTrue), node("down", corev1.ConditionFalse), cordoned, tainted,
		classOf("now", func(*storagev1.StorageClass) {}),
		classOf("waits", func(c *storagev1.StorageClass) { c.VolumeBindingMode = &wait }),
		classOf("vcenter", func(c *storagev1.StorageClass) { c.Parameters = map[string]string{v1alpha1.PolicyIDParameter: "id"} }),
		classOf("theirs", func(c *storagev1.StorageClass) { c.Provisioner = "example.com" }),
		classOf("here", zone("n3", "n1")), classOf("nowhere", zone("n9")), classOf("offered-by-none", func(*storagev1.StorageClass) {}),
		capacity("n1", "offered-by-none", "0", "0"),
		c,
	}
	for _, class := range []string{"now", "waits", "vcenter", "theirs", "here", "nowhere"} {
		objects = append(objects, capacity("n1", class, "10Gi", "10Gi"), capacity("n2", class, "40Gi", "20Gi"), capacity("n3", class, "30Gi", "30Gi"))
		for _, other := range []string{"down", "cordoned", "tainted"} {
			objects = append(objects, capacity(other, class, "1Ti", "1Ti"))
		}
	}
	w, events := seen(t, append(objects, more...), nil, func(w Cluster) { p = New(w) })
	return p, func() (string, string) {
		t.Helper()
		if err := p.place(t.Context(), "ns/new"); err != nil {
			t.Fatal(err)
		}
		got, err := w.Client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "new", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		select {
		case e := <-events.Events:
			return got.Annotations[storagehelpers.AnnSelectedNode], e
		default:
			return got.Annotations[storagehelpers.AnnSelectedNode], ""
		}
	}
}

// A claim of a class that binds at once goes where most room is, or is told why
// nowhere.
func TestPlaceByRoom(t *testing.T) {
	for name, tt := range map[string]struct {
		claim       *corev1.PersistentVolumeClaim
		node, event string
	}{
		"most room":                    {wants("now", "1Gi", ""), "n2", "PlacedByRoom the volume is made on node n2, which has 40Gi free"},
		"room for one so large":        {wants("now", "25Gi", ""), "n3", "node n3, which has 30Gi"},
		"room on unusable nodes alone": {wants("now", "31Gi", ""), "", "Warning NotPlaced no node has room for 31Gi of policy gold: the most is 30Gi, on node n3"},
		"allowed topologies":           {wants("here", "1Gi", ""), "n3", "on node n3"},
		"none is allowed":              {wants("nowhere", "1Gi", ""), "", "no node of the allowedTopologies of StorageClass nowhere is ready"},
		"none offers it":               {wants("offered-by-none", "1Gi", ""), "", "no node offers policy gold"},
		"chosen already":               {wants("now", "1Gi", "n1"), "n1", ""},
		"waits for a pod":              {wants("waits", "1Gi", ""), "", ""},
		"a policy of vCenter":          {wants("vcenter", "1Gi", ""), "", ""},
		"another driver's class":       {wants("theirs", "1Gi", ""), "", ""},
		"a volume that is there may be bound": {claim("new", func(c *corev1.PersistentVolumeClaim) {
			c.Spec.StorageClassName = ptr("now")
		}), "", ""},
		"somebody else fills it": {claim("new", func(c *corev1.PersistentVolumeClaim) {
			wants("now", "1Gi", "").DeepCopyInto(c)
			c.Spec.DataSourceRef = &corev1.TypedObjectReference{APIGroup: ptr("example.com"), Kind: "Book", Name: "b"}
		}), "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, look := roomy(t, tt.claim)
			if node, event := look(); node != tt.node || !strings.Contains(event, tt.event) || tt.event == "" && event != "" {
				t.Errorf("node %q, event %q; want %q, %q", node, event, tt.node, tt.event)
			}
		})
	}
}

// A node that turns out to have no room, or is gone, is given up, unless it may
// have made the volume.
func TestPlaceAgain(t *testing.T) {
	made := volume("pvc-uid", host, "n1")
	for name, tt := range map[string]struct {
		size, selected string
		more           []runtime.Object
		node           string
	}{
		"no room":            {"15Gi", "n1", nil, "n2"},
		"gone":               {"15Gi", "gone", nil, "n2"},
		"made there":         {"15Gi", "n1", []runtime.Object{made}, "n1"},
		"no room anywhere":   {"2Ti", "n1", nil, "n1"},
		"not ready":          {"15Gi", "down", nil, "down"},
		"its room not known": {"15Gi", "mute", []runtime.Object{node("mute", corev1.ConditionTrue)}, "mute"},
	} {
		t.Run(name, func(t *testing.T) {
			p, look := roomy(t, wants("now", tt.size, tt.selected), tt.more...)
			now := time.Now()
			p.now = func() time.Time { return now }
			if node, event := look(); node != tt.selected || event != "" {
				t.Fatalf("at once: node %q, event %q", node, event)
			}
			now = now.Add(settleTime)
			node, event := look()
			if node != tt.node || (event != "") != (tt.node != tt.selected) {
				t.Errorf("node %q, event %q; want %q", node, event, tt.node)
			}
		})
	}
}

// A claim that no node had room for is looked at again when a node has.
func TestRoomWakesClaims(t *testing.T) {
	p, look := roomy(t, wants("now", "50Gi", ""))
	if node, event := look(); node != "" || !strings.Contains(event, "no node has room for 50Gi") {
		t.Fatalf("node %q, event %q", node, event)
	}
	grown := capacity("n1", "now", "60Gi", "60Gi")
	if _, err := p.Client.StorageV1().CSIStorageCapacities("kube-system").Update(t.Context(), grown, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(time.Minute, p.queue.ShutDown).Stop()
	for { // what was there at first wakes it, too
		key, down := p.queue.Get()
		if down {
			t.Fatal("the claim is not looked at again")
		}
		if node, _ := look(); node == "n1" {
			return
		}
		p.queue.Done(key)
	}
}
