package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	_ "github.com/vmware/govmomi/cli/namespace"
	_ "github.com/vmware/govmomi/cli/namespace/cluster"
	_ "github.com/vmware/govmomi/cli/namespace/vmclass"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/pbm"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vapi/namespace"
	vapirest "github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces/rest"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// TestVSphereREST works on namespaces with clients of vSphere, at a whole
// control plane and the embedded vCenter: govmomi, and stock govc as a process.
func TestVSphereREST(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane")
	}
	cfg := testConfig(t)
	startServer(t, cfg)
	v := newVSphereTest(t, cfg)
	t.Run("govmomi", v.govmomi)
	t.Run("govc", v.govc)
	t.Run("rights", v.rights)
	t.Run("API server", v.validation)
	t.Run("self-service", v.selfService)
}

type vsphereTest struct {
	cfg     Config
	vc      *vcsim.Server
	admin   client.Client // cluster administrator's
	ca      string        // file
	vim     *govmomi.Client
	cluster *object.ClusterComputeResource
	policy  string // id
}

const vsphereAdmin, vspherePassword = "Administrator@vsphere.local", "correct-horse-1"

func newVSphereTest(t *testing.T, cfg Config) *vsphereTest {
	t.Helper()
	vc, err := vcsim.New(vcsim.Config{Dir: t.TempDir(), AdminPassword: vspherePassword, Clusters: []vcsim.Cluster{{
		Name: "atoll", Hosts: []vcsim.Host{{Name: "node-1", CPUs: 4, MHz: 2294, Memory: 8 << 30}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vc.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := cfg.serveNamespaces(vc); err != nil {
		t.Fatal(err)
	}
	v := &vsphereTest{cfg: cfg, vc: vc, ca: filepath.Join(t.TempDir(), "ca.pem")}
	if err := os.WriteFile(v.ca, vc.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	if v.admin, err = rest.NewClient(restFrom(t, cfg.Kubeconfig())); err != nil {
		t.Fatal(err)
	}
	v.vim = v.connect(t, vsphereAdmin, vspherePassword)
	if v.cluster, err = find.NewFinder(v.vim.Client).ClusterComputeResource(t.Context(), "/Atoll/host/atoll"); err != nil {
		t.Fatal(err)
	}
	policies, err := pbm.NewClient(t.Context(), v.vim.Client)
	if err != nil {
		t.Fatal(err)
	}
	if v.policy, err = policies.ProfileIDByName(t.Context(), "Atoll Default Storage Policy"); err != nil {
		t.Fatal(err)
	}
	v.join(t)
	return v
}

func (v *vsphereTest) connect(t *testing.T, user, password string) *govmomi.Client {
	t.Helper()
	sc := soap.NewClient(v.vc.URL(), false)
	if err := sc.SetRootCAs(v.ca); err != nil {
		t.Fatal(err)
	}
	vim, err := vim25.NewClient(t.Context(), sc)
	if err != nil {
		t.Fatal(err)
	}
	c := &govmomi.Client{Client: vim, SessionManager: session.NewManager(vim)}
	if err := c.Login(t.Context(), url.UserPassword(user, password)); err != nil {
		t.Fatal(err)
	}
	return c
}

// join has the control plane's controllers keep namespaces in this vCenter.
func (v *vsphereTest) join(t *testing.T) {
	t.Helper()
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: "vcenter"},
		StringData: map[string]string{corev1.BasicAuthUsernameKey: vsphereAdmin, corev1.BasicAuthPasswordKey: vspherePassword},
	}
	if _, err := clientFrom(t, restFrom(t, v.cfg.Kubeconfig())).CoreV1().Secrets(secret.Namespace).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	sv := &v1alpha1.Supervisor{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName}, Spec: v1alpha1.SupervisorSpec{
		VCenter: v1alpha1.VCenter{Server: v.vc.URL().Host, CABundle: v.vc.CA(), CredentialsSecret: v1alpha1.SecretReference{Namespace: secret.Namespace, Name: secret.Name}},
		Zones:   []v1alpha1.Zone{{Name: "zone-a", Cluster: "atoll"}},
	}}
	if err := v.admin.Create(t.Context(), sv); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the Supervisor knows its vCenter", func() error {
		if err := v.admin.Get(t.Context(), client.ObjectKeyFromObject(sv), sv); err != nil {
			return err
		}
		if !meta.IsStatusConditionTrue(sv.Status.Conditions, v1alpha1.ConditionReady) || len(sv.Status.Zones) != 1 || sv.Status.Zones[0].MHzPerCore == 0 {
			return fmt.Errorf("status %+v", sv.Status)
		}
		return nil
	})
	eventually(t, "the storage policy is known", func() error {
		list := &v1alpha1.StoragePolicyList{}
		if err := v.admin.List(t.Context(), list); err != nil {
			return err
		}
		for _, p := range list.Items {
			if p.Spec.ID == v.policy {
				return nil
			}
		}
		return fmt.Errorf("there are %d", len(list.Items))
	})
}

// await returns when the namespace has a config_status; none: when it is gone.
func (v *vsphereTest) await(t *testing.T, m *namespace.Manager, name, status string) {
	t.Helper()
	eventually(t, "namespace "+name+" is "+status, func() error {
		info, err := m.GetNamespace(t.Context(), name)
		if status == "" {
			if !vapirest.IsStatusError(err, http.StatusNotFound) {
				return fmt.Errorf("it is %+v, %v", info, err)
			}
			return nil
		}
		if err != nil || info.ConfigStatus != status {
			return fmt.Errorf("it is %+v, %v", info, err)
		}
		return nil
	})
}

func (v *vsphereTest) get(t *testing.T, name string) *v1alpha1.SupervisorNamespace {
	t.Helper()
	ns := &v1alpha1.SupervisorNamespace{}
	if err := v.admin.Get(t.Context(), client.ObjectKey{Name: name}, ns); err != nil {
		t.Fatal(err)
	}
	return ns
}

func (v *vsphereTest) manager(t *testing.T, user, password string) *namespace.Manager {
	t.Helper()
	c := vapirest.NewClient(v.vim.Client)
	if err := c.Login(t.Context(), url.UserPassword(user, password)); err != nil {
		t.Fatal(err)
	}
	return namespace.NewManager(c)
}

// must ends a test whose call failed.
func must[T any](t *testing.T) func(T, error) T {
	return func(out T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}

func (v *vsphereTest) govmomi(t *testing.T) {
	m, ctx := v.manager(t, vsphereAdmin, vspherePassword), t.Context()
	cluster := v.cluster.Reference().Value

	if err := m.CreateVmClass(ctx, namespace.VirtualMachineClassCreateSpec{Id: "small", CpuCount: 2, MemoryMb: 4096, MemoryReservation: 50}); err != nil {
		t.Fatal(err)
	}
	class := must[namespace.VirtualMachineClassInfo](t)(m.GetVmClass(ctx, "small"))
	if class.CpuCount != 2 || class.MemoryMb != 4096 || class.MemoryReservation != 50 || class.ConfigStatus != "READY" {
		t.Errorf("class %+v", class)
	}

	err := m.CreateNamespace(ctx, namespace.NamespacesInstanceCreateSpec{
		Cluster: cluster, Namespace: "one", VmServiceSpec: namespace.VmServiceSpec{VmClasses: []string{"small"}},
		StorageSpecs: []namespace.StorageSpec{{Policy: v.policy, Limit: 1024}},
	})
	if err != nil {
		t.Fatal(err)
	}
	spec := v.get(t, "one").Spec
	if len(spec.StoragePolicies) != 1 || spec.StoragePolicies[0].Name != "atoll-default-storage-policy" || spec.StoragePolicies[0].Limit.String() != "1Gi" || len(spec.VMClasses) != 1 {
		t.Errorf("spec %+v", spec)
	}
	info := must[namespace.NamespacesInstanceInfo](t)(m.GetNamespace(ctx, "one"))
	if info.ClusterId != cluster || len(info.StorageSpecs) != 1 || info.StorageSpecs[0] != (namespace.StorageSpec{Policy: v.policy, Limit: 1024}) || info.ConfigStatus == "ERROR" {
		t.Errorf("info %+v", info)
	}
	v.await(t, m, "one", "RUNNING")
	if err := m.UpdateNamespace(ctx, "one", namespace.NamespacesInstanceUpdateSpec{StorageSpecs: []namespace.StorageSpec{{Policy: v.policy}}}); err != nil {
		t.Fatal(err)
	}
	if spec := v.get(t, "one").Spec; spec.StoragePolicies[0].Limit != nil || len(spec.VMClasses) != 1 {
		t.Errorf("after the update: %+v", spec)
	}

	description := "made by version 2"
	if err := m.CreateNamespaceV2(ctx, namespace.NamespaceInstanceCreateSpecV2{Supervisor: v1alpha1.SupervisorName, Namespace: "two", Description: &description}); err != nil {
		t.Fatal(err)
	}
	two := must[namespace.NamespaceInstanceInfoV2](t)(m.GetNamespaceV2(ctx, "two"))
	if two.Supervisor != v1alpha1.SupervisorName || two.Description != description {
		t.Errorf("version 2: %+v", two)
	}
	if list := must[[]namespace.NamespaceInstanceSummaryV2](t)(m.ListNamespacesV2(ctx)); len(list) != 2 {
		t.Errorf("version 2 lists %+v", list)
	}
	if list := must[[]namespace.ClusterSummary](t)(m.ListClusters(ctx)); len(list) != 1 || list[0].ID != cluster || list[0].Name != "atoll" || list[0].ConfigStatus.String() != "RUNNING" || list[0].KubernetesStatus.String() != "READY" {
		t.Errorf("clusters %+v", list)
	}
	if s := must[namespace.SupervisorsSummaryResult](t)(m.GetSupervisorSummaries(ctx)); len(s.Items) != 1 || s.Items[0].Supervisor != v1alpha1.SupervisorName {
		t.Errorf("supervisors %+v", s)
	}
	if s := must[[]namespace.SupervisorTopologyInfo](t)(m.GetSupervisorTopology(ctx, v1alpha1.SupervisorName)); len(s) != 1 || s[0].Zone != "zone-a" || s[0].Clusters[0] != cluster {
		t.Errorf("topology %+v", s)
	}

	if err := m.DeleteVmClass(ctx, "small"); err == nil || !strings.Contains(err.Error(), "RESOURCE_IN_USE") {
		t.Errorf("deleting a class in use: %v", err)
	}
	for _, name := range []string{"one", "two"} {
		if err := m.DeleteNamespace(ctx, name); err != nil {
			t.Error(err)
		}
	}
	v.await(t, m, "one", "")
	v.await(t, m, "two", "")
	if list := must[[]namespace.NamespacesInstanceSummary](t)(m.ListNamespaces(ctx)); len(list) != 0 {
		t.Errorf("left: %+v", list)
	}
	if err := m.DeleteVmClass(ctx, "small"); err != nil {
		t.Error(err)
	}
	if err := m.Logout(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ListNamespaces(ctx); !vapirest.IsStatusError(err, http.StatusUnauthorized) {
		t.Errorf("after the logout: %v", err)
	}
}

// govc asks the supervisor, which stands in front of the vCenter.
func (v *vsphereTest) govc(t *testing.T) {
	home, m := t.TempDir(), v.manager(t, vsphereAdmin, vspherePassword)
	run := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
		cmd.Env = []string{
			roleEnv + "=" + roleGovc, "HOME=" + home, "GOVC_URL=https://" + v.cfg.VSphereAddress().String() + "/sdk", "GOVC_USERNAME=" + vsphereAdmin, "GOVC_PASSWORD=" + vspherePassword,
			"GOVC_TLS_CA_CERTS=" + v.cfg.ClientCAFile(),
		}
		out, err := cmd.CombinedOutput()
		t.Logf("govc %s\n%s", strings.Join(args, " "), out)
		return string(out), err
	}
	for _, step := range []struct {
		args, want, refused string
		await               string // of shop, before
	}{
		{args: "namespace.cluster.ls -l", want: "/Atoll/host/atoll  RUNNING  READY\n"},
		{args: "namespace.vmclass.create -cpus 2 -memory 4096 small", want: ""},
		{args: `namespace.vmclass.create -spec {"numCPUs":4,"memoryMB":8192} large`, want: ""},
		{args: "namespace.vmclass.create -cpus 2 -memory 4096 Small", refused: "INVALID_ARGUMENT"},
		{args: "namespace.vmclass.update -cpus 3 small", want: ""},
		{args: "namespace.vmclass.info small", want: "ID:      small\nCPUs:    3\nMemory:  4.0GB\n"},
		{args: "namespace.create -cluster atoll -vmclass small -storage Atoll_Default_Storage_Policy shop", want: ""},
		{args: "namespace.create -cluster atoll shop", refused: "ALREADY_EXISTS"},
		{args: "namespace.create -cluster atoll -library none other", refused: "Atoll has no content libraries"},
		{args: "namespace.ls", want: "shop\n"},
		{await: "RUNNING", args: "namespace.info shop", want: "Cluster:         /Atoll/host/atoll\nStatus:          RUNNING\nVM Classes:      small\nStorage Policy:  Atoll Default Storage Policy\n"},
		{args: "namespace.update -vmclass small -vmclass large shop", want: ""},
		{await: "RUNNING", args: "namespace.info shop", want: "Cluster:     /Atoll/host/atoll\nStatus:      RUNNING\nVM Classes:  small,large\n"},
		{args: "namespace.vmclass.rm large", refused: "RESOURCE_IN_USE"},
		{args: "namespace.rm shop", want: ""},
		{await: "-", args: "namespace.info shop", refused: "404"},
		{args: "namespace.vmclass.rm large", want: ""},
		{args: "namespace.vmclass.rm small", want: ""},
		{args: "namespace.vmclass.ls", want: ""},
	} {
		if step.await != "" {
			v.await(t, m, "shop", strings.Trim(step.await, "-"))
		}
		args := strings.Fields(step.args)
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "_", " ")
		}
		out, err := run(args...)
		var exit *exec.ExitError
		switch {
		case err != nil && !errors.As(err, &exit):
			t.Fatalf("govc %s: %v", step.args, err)
		case step.refused != "" && (err == nil || !strings.Contains(out, step.refused)):
			t.Errorf("govc %s: %v, want a refusal with %q", step.args, err, step.refused)
		case step.refused == "" && (err != nil || out != step.want):
			t.Errorf("govc %s: %v, got %q, want %q", step.args, err, out, step.want)
		}
	}
}

