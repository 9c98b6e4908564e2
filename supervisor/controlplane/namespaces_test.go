package controlplane

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const (
	nsUser     = "Administrator@vsphere.local"
	nsPassword = "a password of the tests"
	nsMHz      = 2000
)

// TestNamespaces holds both sides of a namespace together: a whole control
// plane, and the embedded vCenter over TLS.
func TestNamespaces(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane; about 30 s")
	}
	cfg := testConfig(t)
	startServer(t, cfg)
	n := newNamespacesTest(t, cfg)
	t.Run("no Supervisor", n.early)
	n.join(t)
	t.Run("create", n.create)
	t.Run("change", n.change)
	t.Run("drift", n.drift)
	t.Run("quota edited", n.quotas)
	t.Run("limits", n.limits)
	t.Run("bad input", n.badInput)
	t.Run("bad days", n.badDays)
	t.Run("self-service", n.selfService)
	t.Run("storage", n.storage)
	t.Run("made anew", n.anew)
	t.Run("delete", n.deletion)
	t.Run("metrics", n.metrics)
}

type namespacesTest struct {
	cfg   Config
	dir   string // the vCenter's
	vc    *vcsim.Server
	admin client.Client
	vim   *govmomi.Client
}

func newNamespacesTest(t *testing.T, cfg Config) *namespacesTest {
	t.Helper()
	n := &namespacesTest{cfg: cfg, dir: t.TempDir()}
	scheme := runtime.NewScheme()
	if err := errors.Join(clientgoscheme.AddToScheme(scheme), v1alpha1.AddToScheme(scheme), snapshotv1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	var err error
	if n.admin, err = client.New(restFrom(t, cfg.Kubeconfig()), client.Options{Scheme: scheme}); err != nil {
		t.Fatal(err)
	}
	n.startVCenter(t, vcsim.Config{})
	t.Cleanup(func() {
		if err := n.vc.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, user := range []string{"ada", "bob"} {
		if err := n.vc.Users().Set(user, nsPassword); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.vc.Users().SetGroup("devs", "ada"); err != nil {
		t.Fatal(err)
	}
	return n
}

// startVCenter in the test's directory; c has what differs.
func (n *namespacesTest) startVCenter(t *testing.T, c vcsim.Config) {
	t.Helper()
	host := func(name string) []vcsim.Host {
		return []vcsim.Host{{Name: name, CPUs: 64, MHz: nsMHz, Memory: 32 << 30}}
	}
	c.Dir, c.AdminPassword = n.dir, nsPassword
	c.Clusters = []vcsim.Cluster{{Name: "east", Hosts: host("east-1")}, {Name: "west", Hosts: host("west-1")}}
	c.Policies = []vcsim.Policy{{Name: "Gold (fast)"}, {Name: "Silver"}}
	var err error
	if n.vc, err = vcsim.New(c); err != nil {
		t.Fatal(err)
	}
	n.vim = n.connect(t)
}

func (n *namespacesTest) connect(t *testing.T) *govmomi.Client {
	t.Helper()
	sc := soap.NewClient(n.vc.URL(), false)
	sc.SetThumbprint(n.vc.URL().Host, n.vc.Thumbprint())
	vim, err := vim25.NewClient(t.Context(), sc)
	if err != nil {
		t.Fatal(err)
	}
	c := &govmomi.Client{Client: vim, SessionManager: session.NewManager(vim)}
	if err := c.Login(t.Context(), url.UserPassword(nsUser, nsPassword)); err != nil {
		t.Fatal(err)
	}
	return c
}

// join names the vCenter to the cluster.
func (n *namespacesTest) join(t *testing.T) {
	t.Helper()
	n.apply(t, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: "vcenter"},
		StringData: map[string]string{"username": nsUser, "password": nsPassword},
	})
	sup := &v1alpha1.Supervisor{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName}}
	sup.Spec.VCenter = v1alpha1.VCenter{Server: n.vc.URL().Host, Thumbprint: n.vc.Thumbprint()}
	sup.Spec.Zones = []v1alpha1.Zone{{Name: "zone-a", Cluster: "east"}, {Name: "zone-b", Cluster: "west"}}
	eventually(t, "the CRD of Supervisors", func() error { return n.admin.Create(t.Context(), sup) })
	eventually(t, "Supervisor is ready", func() error {
		if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(sup), sup); err != nil {
			return err
		}
		if !meta.IsStatusConditionTrue(sup.Status.Conditions, v1alpha1.ConditionReady) || len(sup.Status.Zones) != 2 || sup.Status.Zones[0].MHzPerCore != nsMHz {
			return fmt.Errorf("status %+v", sup.Status)
		}
		return nil
	})
	eventually(t, "storage policies are known", func() error {
		return n.admin.Get(t.Context(), client.ObjectKey{Name: "gold-fast"}, &storagev1.StorageClass{})
	})
}

