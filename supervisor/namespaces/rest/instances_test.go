package rest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func goldPolicy() *v1alpha1.StoragePolicy {
	p := policy("gold", goldID)
	p.Status.PolicyName = "Gold Policy"
	p.Status.Datastores = []v1alpha1.DatastoreStatus{{ID: "datastore-1", Name: "ds", Capacity: *quantity("100Gi"), Free: *quantity("40Gi")}}
	return &p
}

func class(name string) *v1alpha1.VirtualMachineClass {
	return &v1alpha1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: v1alpha1.VirtualMachineClassSpec{CPUs: 2, Memory: *quantity("4Gi")}}
}

func TestCreate(t *testing.T) {
	b := newBench(t, interceptor.Funcs{}, testSupervisor(), goldPolicy(), class("small"))
	b.want("POST", instances, `{"cluster": "domain-c8", "namespace": "shop", "description": "a shop",
		"resource_spec": {"cpu_limit": 4588, "memory_limit": 1024, "pod_count": 10},
		"access_list": [{"subject_type": "GROUP", "subject": "devs", "domain": "vsphere.local", "role": "EDIT"}],
		"storage_specs": [{"policy": "`+goldID+`", "limit": 100}], "vm_service_spec": {"vm_classes": ["small"]}}`, 204, "", "")
	got := b.get("shop").Spec
	want := v1alpha1.SupervisorNamespaceSpec{NamespaceSettings: v1alpha1.NamespaceSettings{
		Description: "a shop", CPU: &v1alpha1.CPUAllocation{Limit: quantity("2")}, Memory: &v1alpha1.MemoryAllocation{Limit: quantity("1Gi")},
		ObjectCounts:    &v1alpha1.ObjectCounts{Pods: ptr(int64(10))},
		Access:          []v1alpha1.AccessEntry{{Kind: v1alpha1.GroupSubject, Name: "devs", Domain: "vsphere.local", Role: v1alpha1.RoleEdit}},
		StoragePolicies: []v1alpha1.StoragePolicyLimit{{Name: "gold", Limit: quantity("100Mi")}}, VMClasses: []string{"small"},
	}}
	if marshal(t, got) != marshal(t, want) {
		t.Errorf("got  %s\nwant %s", marshal(t, got), marshal(t, want))
	}
	b.want("POST", instances, `{"cluster": "domain-c8", "namespace": "shop"}`, 400, "ALREADY_EXISTS", `"shop"`)
	b.want("POST", instances+"/v2", `{"supervisor": "default", "namespace": "second", "zones": [{"zone": "zone-a"}]}`, 204, "", "")
	if zones := b.get("second").Spec.Zones; len(zones) != 1 || zones[0] != "zone-a" {
		t.Errorf("zones %v", zones)
	}
	b.want("POST", instances+"/v2", `{"supervisor": "sv-uid", "namespace": "third"}`, 204, "", "")
}

// TestCreateInZone: with several clusters, version 1's cluster is a zone.
func TestCreateInZone(t *testing.T) {
	sv := testSupervisor()
	sv.Spec.Zones = append(sv.Spec.Zones, v1alpha1.Zone{Name: "zone-b", Cluster: "C1"})
	sv.Status.Zones = append(sv.Status.Zones, v1alpha1.ZoneStatus{Name: "zone-b", Cluster: "domain-c9", MHzPerCore: 2706})
	b := newBench(t, interceptor.Funcs{}, sv)
	b.want("POST", instances, `{"cluster": "domain-c9", "namespace": "shop", "resource_spec": {"cpu_limit": 2706}}`, 204, "", "")
	if ns := b.get("shop"); len(ns.Spec.Zones) != 1 || ns.Spec.Zones[0] != "zone-b" || ns.Spec.CPU.Limit.String() != "1" {
		t.Errorf("%s", marshal(t, ns.Spec))
	}
	if out := b.want("GET", instances+"/shop", "", 200, "", ""); !strings.Contains(out, `"cluster":"domain-c9"`) {
		t.Errorf("%s", out)
	}
	b.want("POST", instances+"/v2", `{"supervisor": "default", "namespace": "wide", "resource_spec": {"cpu_limit": 5000}}`, 204, "", "")
	if ns := b.get("wide"); ns.Spec.Zones != nil || ns.Spec.CPU.Limit.String() != "2" { // 2500 MHz a core, on average
		t.Errorf("%s", marshal(t, ns.Spec))
	}
}

