package addons

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

func testObjects(t *testing.T) map[string]map[string]any {
	t.Helper()
	objects, err := Objects(Values{
		Address: netip.MustParseAddr("198.18.0.1"), DNSAddress: netip.MustParseAddr("198.18.64.10"),
		DNSPort: 53, MetricsPort: 4443, CABundle: "Y2E=", ClusterInfo: "a: \"b\"\nc: d\n",
	})
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]map[string]any{}
	for _, o := range objects {
		key := o.GetKind() + "/" + o.GetNamespace() + "/" + o.GetName()
		if byName[key] != nil {
			t.Errorf("%s is there twice", key)
		}
		byName[key] = o.Object
		if namespaced := resources[o.GroupVersionKind().GroupKind()].namespaced; namespaced != (o.GetNamespace() != "") {
			t.Errorf("%s: namespaced %v", key, namespaced)
		}
	}
	return byName
}

func TestObjects(t *testing.T) {
	objects := testObjects(t)
	data, ok := objects["ConfigMap/kube-public/cluster-info"]["data"].(map[string]any)
	if !ok || data["kubeconfig"] != "a: \"b\"\nc: d\n" {
		t.Errorf("cluster-info %v: the kubeconfig did not survive the template", data)
	}
}

// TestRolesAreBoundAndNarrow: every binding's own role exists, nothing but
// kubeadm's administrators gets wildcards, and no component may read Secrets or bind roles but by name.
func TestRolesAreBoundAndNarrow(t *testing.T) {
	for key, o := range testObjects(t) {
		switch o["kind"] {
		case "ClusterRole", "Role":
			var role rbacv1.ClusterRole
			if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o, &role, true); err != nil {
				t.Errorf("%s: %v", key, err)
			}
			for _, rule := range role.Rules {
				for _, s := range append(append(rule.Verbs, rule.Resources...), rule.APIGroups...) {
					named := len(rule.ResourceNames) > 0 && (s == "bind" || s == "secrets" && o["kind"] == "Role")
					if s == "*" || s == "impersonate" || s == "escalate" || (s == "secrets" || s == "bind") && !named {
						t.Errorf("%s grants %q", key, s)
					}
				}
			}
		case "ClusterRoleBinding", "RoleBinding":
			var binding rbacv1.ClusterRoleBinding
			if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o, &binding, true); err != nil {
				t.Errorf("%s: %v", key, err)
			}
			if binding.RoleRef.Name == "cluster-admin" && binding.Name != "kubeadm:cluster-admins" {
				t.Errorf("%s binds cluster-admin", key)
			}
		}
	}
}

// The CRDs of snapshots are those of the version that is linked.
func TestSnapshotCRDsAreUpstreams(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/kubernetes-csi/external-snapshotter/client/v8").Output()
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "config/crd/snapshot.*.yaml"))
	if err != nil || len(theirs) != 3 {
		t.Fatalf("upstream has %v (err %v)", theirs, err)
	}
	for _, file := range theirs {
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := snapshotCRDs.ReadFile("snapshots/" + filepath.Base(file)); err != nil || !bytes.Equal(got, want) {
			t.Errorf("snapshots/%s differs from %s (err %v): copy it", filepath.Base(file), file, err)
		}
	}
}