// rights: users do what their roles in vCenter allow. The access list gives ada
// one on the pool of one namespace; bob has one on the pool above all.
func (v *vsphereTest) rights(t *testing.T) {
	ctx := t.Context()
	for _, user := range []string{"ada", "bob"} {
		if err := v.vc.Users().Set(user, vspherePassword); err != nil {
			t.Fatal(err)
		}
	}
	admin := v.manager(t, vsphereAdmin, vspherePassword)
	access := []v1alpha1.AccessEntry{{Kind: v1alpha1.UserSubject, Name: "ada", Role: v1alpha1.RoleOwner}}
	for name, list := range map[string][]v1alpha1.AccessEntry{"mine": access, "others": nil} {
		ns := &v1alpha1.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
		ns.Spec.Access = list
		if err := v.admin.Create(ctx, ns); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"mine", "others"} {
		v.await(t, admin, name, "RUNNING")
	}
	update := namespace.NamespacesInstanceUpdateSpec{StorageSpecs: []namespace.StorageSpec{{Policy: v.policy}}}
	create := namespace.NamespacesInstanceCreateSpec{Cluster: v.cluster.Reference().Value, Namespace: "more"}

	ada := v.manager(t, "ada@vsphere.local", vspherePassword)
	if list := must[[]namespace.NamespacesInstanceSummary](t)(ada.ListNamespaces(ctx)); len(list) != 1 || list[0].Namespace != "mine" {
		t.Errorf("ada sees %+v", list)
	}
	_, reads := ada.GetNamespace(ctx, "others")
	for what, err := range map[string]error{
		"reads another's":  reads,
		"changes":          ada.UpdateNamespace(ctx, "mine", update),
		"deletes":          ada.DeleteNamespace(ctx, "mine"),
		"makes one":        ada.CreateNamespace(ctx, create),
		"makes a VM class": ada.CreateVmClass(ctx, namespace.VirtualMachineClassCreateSpec{Id: "x", CpuCount: 1, MemoryMb: 512}),
	} {
		if !vapirest.IsStatusError(err, http.StatusForbidden) {
			t.Errorf("ada %s: %v", what, err)
		}
	}

	rights := object.NewAuthorizationManager(v.vim.Client)
	role := must[int32](t)(rights.AddRole(ctx, "Namespaces here", []string{"System.Read", "Namespaces.Configure"}))
	parent := must[*object.ResourcePool](t)(find.NewFinder(v.vim.Client).ResourcePool(ctx, "/Atoll/host/atoll/Resources/Namespaces"))
	if err := rights.SetEntityPermissions(ctx, parent.Reference(), []types.Permission{{Principal: `VSPHERE.LOCAL\bob`, RoleId: role, Propagate: true}}); err != nil {
		t.Fatal(err)
	}
	bob := v.manager(t, "bob@vsphere.local", vspherePassword)
	if list := must[[]namespace.NamespacesInstanceSummary](t)(bob.ListNamespaces(ctx)); len(list) != 2 {
		t.Errorf("bob sees %+v", list)
	}
	if err := bob.UpdateNamespace(ctx, "mine", update); err != nil {
		t.Errorf("bob, who may configure what is in the pool: %v", err)
	}
	if spec := v.get(t, "mine").Spec; len(spec.StoragePolicies) != 1 || len(spec.Access) != 1 {
		t.Errorf("spec %+v", spec)
	}
	if err := bob.CreateNamespace(ctx, create); !vapirest.IsStatusError(err, http.StatusForbidden) {
		t.Errorf("bob, who has no right on the cluster, makes a namespace: %v", err)
	}
}

