package main

import (
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/local"
)

// TestFenceOutOfService has node-a hold a volume of a datastore that it shares
// with node-b, which frees it on nobody's word but the admin's.
func TestFenceOutOfService(t *testing.T) {
	base := t.TempDir()
	shared := filepath.Join(base, "nfs")
	if err := os.Mkdir(shared, 0o700); err != nil {
		t.Fatal(err)
	}
	disks := map[string]*local.Disks{}
	for _, host := range []string{"node-a", "node-b"} {
		d, err := local.OpenDisks(t.Context(), local.DisksConfig{Host: host, StateDir: filepath.Join(base, host), BootID: "boot-of-" + host, Datastores: []local.Datastore{{
			Name: "nfs", Path: shared, Shared: true, Policies: []local.DatastorePolicy{{Policy: storage.Policy{Name: "shared"}}},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		disks[host] = d
	}
	for name, c := range map[string]struct {
		holder string
		nodes  []corev1.Node
		freed  bool
	}{
		"the node is there":       {"node-a", []corev1.Node{node("node-a")}, false},
		"the node is unreachable": {"node-a", []corev1.Node{node("node-a", corev1.TaintNodeUnreachable)}, false},
		"the node is gone":        {"node-a", nil, false},
		"it is this node":         {"node-b", []corev1.Node{node("node-b", corev1.TaintNodeOutOfService)}, false},
		"it is out of service":    {"node-a", []corev1.Node{node("node-a", corev1.TaintNodeOutOfService)}, true},
	} {
		t.Run(name, func(t *testing.T) {
			v, err := disks["node-b"].Create(t.Context(), storage.Claim{Name: "pvc-1", Bytes: 1 << 20, Policy: "shared"})
			if err != nil {
				t.Fatal(err)
			}
			h := storage.Holder{VM: "vm_0", Host: c.holder}
			if _, err := disks[c.holder].Attach(t.Context(), v.ID, h, storage.AttachOptions{}); err != nil {
				t.Fatal(err)
			}
			client := fake.NewClientset(&corev1.NodeList{Items: c.nodes})
			if err := fenceOutOfService(t.Context(), disks["node-b"], client.CoreV1().Nodes(), "node-b"); err != nil {
				t.Fatal(err)
			}
			hs, err := disks["node-b"].Holders(t.Context(), v.ID)
			if err != nil || (len(hs) == 0) != c.freed {
				t.Errorf("holders are %v, %v; want freed: %t", hs, err, c.freed)
			}
			if err := disks[c.holder].Detach(t.Context(), v.ID, h); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func node(name string, taints ...string) corev1.Node {
	n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, t := range taints {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: t, Effect: corev1.TaintEffectNoExecute})
	}
	return n
}