func (n *namespacesTest) apply(t *testing.T, o client.Object) {
	t.Helper()
	if err := n.admin.Create(t.Context(), o); err != nil {
		t.Fatal(err)
	}
}

// edit changes an object as kubectl edit does.
func edit[T client.Object](t *testing.T, n *namespacesTest, o T, change func(T)) {
	t.Helper()
	eventually(t, "edit "+o.GetName(), func() error {
		if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			return err
		}
		change(o)
		return n.admin.Update(t.Context(), o)
	})
}

func svns(name string) *v1alpha1.SupervisorNamespace {
	return &v1alpha1.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

func quantity(s string) *resource.Quantity {
	q := resource.MustParse(s)
	return &q
}

// await returns the namespace once Synced has the status and the reason ("": any),
// for the generation that it now has.
func (n *namespacesTest) await(t *testing.T, name string, status metav1.ConditionStatus, reason string) *v1alpha1.SupervisorNamespace {
	t.Helper()
	ns := svns(name)
	eventually(t, fmt.Sprintf("namespace %s has Synced=%s %s", name, status, reason), func() error {
		if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns); err != nil {
			return err
		}
		c := meta.FindStatusCondition(ns.Status.Conditions, v1alpha1.ConditionSynced)
		if c == nil || c.Status != status || reason != "" && c.Reason != reason || c.ObservedGeneration != ns.Generation {
			return fmt.Errorf("generation %d, condition %+v", ns.Generation, c)
		}
		return nil
	})
	return ns
}

func (n *namespacesTest) synced(t *testing.T, name string) *v1alpha1.SupervisorNamespace {
	t.Helper()
	return n.await(t, name, metav1.ConditionTrue, v1alpha1.ReasonSynced)
}

// A side is what vSphere has of one namespace.
type side struct {
	pools   []mo.ResourcePool
	folders []mo.Folder
}

