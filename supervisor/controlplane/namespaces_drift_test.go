package controlplane

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// one is the only pool of a namespace, and its only folder.
func (n *namespacesTest) one(t *testing.T, name string) (mo.ResourcePool, mo.Folder) {
	t.Helper()
	s := n.vsphere(t, name)
	if len(s.pools) != 1 || len(s.folders) != 1 {
		t.Fatalf("namespace %s has %d pools and %d folders", name, len(s.pools), len(s.folders))
	}
	return s.pools[0], s.folders[0]
}

// drift changes each thing in vSphere as an administrator would.
func (n *namespacesTest) drift(t *testing.T) {
	t.Run("limits are adopted", n.adoptLimits)
	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) {
		ns.Spec.DriftPolicy.Limits, ns.Spec.Attributes = v1alpha1.Mend, map[string]string{"costcenter": "4711"}
	})
	ns := n.synced(t, "shop")
	for _, c := range n.byHand(t, "shop") {
		c.reason, c.done = v1alpha1.ReasonDrift, func() error { return n.inStep(t, "shop") }
		n.told(t, "shop", c)
	}
	if after := n.synced(t, "shop"); after.Generation != ns.Generation {
		t.Errorf("the spec changed: %+v", after.Spec)
	}
	n.adoptStructure(t)
}

// byHand is all that an administrator can do to a namespace with one pool, with
// what is told of it.
func (n *namespacesTest) byHand(t *testing.T, name string) []change {
	pool := func(t *testing.T) mo.ResourcePool { p, _ := n.one(t, name); return p }
	folder := func(t *testing.T) *object.Folder {
		_, f := n.one(t, name)
		return object.NewFolder(n.vim.Client, f.Self)
	}
	configure := func(spec types.ResourceConfigSpec) func(*testing.T) error {
		return func(t *testing.T) error { return n.pool(pool(t).Self.Value).UpdateConfig(t.Context(), "", &spec) }
	}
	field := func(name, value string) func(*testing.T) error {
		return func(t *testing.T) error { return n.setField(t, pool(t).Self, name, value) }
	}
	auth := func() *object.AuthorizationManager { return object.NewAuthorizationManager(n.vim.Client) }
	return []change{
		{name: "CPU limit", text: "has CPU limit 2000 MHz", act: configure(types.ResourceConfigSpec{CpuAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(nsMHz)}})},
		{name: "CPU reservation", text: "reservation 100 MHz", act: configure(types.ResourceConfigSpec{CpuAllocation: types.ResourceAllocationInfo{Reservation: types.NewInt64(100)}})},
		{name: "memory limit", text: "has memory limit 999 MiB", act: configure(types.ResourceConfigSpec{MemoryAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(999)}})},
		{name: "memory shares", text: "shares low", act: configure(types.ResourceConfigSpec{MemoryAllocation: types.ResourceAllocationInfo{Shares: &types.SharesInfo{Level: types.SharesLevelLow}}})},
		{name: "pool renamed", text: "should be called " + name, act: func(t *testing.T) error {
			return n.pool(pool(t).Self.Value).UpdateConfig(t.Context(), "mine", nil)
		}},
		{name: "pool moved", text: "was moved away from the parent pool", act: func(t *testing.T) error {
			_, err := methods.MoveIntoResourcePool(t.Context(), n.vim.Client, &types.MoveIntoResourcePool{This: n.root(t), List: []types.ManagedObjectReference{pool(t).Self}})
			return err
		}},
		{name: "pool deleted", text: "resource pool \"" + name + "\" of zone zone-a was deleted", act: func(t *testing.T) error {
			return n.wait(t)(n.pool(pool(t).Self.Value).Destroy(t.Context()))
		}},
		{name: "folder renamed", text: "should be called " + name, act: func(t *testing.T) error { return n.wait(t)(folder(t).Rename(t.Context(), "mine")) }},
		{name: "folder moved", text: "was moved away from the parent folder", act: func(t *testing.T) error {
			f := folder(t)
			dc, err := find.NewFinder(n.vim.Client).Folder(t.Context(), "/Atoll/vm")
			if err != nil {
				return err
			}
			return n.wait(t)(dc.MoveInto(t.Context(), []types.ManagedObjectReference{f.Reference()}))
		}},
		{name: "folder deleted", text: "VM folder \"" + name + "\" was deleted", act: func(t *testing.T) error { return n.wait(t)(folder(t).Destroy(t.Context())) }},
		{name: "description", text: "has another description", act: field("atoll.description", "mine")},
		{name: "attribute", text: "as attribute costcenter", act: field("costcenter", "0")},
		{name: "permission taken away", text: "the permissions of namespace " + name, act: func(t *testing.T) error {
			p := pool(t)
			return auth().RemoveEntityPermission(t.Context(), p.Self, p.Permission[0].Principal, p.Permission[0].Group)
		}},
		{name: "permission added", text: "the permissions of namespace " + name, act: func(t *testing.T) error {
			return auth().SetEntityPermissions(t.Context(), folder(t).Reference(), []types.Permission{{Principal: `VSPHERE.LOCAL\ada`, RoleId: -1, Propagate: true}})
		}},
	}
}

