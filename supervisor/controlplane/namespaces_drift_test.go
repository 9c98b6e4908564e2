package controlplane

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
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
	t.Run("limits are mended", n.mendLimits)
	ns := n.synced(t, "shop")
	for _, tc := range []struct {
		name string
		act  func(t *testing.T, pool mo.ResourcePool, folder mo.Folder) error
	}{
		{"pool renamed", func(t *testing.T, p mo.ResourcePool, _ mo.Folder) error {
			return n.pool(p.Self.Value).UpdateConfig(t.Context(), "mine", nil)
		}},
		{"pool moved", func(t *testing.T, p mo.ResourcePool, _ mo.Folder) error {
			_, err := methods.MoveIntoResourcePool(t.Context(), n.vim.Client, &types.MoveIntoResourcePool{This: n.root(t), List: []types.ManagedObjectReference{p.Self}})
			return err
		}},
		{"pool deleted", func(t *testing.T, p mo.ResourcePool, _ mo.Folder) error {
			return n.wait(t)(n.pool(p.Self.Value).Destroy(t.Context()))
		}},
		{"folder renamed", func(t *testing.T, _ mo.ResourcePool, f mo.Folder) error {
			return n.wait(t)(object.NewFolder(n.vim.Client, f.Self).Rename(t.Context(), "mine"))
		}},
		{"folder deleted", func(t *testing.T, _ mo.ResourcePool, f mo.Folder) error {
			return n.wait(t)(object.NewFolder(n.vim.Client, f.Self).Destroy(t.Context()))
		}},
		{"permission taken away", func(t *testing.T, p mo.ResourcePool, _ mo.Folder) error {
			perm := p.Permission[0]
			return object.NewAuthorizationManager(n.vim.Client).RemoveEntityPermission(t.Context(), p.Self, perm.Principal, perm.Group)
		}},
		{"permission added", func(t *testing.T, p mo.ResourcePool, _ mo.Folder) error {
			return object.NewAuthorizationManager(n.vim.Client).SetEntityPermissions(t.Context(), p.Self, []types.Permission{{Principal: `VSPHERE.LOCAL\ada`, RoleId: -1, Propagate: true}})
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pool, folder := n.one(t, "shop")
			seen := n.driftEvents(t, "shop")
			if err := tc.act(t, pool, folder); err != nil {
				t.Fatal(err)
			}
			eventually(t, "it is mended", func() error {
				s, err := n.look(t.Context(), "shop")
				if err != nil {
					return err
				}
				if len(s.pools) != 1 || len(s.folders) != 1 || len(s.pools[0].Permission) != 2 || len(s.folders[0].Permission) != 2 ||
					*s.pools[0].Parent == n.root(t) || *s.pools[0].Config.CpuAllocation.Limit != 4*nsMHz {
					return fmt.Errorf("vSphere has %+v", s)
				}
				return nil
			})
			eventually(t, "an event tells", func() error {
				if n.driftEvents(t, "shop") <= seen {
					return errors.New("no new event of reason Drift")
				}
				return nil
			})
			after := n.synced(t, "shop")
			if after.Generation != ns.Generation {
				t.Errorf("the spec changed: %+v", after.Spec)
			}
			pool, folder = n.one(t, "shop")
			eventually(t, "the Namespace names pool and folder", func() error {
				k := &corev1.Namespace{}
				if err := n.admin.Get(t.Context(), client.ObjectKey{Name: "shop"}, k); err != nil {
					return err
				}
				if k.Annotations[v1alpha1.AnnotationPool] != pool.Self.Value || k.Annotations[v1alpha1.AnnotationFolder] != folder.Self.Value {
					return fmt.Errorf("annotations %v", k.Annotations)
				}
				return nil
			})
		})
	}
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