// validation: what the API server refuses comes back as vSphere's error, with
// the sentence of the schema's rule.
func (v *vsphereTest) validation(t *testing.T) {
	m := v.manager(t, vsphereAdmin, vspherePassword)
	call := func(method, path, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, "https://"+v.vc.URL().Host+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("vmware-api-session-id", m.SessionID())
		var status int
		var out bytes.Buffer
		err = m.Client.Client.Do(t.Context(), req, func(res *http.Response) error {
			status = res.StatusCode
			_, err := out.ReadFrom(res.Body)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s %s %s\n%d %s", method, path, body, status, out.String())
		return status, out.String()
	}
	const shop = "/api/vcenter/namespaces/instances/strict"
	if status, out := call("POST", "/api/vcenter/namespaces/instances", `{"cluster": "`+v.cluster.Reference().Value+`", "namespace": "strict",
		"resource_spec": {"cpu_limit": 4588, "memory_limit": 2048},
		"access_list": [{"subject_type": "GROUP", "subject": "devs", "domain": "vsphere.local", "role": "EDIT"}]}`); status != http.StatusNoContent {
		t.Fatalf("%d %s", status, out)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"PATCH", shop, `{"resource_spec": {"cpu_limit_default": 9176}}`, 400, "lower it"},
		{"PATCH", shop, `{"resource_spec": {"memory_limit": 0}}`, 400, "INVALID_ARGUMENT"},
		{"PATCH", shop, `{"description": "` + strings.Repeat("x", 2000) + `"}`, 400, "INVALID_ARGUMENT"},
		{"PATCH", shop, `{"zones": [{"zone": "zone-a"}]}`, 400, "zones cannot be taken away"},
		{"POST", shop + "/access/vsphere.local/ada?type=USER", `{"role": "OWNER"}`, 204, ""},
		{"GET", shop + "/access/vsphere.local/ada?type=USER", "", 200, `{"role":"OWNER","inherited":false}`},
		{"DELETE", shop + "/access/vsphere.local/devs?type=GROUP", "", 204, ""},
		{"GET", "/api/vcenter/namespace-management/software/clusters", "", 200, KubernetesVersion},
		{"POST", "/api/vcenter/namespace-management/virtual-machine-classes", `{"id": "huge", "cpu_count": 10000, "memory_MB": 1024}`, 400, "INVALID_ARGUMENT"},
	} {
		status, out := call(c.method, c.path, c.body)
		if status != c.status || !strings.Contains(out, c.want) {
			t.Errorf("%s %s %s: %d %s, want %d with %q", c.method, c.path, c.body, status, out, c.status, c.want)
		}
	}
	var read struct {
		Quota map[string]int64 `json:"resource_spec"`
	}
	if _, out := call("GET", shop, ""); json.Unmarshal([]byte(out), &read) != nil || read.Quota["cpu_limit"] != 4588 || read.Quota["memory_limit"] != 2048 {
		t.Errorf("limits %v", read.Quota)
	}
}