func TestCreateRefuses(t *testing.T) {
	plain := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "plain"}}
	b := newBench(t, interceptor.Funcs{}, testSupervisor(), plain)
	b.vcenter.gone = []string{"domain-c0"}
	for _, c := range []struct {
		body   string
		status int
		kind   string
		text   string
	}{
		{``, 400, "UNEXPECTED_INPUT", "body is missing"},
		{`{`, 400, "UNEXPECTED_INPUT", "body"},
		{`{"cluster": "domain-c8", "namespace": "a"} {}`, 400, "UNEXPECTED_INPUT", "more than one"},
		{`{"cluster": "domain-c8", "name": "a"}`, 400, "UNEXPECTED_INPUT", `"name"`},
		{`{"cluster": "domain-c8", "namespace": 5}`, 400, "UNEXPECTED_INPUT", "namespace"},
		{`{"namespace": "a"}`, 400, "INVALID_ARGUMENT", "cluster is missing"},
		{`{"cluster": "domain-c0", "namespace": "a"}`, 404, "NOT_FOUND", "domain-c0"},
		{`{"cluster": "domain-c7", "namespace": "a"}`, 400, "UNSUPPORTED", "not enabled"},
		{`{"cluster": "domain-c8", "namespace": ""}`, 400, "INVALID_ARGUMENT", `""`},
		{`{"cluster": "domain-c8", "namespace": "Shop"}`, 400, "INVALID_ARGUMENT", "lower case"},
		{`{"cluster": "domain-c8", "namespace": "a.b"}`, 400, "INVALID_ARGUMENT", "a.b"},
		{`{"cluster": "domain-c8", "namespace": "../x"}`, 400, "INVALID_ARGUMENT", "../x"},
		{`{"cluster": "domain-c8", "namespace": "` + strings.Repeat("a", 64) + `"}`, 400, "INVALID_ARGUMENT", "63"},
		{`{"cluster": "domain-c8", "namespace": "kube-x"}`, 400, "INVALID_ARGUMENT", "kube-x"},
		{`{"cluster": "domain-c8", "namespace": "vmware-system-x"}`, 403, "UNAUTHORIZED", "vmware-system"},
		{`{"cluster": "domain-c8", "namespace": "plain"}`, 400, "ALREADY_EXISTS", "plain"},
		{`{"cluster": "domain-c8", "namespace": "a", "networks": ["n"]}`, 400, "UNSUPPORTED", "networks"},
		{`{"cluster": "domain-c8", "namespace": "a", "storage_specs": [{"policy": "x"}]}`, 400, "INVALID_ARGUMENT", `"x"`},
		{`{"cluster": "domain-c8", "namespace": "a", "vm_service_spec": {"vm_classes": ["x"]}}`, 400, "INVALID_ARGUMENT", `"x"`},
		{`{"cluster": "domain-c8", "namespace": "` + strings.Repeat("a", maxBody) + `"}`, 400, "INVALID_ARGUMENT", "larger"},
	} {
		b.want("POST", instances, c.body, c.status, c.kind, c.text)
	}
	b.want("POST", instances+"/v2", `{"supervisor": "other", "namespace": "a"}`, 404, "NOT_FOUND", "other")
	b.want("POST", instances+"/v2", `{"supervisor": "default", "namespace": "a", "zones": [{"zone": "z"}]}`, 400, "INVALID_ARGUMENT", `"z"`)
	b.want("POST", instances+"/v2", `{"supervisor": "default", "namespace": "a", "zones": [{"zone": "zone-a", "cpu_limit": 5}]}`, 400, "UNSUPPORTED", "split evenly")
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := b.client.List(t.Context(), list); err != nil || len(list.Items) != 0 {
		t.Errorf("%d namespaces were made, %v", len(list.Items), err)
	}
}