// setField writes a custom attribute.
func (n *namespacesTest) setField(t *testing.T, id types.ManagedObjectReference, name, value string) error {
	m, err := object.GetCustomFieldsManager(n.vim.Client)
	if err != nil {
		return err
	}
	key, err := m.FindKey(t.Context(), name)
	if err != nil {
		return err
	}
	return m.Set(t.Context(), id, key, value)
}

// field reads a custom attribute, "" if it has none.
func (n *namespacesTest) field(t *testing.T, id types.ManagedObjectReference, name string) (string, error) {
	m, err := object.GetCustomFieldsManager(n.vim.Client)
	if err != nil {
		return "", err
	}
	key, err := m.FindKey(t.Context(), name)
	if err != nil {
		return "", err
	}
	var e mo.ManagedEntity
	if err := n.vim.RetrieveOne(t.Context(), id, []string{"customValue"}, &e); err != nil {
		return "", err
	}
	for _, v := range e.CustomValue {
		if s, ok := v.(*types.CustomFieldStringValue); ok && s.Key == key {
			return s.Value, nil
		}
	}
	return "", nil
}

// inStep is nil when vSphere has of the namespace what shop asks for, once, and
// the Namespace names it.
func (n *namespacesTest) inStep(t *testing.T, name string) error {
	s, err := n.look(t.Context(), name)
	if err != nil {
		return err
	}
	if len(s.pools) != 1 || len(s.folders) != 1 {
		return fmt.Errorf("%d pools and %d folders", len(s.pools), len(s.folders))
	}
	p, f := s.pools[0], s.folders[0]
	cpu, memory := p.Config.CpuAllocation, p.Config.MemoryAllocation
	if *cpu.Limit != 4*nsMHz || *cpu.Reservation != nsMHz/2 || *memory.Limit != 8192 || memory.Shares.Level != types.SharesLevelHigh {
		return fmt.Errorf("CPU %+v, memory %+v", cpu, memory)
	}
	ns := svns(name)
	if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns); err != nil {
		return err
	}
	attributes := map[string]string{"atoll.description": "the shop"}
	maps.Copy(attributes, ns.Spec.Attributes)
	for name, want := range attributes {
		if got, err := n.field(t, p.Self, name); err != nil || got != want {
			return fmt.Errorf("attribute %s is %q (%v)", name, got, err)
		}
	}
	if len(p.Permission) != 2 || len(f.Permission) != 2 {
		return fmt.Errorf("permissions %+v and %+v", p.Permission, f.Permission)
	}
	for path, parent := range map[string]types.ManagedObjectReference{"/Atoll/host/east/Resources/Namespaces": *p.Parent, "/Atoll/vm/Namespaces": *f.Parent} {
		o, err := find.NewFinder(n.vim.Client).ManagedObjectList(t.Context(), path)
		if err != nil {
			return err
		}
		if len(o) != 1 || o[0].Object.Reference() != parent {
			return fmt.Errorf("it is in %s, not in %s", parent, path)
		}
	}
	k := &corev1.Namespace{}
	if err := n.admin.Get(t.Context(), client.ObjectKey{Name: name}, k); err != nil {
		return err
	}
	if k.Annotations[v1alpha1.AnnotationPool] != p.Self.Value || k.Annotations[v1alpha1.AnnotationFolder] != f.Self.Value {
		return fmt.Errorf("annotations %v", k.Annotations)
	}
	return nil
}

