package rest

import (
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// reads is a cluster with a namespace that uses something.
func reads(t *testing.T) *bench {
	ns := namespace("shop", "resgroup-1")
	ns.Status.Usage = &v1alpha1.Usage{CPU: quantity("2"), Memory: quantity("1Gi"), Storage: []v1alpha1.StorageUsage{{Policy: "gold", StorageClass: "gold", Used: *quantity("10Gi")}}}
	sv := testSupervisor()
	sv.Spec.Zones = append(sv.Spec.Zones, v1alpha1.Zone{Name: "zone-b", Cluster: "C1"})
	sv.Status.Zones = append(sv.Status.Zones, v1alpha1.ZoneStatus{Name: "zone-b", Cluster: "domain-c9", Path: "/DC0/host/f/C%2f1", MHzPerCore: 2294, CPU: quantity("4"), Memory: quantity("8Gi")})
	return newBench(t, interceptor.Funcs{}, sv, goldPolicy(), ns)
}

func TestReads(t *testing.T) {
	b := reads(t)
	const half = `"cpu_used":2294,%s,"memory_used":512,%s,"storage_used":61440,"storage_capacity":102400`
	stats := func(cpu, memory string) string {
		s := strings.Replace(half, "%s", `"cpu_capacity":`+cpu, 1)
		return "{" + strings.Replace(s, "%s", `"memory_capacity":`+memory, 1) + "}"
	}
	a, z := stats("18352", "16384"), stats("9176", "8192")
	both := `{"cpu_used":4588,"cpu_capacity":27528,"memory_used":1024,"memory_capacity":24576,"storage_used":61440,"storage_capacity":102400}`
	info := `{"name":"default","apiendpoint":"198.18.0.1:6443","stats":` + both + `,"config_status":"RUNNING","kubernetes_status":"READY","messages":[]}`
	for _, c := range []struct{ path, want string }{
		{management + "/clusters", `[{"cluster":"domain-c8","cluster_name":"C0","stats":` + a + `,"config_status":"RUNNING","kubernetes_status":"READY"},` +
			`{"cluster":"domain-c9","cluster_name":"C/1","stats":` + z + `,"config_status":"RUNNING","kubernetes_status":"READY"}]`},
		{management + "/clusters/domain-c8", `{"stat_summary":` + a + `,"config_status":"RUNNING","messages":[],"kubernetes_status":"READY","kubernetes_status_messages":[],` +
			`"api_server_management_endpoint":"198.18.0.1:6443","api_server_cluster_endpoint":"198.18.0.1:6443","api_servers":["198.18.0.1:6443"],` +
			`"network_provider":"VSPHERE_NETWORK","service_cidr":{"address":"10.96.0.0","prefix":16}}`},
		{management + "/clusters/domain-c8/workload-resource-options", `{"create_resource_quota_type":"ResourceQuotaOptionsV1","update_resource_quota_type":"ResourceQuotaOptionsV1Update"}`},
		{management + "/supervisors/summaries", `{"items":[{"supervisor":"default","info":` + info + `}]}`},
		{management + "/supervisors/default/summary", info},
		{management + "/supervisors/sv-uid/topology", `[{"zone":"zone-a","clusters":["domain-c8"]},{"zone":"zone-b","clusters":["domain-c9"]}]`},
		{management + "/software/clusters", `[{"cluster":"domain-c8","cluster_name":"C0","current_version":"v1.36.3","available_versions":[],"state":"READY","messages":[]},` +
			`{"cluster":"domain-c9","cluster_name":"C/1","current_version":"v1.36.3","available_versions":[],"state":"READY","messages":[]}]`},
		{management + "/software/clusters/domain-c9", `{"current_version":"v1.36.3","available_versions":[],"state":"READY","messages":[]}`},
		{management + "/software/cluster-available-versions", `[]`},
		{management + "/supervisor-services", `[]`},
		{management + "/cluster-compatibility", `[{"cluster":"domain-c8","compatible":true,"incompatibility_reasons":[]},{"cluster":"domain-c9","compatible":true,"incompatibility_reasons":[]}]`},
		{management + "/cluster-compatibility?compatible=true&network_provider=NSX_VPC", `[]`},
		{"/api/vcenter/storage/policies", `[{"policy":"` + goldID + `","name":"Gold Policy","description":""}]`},
		{"/api/vcenter/storage/policies?policies=other", `[]`},
		{instances, `[{"cluster":"domain-c8","namespace":"shop","description":"","config_status":"CONFIGURING","stats":{"cpu_used":4588,"memory_used":1024,"storage_used":10240},"self_service_namespace":false}]`},
		{instances + "/v2", `[{"supervisor":"default","namespace":"shop","description":"","config_status":"CONFIGURING","stats":{"cpu_used":4588,"memory_used":1024,"storage_used":10240},"self_service_namespace":false}]`},
		{instances + "/v2/shop", `{"supervisor":"default","zones":[{"zone":"zone-a","type":"WORKLOAD","marked_for_removal":false},{"zone":"zone-b","type":"WORKLOAD","marked_for_removal":false}],` +
			`"config_status":"CONFIGURING","messages":[],"stats":{"cpu_used":4588,"memory_used":1024,"storage_used":10240},"self_service_namespace":false,` +
			`"description":"","access_list":[],"storage_specs":[],"vm_service_spec":{"content_libraries":[],"vm_classes":[]}}`},
		{"/api/vcenter/namespaces-user/namespaces", `[{"namespace":"shop","master_host":"198.18.0.1:6443"}]`},
	} {
		if out := b.want("GET", c.path, "", 200, "", ""); out != c.want {
			t.Errorf("%s\ngot  %s\nwant %s", c.path, out, c.want)
		}
	}
	if out := b.want("POST", "/api/vcenter/storage/policies/"+goldID+"?action=check-compatibility", `{"datastores": ["datastore-1", "datastore-2"]}`, 200, "", ""); out != `{"compatible_datastores":[{"datastore":"datastore-1"}]}` {
		t.Error(out)
	}
	b.want("POST", "/api/vcenter/storage/policies/none?action=check-compatibility", `{"datastores": []}`, 404, "NOT_FOUND", "none")
	b.want("GET", management+"/cluster-compatibility?compatible=perhaps", "", 400, "INVALID_ARGUMENT", "perhaps")
	b.want("GET", management+"/cluster-compatibility?network_provider=CALICO", "", 400, "INVALID_ARGUMENT", "CALICO")
	b.want("GET", management+"/supervisors/none/summary", "", 404, "NOT_FOUND", "none")
	b.vcenter.gone = []string{"domain-c1"}
	b.want("GET", management+"/clusters/domain-c1", "", 404, "NOT_FOUND", "domain-c1")
	b.want("GET", management+"/clusters/domain-c2", "", 400, "UNSUPPORTED", "not enabled")

	// Who may read one cluster sees one.
	b.as("eve")
	b.vcenter.grants = []string{"eve System.Read ClusterComputeResource/domain-c9"}
	for _, path := range []string{"/clusters", "/software/clusters", "/cluster-compatibility"} {
		if out := b.want("GET", management+path, "", 200, "", ""); strings.Contains(out, "domain-c8") || !strings.Contains(out, "domain-c9") {
			t.Errorf("%s: %s", path, out)
		}
	}
	if out := b.want("GET", management+"/supervisors/summaries", "", 200, "", ""); out != `{"items":[]}` {
		t.Error(out)
	}
}

// TestUnconnected: before the clusters have been found in vCenter, only who may
// do everything may do something, and nothing is made up.
func TestUnconnected(t *testing.T) {
	sv := testSupervisor()
	sv.Status = v1alpha1.SupervisorStatus{Conditions: []metav1.Condition{
		{Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: v1alpha1.ReasonCredentialsInvalid, Message: "the password is wrong"},
		{Type: v1alpha1.ConditionConnected, Status: metav1.ConditionFalse, Reason: v1alpha1.ReasonCredentialsInvalid, Message: "the password is wrong"},
	}}
	ns := namespace("shop")
	ns.Spec.CPU = &v1alpha1.CPUAllocation{Limit: quantity("1")}
	b := newBench(t, interceptor.Funcs{}, sv, ns)
	b.want("GET", instances+"/shop", "", 503, "SERVICE_UNAVAILABLE", "clock")
	b.want("POST", instances+"/v2", `{"supervisor": "default", "namespace": "a"}`, 503, "SERVICE_UNAVAILABLE", "not been found")
	b.want("POST", instances, `{"cluster": "domain-c8", "namespace": "a"}`, 400, "UNSUPPORTED", "not enabled")
	b.want("PATCH", instances+"/shop", `{"zones": [{"zone": "zone-a"}]}`, 204, "", "")
	if zones := b.get("shop").Spec.Zones; len(zones) != 1 {
		t.Errorf("zones %v", zones)
	}
	if out := b.want("GET", instances, "", 200, "", ""); !strings.Contains(out, `"cluster":"","namespace":"shop"`) {
		t.Error(out)
	}
	if out := b.want("GET", management+"/supervisors/default/summary", "", 200, "", ""); !strings.Contains(out, `"config_status":"ERROR","kubernetes_status":"WARNING"`) || strings.Count(out, "the password is wrong") != 1 {
		t.Error(out)
	}
	if out := b.want("GET", management+"/clusters", "", 200, "", ""); out != "[]" {
		t.Error(out)
	}
	b.as("eve")
	for _, path := range []string{instances + "/shop", management + "/supervisors/default/summary"} {
		b.want("GET", path, "", 403, "UNAUTHORIZED", "the root folder")
	}
	b.want("DELETE", instances+"/shop", "", 403, "UNAUTHORIZED", "the root folder")
}

func TestStatus(t *testing.T) {
	condition := func(kind string, status metav1.ConditionStatus, reason string, generation int64) metav1.Condition {
		return metav1.Condition{Type: kind, Status: status, Reason: reason, ObservedGeneration: generation, Message: "because"}
	}
	const ready, synced = v1alpha1.ConditionReady, v1alpha1.ConditionSynced
	for _, c := range []struct {
		name       string
		conditions []metav1.Condition
		want       string
		messages   string
	}{
		{"new", nil, statusConfiguring, ""},
		{"all well", []metav1.Condition{condition(ready, "True", "Synced", 2), condition(synced, "True", "Synced", 2)}, statusRunning, ""},
		{"of an older spec", []metav1.Condition{condition(ready, "True", "Synced", 2), condition(synced, "True", "Synced", 1)}, statusConfiguring, ""},
		{"under way", []metav1.Condition{condition(ready, "True", "Synced", 2), condition(synced, "False", v1alpha1.ReasonProgressing, 2)}, statusConfiguring, "WARNING"},
		{"vCenter away", []metav1.Condition{condition(ready, "True", "Synced", 2), condition(synced, "Unknown", v1alpha1.ReasonVCenterUnreachable, 2)}, statusConfiguring, "WARNING"},
		{"an unknown policy", []metav1.Condition{condition(ready, "True", "Synced", 2), condition(synced, "False", v1alpha1.ReasonUnknownPolicy, 2)}, statusError, "ERROR"},
		{"an error and more", []metav1.Condition{condition(ready, "False", v1alpha1.ReasonPoolNotOurs, 2), condition(synced, "False", v1alpha1.ReasonProgressing, 2)}, statusError, "ERROR WARNING"},
	} {
		ns := &v1alpha1.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Generation: 2}, Status: v1alpha1.SupervisorNamespaceStatus{Conditions: c.conditions}}
		var severities []string
		for _, m := range messagesOf(ns.Status.Conditions, nil) {
			severities = append(severities, m.Severity)
		}
		if got := configStatus(ns); got != c.want || strings.Join(severities, " ") != c.messages {
			t.Errorf("%s: %s %v, want %s %s", c.name, got, severities, c.want, c.messages)
		}
	}
	told := messagesOf([]metav1.Condition{condition(synced, "False", v1alpha1.ReasonUnknownPolicy, 1)}, []v1alpha1.Message{
		{Severity: v1alpha1.SeverityError, Reason: v1alpha1.ReasonUnknownPolicy, Text: "because"}, // the condition's
		{Severity: v1alpha1.SeverityInfo, Reason: v1alpha1.ReasonDrift, Text: "a limit was adopted"},
	})
	if len(told) != 2 || told[1].Severity != "INFO" || told[1].Details.Default != "a limit was adopted" {
		t.Errorf("%s", marshal(t, told))
	}
}