func TestWithoutSupervisor(t *testing.T) {
	b := newBench(t, interceptor.Funcs{})
	for path, want := range map[string]string{
		instances: "[]", instances + "/v2": "[]", management + "/clusters": "[]",
		management + "/supervisors/summaries": `{"items":[]}`, management + "/software/clusters": "[]",
	} {
		if out := b.want("GET", path, "", 200, "", ""); out != want {
			t.Errorf("%s: %s", path, out)
		}
	}
	b.want("POST", instances, `{"cluster": "domain-c8", "namespace": "a"}`, 404, "NOT_FOUND", "no Supervisor")
}

// TestRights goes through what each call needs, with a user who has all but
// that, and with one who has only that.
func TestRights(t *testing.T) {
	const pool, cluster, root = "ResourcePool/resgroup-1", "ClusterComputeResource/domain-c8", "Folder/"
	for _, c := range []struct {
		method, path, body string
		grant              string
	}{
		{"GET", instances + "/shop", "", privilegeRead + " " + pool},
		{"GET", instances + "/v2/shop", "", privilegeRead + " " + pool},
		{"PUT", instances + "/shop", "{}", privilegeConfigure + " " + pool},
		{"PATCH", instances + "/shop", "{}", privilegeConfigure + " " + pool},
		{"DELETE", instances + "/shop", "", privilegeConfigure + " " + pool},
		{"POST", instances, `{"cluster": "domain-c8", "namespace": "new"}`, privilegeConfigure + " " + cluster},
		{"POST", instances + "/v2", `{"supervisor": "default", "namespace": "new"}`, privilegeConfigure + " " + cluster},
		{"GET", instances + "/shop/access/vsphere.local/ada?type=USER", "", privilegeRead + " " + pool},
		{"POST", instances + "/shop/access/vsphere.local/bob?type=USER", `{"role": "VIEW"}`, privilegeConfigure + " " + pool},
		{"PUT", instances + "/shop/access/vsphere.local/ada?type=USER", `{"role": "VIEW"}`, privilegeConfigure + " " + pool},
		{"DELETE", instances + "/shop/access/vsphere.local/ada?type=USER", "", privilegeConfigure + " " + pool},
		{"GET", management + "/virtual-machine-classes", "", privilegeRead + " " + root},
		{"GET", management + "/virtual-machine-classes/small", "", privilegeRead + " " + root},
		{"POST", management + "/virtual-machine-classes", `{"id": "c", "cpu_count": 1, "memory_MB": 4}`, privilegeClasses + " " + root},
		{"PATCH", management + "/virtual-machine-classes/small", `{"cpu_count": 1}`, privilegeClasses + " " + root},
		{"DELETE", management + "/virtual-machine-classes/small", "", privilegeClasses + " " + root},
		{"GET", management + "/clusters/domain-c8", "", privilegeRead + " " + cluster},
		{"GET", management + "/clusters/domain-c8/workload-resource-options", "", privilegeRead + " " + cluster},
		{"GET", management + "/supervisors/default/summary", "", privilegeRead + " " + cluster},
		{"GET", management + "/supervisors/default/topology", "", privilegeRead + " " + cluster},
		{"GET", management + "/software/clusters/domain-c8", "", privilegeRead + " " + cluster},
		{"GET", "/api/vcenter/storage/policies", "", privilegePolicies + " " + root},
		{"POST", "/api/vcenter/storage/policies/" + goldID + "?action=check-compatibility", `{"datastores": []}`, privilegePolicies + " " + root},
	} {
		t.Run(c.method+" "+c.path, func(t *testing.T) {
			ns := namespace("shop", "resgroup-1")
			ns.Spec.Access = []v1alpha1.AccessEntry{{Kind: v1alpha1.UserSubject, Name: "ada", Role: v1alpha1.RoleEdit}}
			b := newBench(t, interceptor.Funcs{}, testSupervisor(), goldPolicy(), class("small"), ns)
			b.as("eve")
			for _, on := range []string{pool, cluster, root} {
				for _, p := range []string{privilegeRead, privilegeConfigure, privilegeManage, privilegeClasses, privilegePolicies} {
					if g := p + " " + on; g != c.grant {
						b.vcenter.grants = append(b.vcenter.grants, "eve "+g)
					}
				}
			}
			privilege, _, _ := strings.Cut(c.grant, " ")
			b.want(c.method, c.path, c.body, 403, "UNAUTHORIZED", privilege)
			b.vcenter.grants, b.vcenter.down = []string{"eve " + c.grant}, true
			b.want(c.method, c.path, c.body, 503, "SERVICE_UNAVAILABLE", "vCenter")
			b.vcenter.down = false
			if status, out := b.do(c.method, c.path, c.body); status >= 300 {
				t.Errorf("with %s alone: %d %s", c.grant, status, out)
			}
		})
	}
}