// adoptStructure: what can be part of a spec becomes part of it, where the
// policy says so; what cannot is mended.
func (n *namespacesTest) adoptStructure(t *testing.T) {
	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.DriftPolicy.Structure = v1alpha1.Adopt })
	spec := func(want string, ok func(*v1alpha1.SupervisorNamespaceSpec) bool) func() error {
		return func() error {
			ns := svns("shop")
			if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns); err != nil {
				return err
			}
			if !ok(&ns.Spec) {
				return fmt.Errorf("the spec has not %s: %+v", want, ns.Spec)
			}
			return nil
		}
	}
	for _, c := range n.byHand(t, "shop") {
		c.reason = v1alpha1.ReasonDrift
		switch c.name {
		case "description":
			c.done = spec("the description", func(s *v1alpha1.SupervisorNamespaceSpec) bool { return s.Description == "mine" })
		case "attribute":
			c.done = spec("the attribute", func(s *v1alpha1.SupervisorNamespaceSpec) bool { return s.Attributes["costcenter"] == "0" })
		case "permission taken away":
			// From the pool, and so from the folder.
			c.done = func() error {
				p, f := n.one(t, "shop")
				if len(p.Permission) != 1 || len(f.Permission) != 1 {
					return fmt.Errorf("permissions %+v and %+v", p.Permission, f.Permission)
				}
				return spec("one entry", func(s *v1alpha1.SupervisorNamespaceSpec) bool { return len(s.Access) == 1 })()
			}
		case "pool renamed":
			c.done = func() error { return n.inStep(t, "shop") }
		default:
			continue
		}
		c.name = "adopted: " + c.name
		n.told(t, "shop", c)
	}
	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec = shop("").Spec })
	n.synced(t, "shop")
}

// root is the pool above all others of the first cluster.
func (n *namespacesTest) root(t *testing.T) types.ManagedObjectReference {
	t.Helper()
	p, err := find.NewFinder(n.vim.Client).ResourcePool(t.Context(), "/Atoll/host/east/Resources")
	if err != nil {
		t.Fatal(err)
	}
	return p.Reference()
}

// wait ends a govmomi task.
func (n *namespacesTest) wait(t *testing.T) func(*object.Task, error) error {
	return func(task *object.Task, err error) error {
		if err != nil {
			return err
		}
		return task.Wait(t.Context())
	}
}

