package controlplane

import (
	"net/http"
	"net/url"
	"testing"

	vapirest "github.com/vmware/govmomi/vapi/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// selfService is turned on with a template, and off, by REST; the API server
// takes what the calls make.
func (v *vsphereTest) selfService(t *testing.T) {
	c, ctx := vapirest.NewClient(v.vim.Client), t.Context()
	if err := c.Login(ctx, url.UserPassword(vsphereAdmin, vspherePassword)); err != nil {
		t.Fatal(err)
	}
	const root = "/api/vcenter/namespaces/"
	service := root + "namespace-self-service/" + v.cluster.Reference().Value
	do := func(method, path, action string, body, into any) {
		t.Helper()
		r := c.Resource(path)
		if action != "" {
			r = r.WithParam("action", action)
		}
		req := r.Request(method)
		if body != nil {
			req = r.Request(method, body)
		}
		if err := c.Do(ctx, req, into); err != nil {
			t.Fatalf("%s %s: %v", method, path, err)
		}
	}
	status := func(want string) {
		t.Helper()
		var info struct {
			Status string `json:"status"`
		}
		do(http.MethodGet, service, "", nil, &info)
		if info.Status != want {
			t.Errorf("self-service is %s, want %s", info.Status, want)
		}
	}
	status("DEACTIVATED")
	do(http.MethodPost, service, "activateWithTemplate", map[string]any{
		"template": "team", "resource_spec": map[string]any{"memory_limit": 512}, "storage_specs": []any{map[string]any{"policy": v.policy}},
		"permissions": []any{map[string]any{"subject_type": "GROUP", "subject": "developers", "domain": "vsphere.local"}},
	}, nil)
	made := &v1alpha1.NamespaceTemplate{}
	if err := v.admin.Get(ctx, client.ObjectKey{Name: "team"}, made); err != nil || made.Spec.Settings.Memory.Limit.String() != "512Mi" || made.Spec.AllowedUsers[0].Name != "developers" {
		t.Errorf("the template: %+v, %v", made.Spec, err)
	}
	status("RUNNING")
	template := root + "namespace-templates/supervisors/" + v1alpha1.SupervisorName + "/team"
	do(http.MethodPatch, template, "", map[string]any{"resource_spec": map[string]any{"memory_limit": 1024}}, nil)
	var info struct {
		Spec map[string]int64 `json:"resource_spec"`
	}
	do(http.MethodGet, template, "", nil, &info)
	if info.Spec["memory_limit"] != 1024 {
		t.Errorf("the template has %v", info.Spec)
	}
	do(http.MethodPost, service, "deactivate", nil, nil)
	status("DEACTIVATED")
}