// TestListsLeaveOut holds that lists show what their reader may read, and go on
// when a pool has been deleted by hand.
func TestListsLeaveOut(t *testing.T) {
	objects := []client.Object{testSupervisor()}
	for i := range 9 {
		objects = append(objects, namespace(fmt.Sprintf("ns-%d", i), fmt.Sprintf("resgroup-%d", i)))
	}
	objects = append(objects, namespace("young")) // has no pool yet
	b := newBench(t, interceptor.Funcs{}, objects...)
	names := func(path string) string {
		var list []struct {
			Namespace string `json:"namespace"`
		}
		if err := json.Unmarshal([]byte(b.want("GET", path, "", 200, "", "")), &list); err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, e := range list {
			out = append(out, e.Namespace)
		}
		return strings.Join(out, " ")
	}
	const all = "ns-0 ns-1 ns-2 ns-3 ns-4 ns-5 ns-6 ns-7 ns-8 young"
	for _, path := range []string{instances, instances + "/v2", "/api/vcenter/namespaces-user/namespaces"} {
		b.vcenter.gone, b.vcenter.grants = nil, nil
		if got := b.as("admin"); names(path) != all {
			t.Errorf("%s: admin sees %v", path, got)
		}
		if b.as("eve"); names(path) != "" {
			t.Errorf("%s: eve sees %s", path, names(path))
		}
		b.vcenter.grants = []string{"eve System.Read ResourcePool/resgroup-3", "eve System.Read ResourcePool/resgroup-5"}
		if names(path) != "ns-3 ns-5" {
			t.Errorf("%s: eve sees %s", path, names(path))
		}
		b.vcenter.gone = []string{"resgroup-3", "resgroup-8"}
		if names(path) != "ns-5" {
			t.Errorf("%s: with pools gone, eve sees %s", path, names(path))
		}
		if b.as("admin"); names(path) != all {
			t.Errorf("%s: with pools gone, admin sees %s", path, names(path))
		}
	}
	if b.as("eve"); b.want("GET", instances+"/ns-5", "", 200, "", "") == "" {
		t.Error("nothing of ns-5")
	}
	b.want("GET", instances+"/ns-3", "", 403, "UNAUTHORIZED", "domain-c8")
}

func TestChange(t *testing.T) {
	ns := namespace("shop", "resgroup-1")
	ns.Spec.NamespaceSettings = full()
	b := newBench(t, interceptor.Funcs{}, testSupervisor(), goldPolicy(), ptr(policy("silver", silverID)), class("small"), ns)
	b.want("PATCH", instances+"/shop", `{"description": "other"}`, 204, "", "")
	want := full()
	want.Description = "other"
	if got := b.get("shop").Spec.NamespaceSettings; marshal(t, got) != marshal(t, want) {
		t.Errorf("got  %s\nwant %s", marshal(t, got), marshal(t, want))
	}
	// What was read, sent back, writes nothing.
	var read map[string]any
	if err := json.Unmarshal([]byte(b.want("GET", instances+"/shop", "", 200, "", "")), &read); err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"cluster", "config_status", "messages", "stats", "self_service_namespace"} {
		if _, ok := read[k]; !ok {
			t.Errorf("an answer lacks %s", k)
		}
		delete(read, k)
	}
	version := b.get("shop").ResourceVersion
	for _, method := range []string{"PUT", "PATCH"} {
		b.want(method, instances+"/shop", marshal(t, read), 204, "", "")
		if got := b.get("shop").ResourceVersion; got != version {
			t.Errorf("%s of what is there wrote: %s, then %s", method, version, got)
		}
	}
	b.want("PUT", instances+"/shop", `{"zones": [{"zone": "zone-a"}]}`, 400, "UNEXPECTED_INPUT", "zones")
	b.want("PUT", instances+"/shop", `{}`, 204, "", "")
	if got := b.get("shop").Spec; got.Memory.Limit != nil || got.CPU.Reservation == nil || got.StoragePolicies != nil {
		t.Errorf("after an empty PUT: %s", marshal(t, got))
	}
	b.want("PATCH", instances+"/none", `{}`, 404, "NOT_FOUND", `"none"`)
	b.want("DELETE", instances+"/none", "", 404, "NOT_FOUND", `"none"`)
}