func (n *namespacesTest) adoptLimits(t *testing.T) {
	pool, _ := n.one(t, "shop")
	generation := n.synced(t, "shop").Generation
	if err := n.pool(pool.Self.Value).UpdateConfig(t.Context(), "", &types.ResourceConfigSpec{
		CpuAllocation:    types.ResourceAllocationInfo{Limit: types.NewInt64(3 * nsMHz)},
		MemoryAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(2048)},
	}); err != nil {
		t.Fatal(err)
	}
	var ns *v1alpha1.SupervisorNamespace
	eventually(t, "the spec has the new limits", func() error {
		ns = n.synced(t, "shop")
		if ns.Spec.CPU.Limit.Cmp(*quantity("3")) != 0 || ns.Spec.Memory.Limit.Cmp(*quantity("2Gi")) != 0 {
			return fmt.Errorf("CPU %v, memory %v", ns.Spec.CPU, ns.Spec.Memory)
		}
		return nil
	})
	if ns.Generation == generation || ns.Spec.CPU.Reservation.Cmp(*quantity("500m")) != 0 || ns.Spec.Memory.Shares.Level != v1alpha1.SharesHigh {
		t.Errorf("spec %+v", ns.Spec)
	}
	if !slices.ContainsFunc(ns.Status.Messages, func(m v1alpha1.Message) bool {
		return m.Reason == v1alpha1.ReasonDrift && strings.Contains(m.Text, "taken into the spec")
	}) {
		t.Errorf("messages %+v", ns.Status.Messages)
	}
	eventually(t, "the quota follows", func() error {
		q := &corev1.ResourceQuota{}
		if err := n.admin.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "shop"}, q); err != nil {
			return err
		}
		if q.Spec.Hard.Name("limits.cpu", "").String() != "3" || q.Spec.Hard.Name("limits.memory", "").String() != "2Gi" {
			return fmt.Errorf("it is %v", q.Spec.Hard)
		}
		return nil
	})
	if got, _ := n.one(t, "shop"); *got.Config.CpuAllocation.Limit != 3*nsMHz {
		t.Errorf("the pool was changed back: %+v", got.Config.CpuAllocation)
	}
	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec = shop("").Spec })
	n.synced(t, "shop")

	// Over two zones, the sum is adopted and shared out evenly again.
	first := n.vsphere(t, "both").pools[0]
	if err := n.pool(first.Self.Value).UpdateConfig(t.Context(), "", &types.ResourceConfigSpec{
		CpuAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(nsMHz / 2)},
	}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the sum is in the spec", func() error {
		ns := n.synced(t, "both")
		if ns.Spec.CPU.Limit.Cmp(*quantity("2")) != 0 {
			return fmt.Errorf("CPU %v", ns.Spec.CPU)
		}
		for _, p := range n.vsphere(t, "both").pools {
			if *p.Config.CpuAllocation.Limit != nsMHz {
				return fmt.Errorf("a pool has %d MHz", *p.Config.CpuAllocation.Limit)
			}
		}
		return nil
	})
}

