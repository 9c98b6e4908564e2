package rest

import (
	"encoding/json"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const (
	ofCluster    = templatesPath + "/clusters/domain-c8"
	ofSupervisor = templatesPath + "/supervisors/default"
	ofService    = selfServicePath + "/domain-c8"
)

func (b *bench) namespaceTemplate(name string) v1alpha1.NamespaceTemplateSpec {
	b.t.Helper()
	t := &v1alpha1.NamespaceTemplate{}
	if err := b.client.Get(b.t.Context(), client.ObjectKey{Name: name}, t); err != nil {
		b.t.Fatal(err)
	}
	return t.Spec
}

// status of self-service, as both of its calls have it.
func (b *bench) status(want string) {
	b.t.Helper()
	var list []serviceSummary
	var one serviceSummary
	for path, into := range map[string]any{selfServicePath: &list, ofService: &one} {
		if err := json.Unmarshal([]byte(b.want("GET", path, "", 200, "", "")), into); err != nil {
			b.t.Fatal(err)
		}
	}
	if len(list) != 1 || list[0].Status != want || list[0].Cluster != "domain-c8" || list[0].Capability != "SUPPORTED" || one.Status != want || one.Messages == nil {
		b.t.Errorf("self-service is %+v, %+v; want %s", list, one, want)
	}
}

// TestTemplates makes, reads and changes one by both versions of the calls.
func TestTemplates(t *testing.T) {
	policy := &v1alpha1.StoragePolicy{ObjectMeta: metav1.ObjectMeta{Name: "gold"}, Spec: v1alpha1.StoragePolicySpec{ID: "aa-bb"}}
	b := newBench(t, interceptor.Funcs{}, testSupervisor(), policy)
	if got := b.want("GET", ofCluster, "", 200, "", ""); got != "[]" {
		t.Errorf("none yet: %s", got)
	}
	b.want("POST", ofCluster, `{"template": "team", "resource_spec": {"memory_limit": 2048}, "storage_specs": [{"policy": "aa-bb"}],
		"permissions": [{"subject_type": "GROUP", "subject": "developers", "domain": "vsphere.local"}]}`, 204, "", "")
	spec := b.namespaceTemplate("team")
	if spec.Active == nil || *spec.Active || spec.Settings.Memory.Limit.String() != "2Gi" || spec.Settings.StoragePolicies[0].Name != "gold" || spec.AllowedUsers[0] != (v1alpha1.TemplateSubject{Kind: v1alpha1.GroupSubject, Name: "developers", Domain: "vsphere.local"}) {
		t.Errorf("made: %+v", spec)
	}
	b.want("POST", ofSupervisor, `{"template": "team"}`, 400, "ALREADY_EXISTS", "team")
	b.want("POST", ofSupervisor, `{"template": "plain"}`, 204, "", "")
	if spec := b.namespaceTemplate("plain"); spec.AllowedUsers[0].Name != "Administrators" {
		t.Errorf("for nobody in particular: %+v", spec.AllowedUsers)
	}
	if got, want := b.want("GET", ofCluster, "", 200, "", ""), `[{"cluster":"domain-c8","template":"plain"},{"cluster":"domain-c8","template":"team"}]`; got != want {
		t.Errorf("listed: %s, want %s", got, want)
	}
	if got, want := b.want("GET", ofSupervisor, "", 200, "", ""), `[{"supervisor":"default","template":"plain"},{"supervisor":"default","template":"team"}]`; got != want {
		t.Errorf("listed: %s, want %s", got, want)
	}
	got := b.want("GET", ofCluster+"/team", "", 200, "", "")
	for _, want := range []string{`"cluster":"domain-c8"`, `"template":"team"`, `"memory_limit":2048`, `"storage_specs":[{"policy":"aa-bb"}]`, `"permissions":[{"subject_type":"GROUP","subject":"developers","domain":"vsphere.local"}]`, `"vm_service_spec":{`} {
		if !strings.Contains(got, want) {
			t.Errorf("%s has no %s", got, want)
		}
	}
	b.want("PATCH", ofSupervisor+"/team", `{"resource_spec": {"memory_limit": 1024}}`, 204, "", "")
	if spec := b.namespaceTemplate("team"); spec.Settings.Memory.Limit.String() != "1Gi" || len(spec.Settings.StoragePolicies) != 1 || spec.AllowedUsers[0].Name != "developers" {
		t.Errorf("changed: %+v", spec)
	}
	for _, c := range [][4]string{
		{"POST", ofCluster, `{"template": "Bad_Name"}`, "INVALID_ARGUMENT"},
		{"POST", ofCluster, `{"template": "a", "storage_specs": [{"policy": "none"}]}`, "INVALID_ARGUMENT"},
		{"POST", ofCluster, `{"template": "a", "vm_service_spec": {"vm_classes": ["none"]}}`, "INVALID_ARGUMENT"},
		{"POST", ofCluster, `{"template": "a", "permissions": [{"subject_type": "ROBOT", "subject": "r", "domain": "d"}]}`, "INVALID_ARGUMENT"},
		{"POST", ofCluster, `{"template": "a", "networks": ["n"]}`, "UNSUPPORTED"},
		{"POST", ofCluster, `{"template": "a", "colour": "red"}`, "UNEXPECTED_INPUT"},
		{"PATCH", ofCluster + "/team", `{"template": "other"}`, "UNEXPECTED_INPUT"},
	} {
		b.want(c[0], c[1], c[2], 400, c[3], "")
	}
	b.want("PATCH", ofCluster+"/none", `{}`, 404, "NOT_FOUND", "none")
	b.want("GET", templatesPath+"/supervisors/other", "", 404, "NOT_FOUND", "other")
	b.want("DELETE", ofCluster+"/team", "", 404, "OPERATION_NOT_FOUND", "") // vSphere has none
}

// TestSelfService is turned on and off; who may not change it may see it.
func TestSelfService(t *testing.T) {
	b := newBench(t, interceptor.Funcs{}, testSupervisor())
	b.status("DEACTIVATED")
	b.want("POST", ofService, "", 400, "INVALID_ARGUMENT", "action")
	b.want("POST", ofService+"?action=activate", "", 400, "NOT_ALLOWED_IN_CURRENT_STATE", "no template")
	b.want("POST", ofService+"?action=activateWithTemplate", `{"template": "team", "permissions": []}`, 204, "", "")
	b.status("RUNNING")
	b.want("POST", ofService+"?action=activate", "", 400, "ALREADY_EXISTS", "active")
	b.want("POST", ofCluster, `{"template": "later"}`, 204, "", "")
	if spec := b.namespaceTemplate("later"); !*spec.Active {
		t.Error("a template that is made while self-service is active is not")
	}
	b.want("POST", ofService+"?action=deactivate", "", 204, "", "")
	b.status("DEACTIVATED")
	for _, name := range []string{"team", "later"} {
		if spec := b.namespaceTemplate(name); *spec.Active {
			t.Errorf("%s is active", name)
		}
	}
	b.want("POST", ofService+"?action=activateWithTemplate", `{"template": "team", "resource_spec": {"memory_limit": 512}}`, 204, "", "")
	if spec := b.namespaceTemplate("team"); !*spec.Active || spec.Settings.Memory.Limit.String() != "512Mi" {
		t.Errorf("the template that was there: %+v", spec)
	}
	b.status("RUNNING")

	b.vcenter.grants = []string{"ann System.Read ClusterComputeResource/domain-c8"}
	b.as("ann").status("RUNNING")
	for _, c := range [][2]string{{"POST", ofService + "?action=deactivate"}, {"POST", ofCluster}, {"PATCH", ofCluster + "/team"}, {"POST", ofSupervisor}} {
		b.want(c[0], c[1], `{}`, 403, "UNAUTHORIZED", "Namespaces.SelfServiceManage")
	}
	if got := b.as("bob").want("GET", selfServicePath, "", 200, "", ""); got != "[]" {
		t.Errorf("of a stranger: %s", got)
	}
	b.want("GET", ofService, "", 403, "UNAUTHORIZED", "System.Read")
}