// TestConflicts holds that a change survives others' writes in between, keeps
// them, and gives up at last.
func TestConflicts(t *testing.T) {
	writes, conflicts := 0, 3
	funcs := interceptor.Funcs{Update: func(ctx context.Context, c client.WithWatch, o client.Object, opts ...client.UpdateOption) error {
		ns, ok := o.(*v1alpha1.SupervisorNamespace)
		if !ok {
			return c.Update(ctx, o, opts...)
		}
		if writes++; writes <= conflicts {
			// Somebody else was faster.
			other := &v1alpha1.SupervisorNamespace{}
			if err := c.Get(ctx, client.ObjectKeyFromObject(ns), other); err != nil {
				return err
			}
			other.Spec.VMClasses = append(other.Spec.VMClasses, fmt.Sprintf("c%d", writes))
			if err := c.Update(ctx, other); err != nil {
				return err
			}
		}
		return c.Update(ctx, o, opts...)
	}}
	b := newBench(t, funcs, testSupervisor(), namespace("shop", "resgroup-1"))
	b.want("PATCH", instances+"/shop", `{"description": "mine"}`, 204, "", "")
	if got := b.get("shop").Spec; got.Description != "mine" || len(got.VMClasses) != 3 || writes != 4 {
		t.Errorf("after %d writes: %s", writes, marshal(t, got))
	}
	writes, conflicts = 0, 1000
	b.want("PATCH", instances+"/shop", `{"description": "again"}`, 409, "CONCURRENT_CHANGE", "try again")
	if writes != conflictTries || b.get("shop").Spec.Description != "mine" {
		t.Errorf("%d writes, %s", writes, marshal(t, b.get("shop").Spec))
	}
}

func TestDelete(t *testing.T) {
	ns := namespace("shop", "resgroup-1")
	ns.Finalizers = []string{v1alpha1.NamespaceFinalizer}
	b := newBench(t, interceptor.Funcs{}, testSupervisor(), ns)
	b.want("DELETE", instances+"/shop", "", 204, "", "")
	if b.get("shop").DeletionTimestamp == nil {
		t.Fatal("it is not being deleted")
	}
	b.want("DELETE", instances+"/shop", "", 204, "", "") // again
	if out := b.want("GET", instances+"/shop", "", 200, "", ""); !strings.Contains(out, `"config_status":"REMOVING"`) {
		t.Error(out)
	}
	b.want("PATCH", instances+"/shop", `{"description": "x"}`, 400, "NOT_ALLOWED_IN_CURRENT_STATE", "being deleted")
	b.want("POST", instances, `{"cluster": "domain-c8", "namespace": "shop"}`, 400, "ALREADY_EXISTS", "shop")
}