// quotas edits Kubernetes' side by kubectl.
func (n *namespacesTest) quotas(t *testing.T) {
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "shop"}}
	storage := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "shop-storagequota"}}
	limits := &corev1.LimitRange{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "shop"}}
	binding := &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "atoll:edit"}}
	as := n.synced(t, "shop")
	// mended holds that Kubernetes' side is as at the creation.
	mended := func() error { return n.kubernetesInStep(t) }
	remove := func(o client.Object) func(*testing.T) error {
		return func(t *testing.T) error { return n.admin.Delete(t.Context(), o) }
	}
	for _, c := range []change{
		{name: "quota edited", text: "somebody set ResourceQuota shop/shop to limits.memory 8Gi, pods 99", act: func(t *testing.T) error {
			edit(t, n, quota, func(q *corev1.ResourceQuota) {
				q.Spec.Hard["pods"] = *quantity("99")
				delete(q.Spec.Hard, "limits.cpu")
			})
			return nil
		}},
		{name: "quota deleted", text: "somebody deleted ResourceQuota shop/shop", act: remove(quota)},
		{name: "storage quota edited", text: "somebody set ResourceQuota shop/shop-storagequota to", act: func(t *testing.T) error {
			edit(t, n, storage, func(q *corev1.ResourceQuota) {
				q.Spec.Hard["gold-fast.storageclass.storage.k8s.io/requests.storage"] = *quantity("1Ti")
			})
			return nil
		}},
		{name: "storage quota deleted", text: "somebody deleted ResourceQuota shop/shop-storagequota", act: remove(storage)},
		{name: "limit range edited", text: "somebody set LimitRange shop/shop to", act: func(t *testing.T) error {
			edit(t, n, limits, func(l *corev1.LimitRange) { l.Spec.Limits[0].Default["memory"] = *quantity("4Gi") })
			return nil
		}},
		{name: "limit range deleted", text: "somebody deleted LimitRange shop/shop", act: remove(limits)},
		{name: "role binding edited", reason: v1alpha1.ReasonDrift, text: "edit for Group sso:devs@vsphere.local, User intruder", act: func(t *testing.T) error {
			edit(t, n, binding, func(b *rbacv1.RoleBinding) {
				b.Subjects = append(b.Subjects, rbacv1.Subject{APIGroup: "rbac.authorization.k8s.io", Kind: "User", Name: "intruder"})
			})
			return nil
		}},
		{name: "role binding deleted", reason: v1alpha1.ReasonDrift, text: "somebody deleted RoleBinding shop/atoll:edit", act: remove(binding)},
	} {
		if c.reason == "" {
			c.reason = v1alpha1.ReasonQuotaEdited
		}
		c.done = mended
		n.told(t, "shop", c)
	}
	if now := n.synced(t, "shop"); now.Generation != as.Generation {
		t.Errorf("the spec changed: %+v", now.Spec)
	}
	edit(t, n, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, func(k *corev1.Namespace) { delete(k.Annotations, v1alpha1.AnnotationPool) })
	eventually(t, "annotations are mended", func() error { return n.inStep(t, "shop") })

	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.DriftPolicy.Quota = v1alpha1.Adopt })
	n.told(t, "shop", change{
		name: "quota adopted", reason: v1alpha1.ReasonQuotaEdited, text: "taken into the spec",
		act: func(t *testing.T) error {
			edit(t, n, quota, func(q *corev1.ResourceQuota) {
				q.Spec.Hard["pods"], q.Spec.Hard["limits.cpu"] = *quantity("7"), *quantity("2")
			})
			return nil
		},
		done: func() error {
			ns := n.synced(t, "shop")
			if *ns.Spec.ObjectCounts.Pods != 7 || ns.Spec.CPU.Limit.Cmp(*quantity("2")) != 0 {
				return fmt.Errorf("pods %d, CPU %v", *ns.Spec.ObjectCounts.Pods, ns.Spec.CPU.Limit)
			}
			if p, _ := n.one(t, "shop"); *p.Config.CpuAllocation.Limit != 2*nsMHz {
				return fmt.Errorf("the pool has %d MHz", *p.Config.CpuAllocation.Limit)
			}
			return nil
		},
	})
}

// kubernetesInStep is nil when quotas, defaults and rights are what shop asks
// for.
func (n *namespacesTest) kubernetesInStep(t *testing.T) error {
	quota, storage, limits, binding := &corev1.ResourceQuota{}, &corev1.ResourceQuota{}, &corev1.LimitRange{}, &rbacv1.RoleBinding{}
	for name, o := range map[string]client.Object{"shop": quota, "shop-storagequota": storage, "shop/": limits, "atoll:edit": binding} {
		if err := n.admin.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: strings.TrimSuffix(name, "/")}, o); err != nil {
			return err
		}
		if o.GetDeletionTimestamp() != nil {
			return fmt.Errorf("%s is being deleted", name)
		}
	}
	if h := quota.Spec.Hard; len(h) != 3 || h.Pods().Value() != 5 || h.Name("limits.cpu", "").String() != "4" {
		return fmt.Errorf("the quota is %v", h)
	}
	if h := storage.Spec.Hard; len(h) != 1 || h.Name("gold-fast.storageclass.storage.k8s.io/requests.storage", "").String() != "10Gi" {
		return fmt.Errorf("the storage quota is %v", h)
	}
	if l := limits.Spec.Limits; len(l) != 1 || l[0].Default.Memory().String() != "512Mi" {
		return fmt.Errorf("the limit range is %v", l)
	}
	if len(binding.Subjects) != 1 || binding.Subjects[0].Name != "sso:devs@vsphere.local" {
		return fmt.Errorf("the subjects are %v", binding.Subjects)
	}
	return nil
}