// vsphere lists all pools and folders of a name, wherever they are.
func (n *namespacesTest) vsphere(t *testing.T, name string) (s side) {
	t.Helper()
	s, err := n.look(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// look is vsphere; an empty name is any.
func (n *namespacesTest) look(ctx context.Context, name string) (s side, err error) {
	f := find.NewFinder(n.vim.Client)
	for _, cluster := range []string{"east", "west"} {
		pools, err := f.ResourcePoolList(ctx, "/Atoll/host/"+cluster+"/Resources/...")
		if err != nil && !isNotFound(err) {
			return s, err
		}
		for _, p := range pools {
			var m mo.ResourcePool
			if err := p.Properties(ctx, p.Reference(), []string{"name", "config", "parent", "permission"}, &m); err != nil {
				return s, err
			}
			if m.Name == name || name == "" {
				s.pools = append(s.pools, m)
			}
		}
	}
	folders, err := f.FolderList(ctx, "/Atoll/vm/...")
	if err != nil && !isNotFound(err) {
		return s, err
	}
	for _, x := range folders {
		var m mo.Folder
		if err := x.Properties(ctx, x.Reference(), []string{"name", "parent", "permission"}, &m); err != nil {
			return s, err
		}
		if m.Name == name || name == "" {
			s.folders = append(s.folders, m)
		}
	}
	return s, nil
}

func isNotFound(err error) bool {
	var e *find.NotFoundError
	return errors.As(err, &e)
}

func (n *namespacesTest) pool(id string) *object.ResourcePool {
	return object.NewResourcePool(n.vim.Client, types.ManagedObjectReference{Type: "ResourcePool", Value: id})
}

// shop is a namespace with everything.
func shop(name string) *v1alpha1.SupervisorNamespace {
	ns := svns(name)
	pods := int64(5)
	ns.Spec.Zones = []string{"zone-a"}
	ns.Spec.Description = "the shop"
	ns.Spec.CPU = &v1alpha1.CPUAllocation{Limit: quantity("4"), Reservation: quantity("500m")}
	ns.Spec.Memory = &v1alpha1.MemoryAllocation{Limit: quantity("8Gi"), Shares: &v1alpha1.Shares{Level: v1alpha1.SharesHigh}}
	ns.Spec.ContainerDefaults = &v1alpha1.ContainerDefaults{CPULimit: quantity("1"), MemoryLimit: quantity("512Mi"), MemoryRequest: quantity("64Mi")}
	ns.Spec.StoragePolicies = []v1alpha1.StoragePolicyLimit{{Name: "gold-fast", Limit: quantity("10Gi")}, {Name: "silver"}}
	ns.Spec.ObjectCounts = &v1alpha1.ObjectCounts{Pods: &pods}
	ns.Spec.Access = []v1alpha1.AccessEntry{
		{Kind: v1alpha1.UserSubject, Name: "Bob", Role: v1alpha1.RoleOwner},
		{Kind: v1alpha1.GroupSubject, Name: "devs", Domain: "vsphere.local", Role: v1alpha1.RoleEdit},
	}
	return ns
}

// early: a namespace has its finalizer from the first moment on, and goes again
// where nothing of it can be in vSphere.
func (n *namespacesTest) early(t *testing.T) {
	ns := svns("early")
	eventually(t, "the kind is served", func() error { return n.admin.Create(t.Context(), ns) })
	if !slices.Contains(ns.Finalizers, v1alpha1.NamespaceFinalizer) {
		t.Errorf("it was made with the finalizers %q", ns.Finalizers)
	}
	n.await(t, "early", metav1.ConditionFalse, v1alpha1.ReasonNoSupervisor)
	if err := n.admin.Delete(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	n.gone(t, ns)
}

func (n *namespacesTest) create(t *testing.T) {
	n.apply(t, shop("shop"))
	ns := n.synced(t, "shop")
	if !meta.IsStatusConditionTrue(ns.Status.Conditions, v1alpha1.ConditionReady) || len(ns.Status.Pools) != 1 || ns.Status.Folder == nil {
		t.Fatalf("status %+v", ns.Status)
	}
	have := n.vsphere(t, "shop")
	if len(have.pools) != 1 || len(have.folders) != 1 {
		t.Fatalf("vSphere has %d pools and %d folders", len(have.pools), len(have.folders))
	}
	pool := have.pools[0]
	cpu, memory := pool.Config.CpuAllocation, pool.Config.MemoryAllocation
	if *cpu.Limit != 4*nsMHz || *cpu.Reservation != nsMHz/2 || !*cpu.ExpandableReservation || *memory.Limit != 8192 || memory.Shares.Level != types.SharesLevelHigh {
		t.Errorf("pool: CPU %+v, memory %+v", cpu, memory)
	}
	if len(pool.Permission) != 2 || len(have.folders[0].Permission) != 2 {
		t.Errorf("permissions %+v and %+v", pool.Permission, have.folders[0].Permission)
	}
	n.checkKubernetes(t, ns, pool.Self.Value, have.folders[0].Self.Value)

	// A second namespace, in both zones: a pool each, limits split.
	both := svns("both")
	both.Spec.CPU = &v1alpha1.CPUAllocation{Limit: quantity("3")}
	both.Spec.Memory = &v1alpha1.MemoryAllocation{Limit: quantity("4097Mi")}
	n.apply(t, both)
	ns = n.synced(t, "both")
	if len(ns.Status.Pools) != 2 || ns.Status.Pools[0].Zone != "zone-a" || ns.Status.Pools[1].Zone != "zone-b" {
		t.Fatalf("pools %+v", ns.Status.Pools)
	}
	var total int64
	for _, p := range n.vsphere(t, "both").pools {
		if *p.Config.CpuAllocation.Limit != 3*nsMHz/2 {
			t.Errorf("CPU %d", *p.Config.CpuAllocation.Limit)
		}
		total += *p.Config.MemoryAllocation.Limit
	}
	if total != 4097 {
		t.Errorf("memory over both zones: %d MiB", total)
	}
}

// checkKubernetes holds the Kubernetes side of shop against what it should be.
func (n *namespacesTest) checkKubernetes(t *testing.T, ns *v1alpha1.SupervisorNamespace, pool, folder string) {
	t.Helper()
	ctx := t.Context()
	k := &corev1.Namespace{}
	if err := n.admin.Get(ctx, client.ObjectKey{Name: "shop"}, k); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		v1alpha1.AnnotationPool: pool, v1alpha1.AnnotationFolder: folder, v1alpha1.AnnotationCPULimit: "4.0000", v1alpha1.AnnotationMemoryLimit: "8192Mi",
		v1alpha1.AnnotationZones: "zone-a", v1alpha1.AnnotationStorageClasses: "gold-fast,silver",
	}
	if !maps.Equal(k.Annotations, want) || k.Labels[v1alpha1.LabelNamespace] != "shop" {
		t.Errorf("annotations %v, labels %v", k.Annotations, k.Labels)
	}
	if ns.Status.Pools[0].ID != pool || ns.Status.Folder.ID != folder {
		t.Errorf("status has %+v and %+v, vSphere %s and %s", ns.Status.Pools, ns.Status.Folder, pool, folder)
	}
	quota, storage := &corev1.ResourceQuota{}, &corev1.ResourceQuota{}
	limits := &corev1.LimitRange{}
	for name, o := range map[string]client.Object{"shop": quota, "shop-storagequota": storage} {
		if err := n.admin.Get(ctx, client.ObjectKey{Namespace: "shop", Name: name}, o); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.admin.Get(ctx, client.ObjectKey{Namespace: "shop", Name: "shop"}, limits); err != nil {
		t.Fatal(err)
	}
	hard := quota.Spec.Hard
	if len(hard) != 3 || hard.Name("limits.cpu", "").String() != "4" || hard.Name("limits.memory", "").String() != "8Gi" || hard.Pods().Value() != 5 {
		t.Errorf("quota %v", hard)
	}
	if got := storage.Spec.Hard; len(got) != 1 || got.Name("gold-fast.storageclass.storage.k8s.io/requests.storage", "").String() != "10Gi" {
		t.Errorf("storage quota %v", got)
	}
	if i := limits.Spec.Limits[0]; i.Default.Cpu().String() != "1" || i.Default.Memory().String() != "512Mi" || i.DefaultRequest.Memory().String() != "64Mi" || i.DefaultRequest.Cpu().String() != "1" {
		t.Errorf("defaults %+v", i)
	}
	for role, subject := range map[string]rbacv1.Subject{
		"owner": {APIGroup: "rbac.authorization.k8s.io", Kind: "User", Name: "sso:bob@vsphere.local"},
		"edit":  {APIGroup: "rbac.authorization.k8s.io", Kind: "Group", Name: "sso:devs@vsphere.local"},
	} {
		b := &rbacv1.RoleBinding{}
		if err := n.admin.Get(ctx, client.ObjectKey{Namespace: "shop", Name: "atoll:" + role}, b); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(b.Subjects, []rbacv1.Subject{subject}) {
			t.Errorf("%s: %v", role, b.Subjects)
		}
	}
	class := &storagev1.StorageClass{}
	if err := n.admin.Get(ctx, client.ObjectKey{Name: "gold-fast"}, class); err != nil {
		t.Fatal(err)
	}
	policy := &v1alpha1.StoragePolicy{}
	if err := n.admin.Get(ctx, client.ObjectKey{Name: "gold-fast"}, policy); err != nil {
		t.Fatal(err)
	}
	if policy.Status.PolicyName != "Gold (fast)" || len(policy.Status.Datastores) != 1 || class.Parameters["storagePolicyID"] != policy.Spec.ID || policy.Spec.ID == "" {
		t.Errorf("policy %+v, class %+v", policy, class)
	}
}

// change changes each field, and counts what vCenter is asked for it.
func (n *namespacesTest) change(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*v1alpha1.SupervisorNamespaceSpec)
		check  func(p mo.ResourcePool) bool
	}{
		{"CPU limit", func(s *v1alpha1.SupervisorNamespaceSpec) { s.CPU.Limit = quantity("6") },
			func(p mo.ResourcePool) bool { return *p.Config.CpuAllocation.Limit == 6*nsMHz }},
		{"CPU reservation", func(s *v1alpha1.SupervisorNamespaceSpec) { s.CPU.Reservation = nil },
			func(p mo.ResourcePool) bool { return *p.Config.CpuAllocation.Reservation == 0 }},
		{"memory limit and shares", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Memory = nil },
			func(p mo.ResourcePool) bool {
				return *p.Config.MemoryAllocation.Limit == -1 && p.Config.MemoryAllocation.Shares.Level == types.SharesLevelNormal
			}},
		{"access", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Access = s.Access[:1] },
			func(p mo.ResourcePool) bool { return len(p.Permission) == 1 }},
		{"description", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Description = "another" }, func(mo.ResourcePool) bool { return true }},
		{"Kubernetes alone", func(s *v1alpha1.SupervisorNamespaceSpec) { s.ObjectCounts, s.ContainerDefaults = nil, nil }, func(mo.ResourcePool) bool { return true }},
		{"back", func(s *v1alpha1.SupervisorNamespaceSpec) { *s = shop("").Spec },
			func(p mo.ResourcePool) bool {
				return *p.Config.CpuAllocation.Limit == 4*nsMHz && len(p.Permission) == 2
			}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := n.calls()
			edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { tc.change(&ns.Spec) })
			n.synced(t, "shop")
			made := n.calls() - before
			have := n.vsphere(t, "shop")
			if len(have.pools) != 1 || len(have.folders) != 1 || !tc.check(have.pools[0]) {
				t.Errorf("vSphere has %+v", have)
			}
			// "back" changes everything at once.
			if made > 3 && tc.name != "back" {
				t.Errorf("%d calls to vCenter, at most 3 are promised", made)
			}
		})
	}
}