func TestAccess(t *testing.T) {
	ns := namespace("shop", "resgroup-1")
	ns.Spec.Access = []v1alpha1.AccessEntry{{Kind: v1alpha1.UserSubject, Name: "Ada", Role: v1alpha1.RoleEdit}}
	b := newBench(t, interceptor.Funcs{}, testSupervisor(), ns)
	const ada, devs = instances + "/shop/access/vsphere.local/ada?type=USER", instances + "/shop/access/corp.example/platform%20devs?type=GROUP"
	if out := b.want("GET", ada, "", 200, "", ""); out != `{"role":"EDIT","inherited":false}` {
		t.Error(out)
	}
	b.want("GET", strings.Replace(ada, "USER", "GROUP", 1), "", 400, "INVALID_ARGUMENT", "not on the access list")
	b.want("GET", strings.TrimSuffix(ada, "?type=USER"), "", 400, "INVALID_ARGUMENT", "type")
	b.want("GET", strings.Replace(ada, "USER", "ROBOT", 1), "", 400, "INVALID_ARGUMENT", "ROBOT")
	b.want("POST", ada, `{"role": "OWNER"}`, 400, "ALREADY_EXISTS", "PUT")
	b.want("PUT", ada, `{"role": "OWNER"}`, 204, "", "")
	b.want("PUT", ada, `{"role": "KING"}`, 400, "INVALID_ARGUMENT", "KING")
	b.want("PUT", devs, `{"role": "VIEW"}`, 400, "INVALID_ARGUMENT", "not on the access list")
	b.want("POST", devs, `{"role": "VIEW"}`, 204, "", "")
	want := []v1alpha1.AccessEntry{
		{Kind: v1alpha1.UserSubject, Name: "Ada", Role: v1alpha1.RoleOwner},
		{Kind: v1alpha1.GroupSubject, Name: "platform devs", Domain: "corp.example", Role: v1alpha1.RoleView},
	}
	if got := b.get("shop").Spec.Access; marshal(t, got) != marshal(t, want) {
		t.Errorf("%s", marshal(t, got))
	}
	b.want("DELETE", ada, "", 204, "", "")
	b.want("DELETE", ada, "", 400, "INVALID_ARGUMENT", "not on the access list")
	b.want("GET", strings.Replace(ada, "/shop/", "/none/", 1), "", 404, "NOT_FOUND", "none")
}

// TestInvalid: the sentence of a schema's rule is what the client reads.
func TestInvalid(t *testing.T) {
	err := kubernetesError(apierrors.NewInvalid(v1alpha1.SchemeGroupVersion.WithKind("SupervisorNamespace").GroupKind(), "a", field.ErrorList{
		field.Invalid(field.NewPath("spec", "memory"), "0", "memory.limit must be at least 1Mi"),
		field.Invalid(nil, nil, "some validation rules were not checked"),
	}))
	if faultOf(err) != faultInvalidArgument || err.Error() != `spec.memory: Invalid value: "0": memory.limit must be at least 1Mi` {
		t.Errorf("%v", err)
	}
}

// TestKubernetesErrors maps what the API server answers.
func TestKubernetesErrors(t *testing.T) {
	gr := v1alpha1.Resource("supervisornamespaces")
	for _, c := range []struct {
		err    error
		status int
		kind   string
	}{
		{apierrors.NewInvalid(v1alpha1.SchemeGroupVersion.WithKind("SupervisorNamespace").GroupKind(), "a", nil), 400, "INVALID_ARGUMENT"},
		{apierrors.NewForbidden(gr, "a", fmt.Errorf("a policy")), 400, "NOT_ALLOWED_IN_CURRENT_STATE"},
		{apierrors.NewTooManyRequests("later", 1), 503, "SERVICE_UNAVAILABLE"},
		{apierrors.NewInternalError(fmt.Errorf("broken")), 500, "ERROR"},
		{fmt.Errorf("dial tcp 198.18.0.1:6443: connection refused"), 503, "SERVICE_UNAVAILABLE"},
		{context.DeadlineExceeded, 504, "TIMED_OUT"},
	} {
		funcs := interceptor.Funcs{Create: func(context.Context, client.WithWatch, client.Object, ...client.CreateOption) error { return c.err }}
		b := newBench(t, funcs, testSupervisor())
		status, out := b.do(http.MethodPost, instances, `{"cluster": "domain-c8", "namespace": "a"}`)
		if status != c.status || !strings.Contains(out, `"error_type":"`+c.kind+`"`) {
			t.Errorf("%v: %d %s, want %d %s", c.err, status, out, c.status, c.kind)
		}
	}
}