// driftEvents counts them, series included.
func (n *namespacesTest) driftEvents(t *testing.T, name string) int {
	t.Helper()
	list := &eventsv1.EventList{}
	if err := n.admin.List(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, e := range list.Items {
		if e.Reason != v1alpha1.ReasonDrift || e.Regarding.Name != name {
			continue
		}
		total++
		if e.Series != nil {
			total += int(e.Series.Count)
		}
	}
	return total
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

func (n *namespacesTest) mendLimits(t *testing.T) {
	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.DriftPolicy.Limits = v1alpha1.Mend })
	before := n.synced(t, "shop")
	pool, _ := n.one(t, "shop")
	if err := n.pool(pool.Self.Value).UpdateConfig(t.Context(), "", &types.ResourceConfigSpec{
		CpuAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(nsMHz)},
	}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pool is as it was", func() error {
		if p, _ := n.one(t, "shop"); *p.Config.CpuAllocation.Limit != 4*nsMHz {
			return fmt.Errorf("it has %d MHz", *p.Config.CpuAllocation.Limit)
		}
		return nil
	})
	if after := n.synced(t, "shop"); after.Generation != before.Generation {
		t.Errorf("the spec changed: %+v", after.Spec)
	}
}

// quotas edits Kubernetes' side by kubectl.
func (n *namespacesTest) quotas(t *testing.T) {
	quota := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "shop"}}
	is := func(pods int64) func() error {
		return func() error {
			q := &corev1.ResourceQuota{}
			if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(quota), q); err != nil {
				return err
			}
			if q.Spec.Hard.Pods().Value() != pods || len(q.Spec.Hard) != 3 {
				return fmt.Errorf("it is %v", q.Spec.Hard)
			}
			return nil
		}
	}
	edit(t, n, quota, func(q *corev1.ResourceQuota) {
		q.Spec.Hard["pods"] = *quantity("99")
		delete(q.Spec.Hard, "limits.cpu")
	})
	eventually(t, "an edited quota is mended", is(5))
	for _, o := range []client.Object{
		quota.DeepCopy(),
		&corev1.LimitRange{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "shop"}},
		&rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "atoll:owner"}},
	} {
		if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
			t.Fatal(err)
		}
		uid := o.GetUID()
		if err := n.admin.Delete(t.Context(), o); err != nil {
			t.Fatal(err)
		}
		eventually(t, fmt.Sprintf("%T is made again", o), func() error {
			if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(o), o); err != nil {
				return err
			}
			if o.GetUID() == uid {
				return errors.New("it is not deleted yet")
			}
			return nil
		})
	}
	edit(t, n, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "atoll:edit"}}, func(b *rbacv1.RoleBinding) {
		b.Subjects = append(b.Subjects, rbacv1.Subject{APIGroup: "rbac.authorization.k8s.io", Kind: "User", Name: "intruder"})
	})
	eventually(t, "an edited RoleBinding is mended", func() error {
		b := &rbacv1.RoleBinding{}
		if err := n.admin.Get(t.Context(), client.ObjectKey{Namespace: "shop", Name: "atoll:edit"}, b); err != nil {
			return err
		}
		if len(b.Subjects) != 1 {
			return fmt.Errorf("subjects %v", b.Subjects)
		}
		return nil
	})
	edit(t, n, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}, func(k *corev1.Namespace) { delete(k.Annotations, v1alpha1.AnnotationPool) })
	eventually(t, "annotations are mended", func() error {
		k := &corev1.Namespace{}
		if err := n.admin.Get(t.Context(), client.ObjectKey{Name: "shop"}, k); err != nil {
			return err
		}
		if k.Annotations[v1alpha1.AnnotationPool] == "" {
			return errors.New("no pool")
		}
		return nil
	})

	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.DriftPolicy.Quota = v1alpha1.Adopt })
	n.synced(t, "shop")
	edit(t, n, quota, func(q *corev1.ResourceQuota) {
		q.Spec.Hard["pods"], q.Spec.Hard["limits.cpu"] = *quantity("7"), *quantity("2")
	})
	eventually(t, "an edited quota is adopted, and reaches vSphere", func() error {
		ns := n.synced(t, "shop")
		if *ns.Spec.ObjectCounts.Pods != 7 || ns.Spec.CPU.Limit.Cmp(*quantity("2")) != 0 {
			return fmt.Errorf("pods %d, CPU %v", *ns.Spec.ObjectCounts.Pods, ns.Spec.CPU.Limit)
		}
		if p, _ := n.one(t, "shop"); *p.Config.CpuAllocation.Limit != 2*nsMHz {
			return fmt.Errorf("the pool has %d MHz", *p.Config.CpuAllocation.Limit)
		}
		return nil
	})
}