// calls counts what was asked of vCenter, waits apart.
func (n *namespacesTest) calls() int {
	total := 0
	for method, count := range n.vc.Faults().Calls() {
		if !strings.HasPrefix(method, "WaitForUpdates") {
			total += count
		}
	}
	return total
}

func (n *namespacesTest) metrics(t *testing.T) {
	b, err := clientFrom(t, restFrom(t, n.cfg.Kubeconfig())).Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`atoll_namespaces_reconciles_total{controller="namespace",outcome="ok"}`, `atoll_namespaces_drifts_total{field="cpu",outcome="adopted"}`,
		`atoll_namespaces_vcenter_calls_total{error="",method="UpdateConfig"}`, `atoll_namespaces_vcenter_call_seconds_count{method="UpdateConfig"}`,
		"atoll_namespaces_watch_lag_seconds ", "atoll_namespaces_vcenter_connected 1",
	} {
		if !strings.Contains(string(b), "\n"+want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	if strings.Contains(string(b), nsPassword) {
		t.Error("/metrics has the password")
	}
}

// as is a client of another user.
func (n *namespacesTest) as(t *testing.T, user string, groups ...string) client.Client {
	t.Helper()
	cfg := restFrom(t, n.cfg.Kubeconfig())
	cfg.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: append(groups, "system:authenticated")}
	c, err := client.New(cfg, client.Options{Scheme: n.admin.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// gone returns when the object is.
func (n *namespacesTest) gone(t *testing.T, o client.Object) {
	t.Helper()
	eventually(t, fmt.Sprintf("%T %s is gone", o, o.GetName()), func() error {
		err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(o), o)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err == nil {
			err = errors.New("it is there")
		}
		return err
	})
}
