package controlplane

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vmware/govmomi/pbm"
	"github.com/vmware/govmomi/pbm/methods"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// limits that cannot be now: each is told on both sides, leaves the pool as it
// is, and is over by itself.
func (n *namespacesTest) limits(t *testing.T) {
	ns := svns("busy")
	ns.Spec.Zones = []string{"zone-a"}
	ns.Spec.CPU = &v1alpha1.CPUAllocation{Limit: quantity("4")}
	ns.Spec.Memory = &v1alpha1.MemoryAllocation{Limit: quantity("4Gi")}
	n.apply(t, ns)
	n.synced(t, "busy")
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "busy", Name: "large"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
		Name: "c", Image: "none", Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{"cpu": *quantity("3"), "memory": *quantity("3Gi")}},
	}}}}
	eventually(t, "a pod", func() error { return n.admin.Create(t.Context(), pod.DeepCopy()) })
	n.usage(t, "busy", 3, 3<<30, 1)

	mhz := func() int64 { p, _ := n.one(t, "busy"); return *p.Config.CpuAllocation.Limit }
	n.told(t, "busy", change{
		name: "limit below use", reason: v1alpha1.ReasonLimitBelowUse, text: "the CPU limit 2 is below the 3",
		act: func(t *testing.T) error {
			edit(t, n, svns("busy"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.CPU.Limit = quantity("2") })
			n.await(t, "busy", metav1.ConditionFalse, v1alpha1.ReasonLimitBelowUse)
			if got := mhz(); got != 4*nsMHz {
				t.Errorf("the pool was lowered to %d MHz under pods that run", got)
			}
			eventually(t, "new pods are refused", func() error {
				another := pod.DeepCopy()
				another.Name = "another"
				if err := n.admin.Create(t.Context(), another, client.DryRunAll); !apierrors.IsForbidden(err) {
					return fmt.Errorf("it is %v", err)
				}
				return nil
			})
			return n.admin.Delete(t.Context(), pod, client.GracePeriodSeconds(0))
		},
		done: func() error {
			if got := mhz(); got != 2*nsMHz {
				return fmt.Errorf("the pool has %d MHz", got)
			}
			return nil
		},
	})
	n.told(t, "busy", change{
		name: "reservation larger than the parent", reason: v1alpha1.ReasonReservationTooLarge, text: "reservation 921600 MiB",
		act: func(t *testing.T) error {
			edit(t, n, svns("busy"), func(ns *v1alpha1.SupervisorNamespace) {
				ns.Spec.Memory = &v1alpha1.MemoryAllocation{Reservation: quantity("900Gi")}
			})
			n.await(t, "busy", metav1.ConditionFalse, v1alpha1.ReasonReservationTooLarge)
			edit(t, n, svns("busy"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.Memory.Reservation = quantity("2Gi") })
			return nil
		},
		done: func() error {
			if p, _ := n.one(t, "busy"); *p.Config.MemoryAllocation.Reservation != 2048 {
				return fmt.Errorf("memory %+v", p.Config.MemoryAllocation)
			}
			return nil
		},
	})
	n.told(t, "busy", change{
		name: "a group that Atoll is in", reason: v1alpha1.ReasonAccessRefused, text: `group vsphere.local\ours: the account ` + nsUser,
		act: func(t *testing.T) error {
			if err := n.vc.Users().SetGroup("ours", "bob", "administrator"); err != nil {
				return err
			}
			// The groups are read anew for another connection.
			edit(t, n, &v1alpha1.Supervisor{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName}}, func(s *v1alpha1.Supervisor) { s.Spec.PolicyPollSeconds = 10 })
			edit(t, n, svns("busy"), func(ns *v1alpha1.SupervisorNamespace) {
				ns.Spec.Access = []v1alpha1.AccessEntry{{Kind: v1alpha1.GroupSubject, Name: "ours", Role: v1alpha1.RoleView}}
			})
			n.await(t, "busy", metav1.ConditionFalse, v1alpha1.ReasonAccessRefused)
			if p, f := n.one(t, "busy"); len(p.Permission)+len(f.Permission) != 0 {
				t.Errorf("permissions %+v and %+v", p.Permission, f.Permission)
			}
			edit(t, n, svns("busy"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.Access = nil })
			return nil
		},
	})
}

// usage waits until the status counts what pods ask for, and not much more: the
// machine's overhead.
func (n *namespacesTest) usage(t *testing.T, name string, cores, bytes, pods int64) {
	t.Helper()
	eventually(t, "its use is in the status", func() error {
		ns := svns(name)
		if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns); err != nil {
			return err
		}
		u := ns.Status.Usage
		if u == nil || u.CPU == nil || u.Memory == nil || u.Pods == nil || *u.Pods != pods ||
			u.CPU.MilliValue()/1000 != cores || u.Memory.Value() < bytes || u.Memory.Value() > bytes+1<<30 {
			return fmt.Errorf("usage %+v", u)
		}
		return nil
	})
}

// storage: policies that are renamed and go, seen by the poll, and StorageClasses
// that somebody changes.
func (n *namespacesTest) storage(t *testing.T) {
	ns := svns("stored")
	ns.Spec.Zones = []string{"zone-a"}
	ns.Spec.StoragePolicies = []v1alpha1.StoragePolicyLimit{{Name: "gold-fast", Limit: quantity("1Gi")}, {Name: "silver"}}
	n.apply(t, ns)
	n.synced(t, "stored")
	t.Run("use without a quota", func(t *testing.T) {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "stored", Name: "p"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "c", Image: "none", Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{"cpu": *quantity("1"), "memory": *quantity("1Gi")}},
		}}}}
		class := "silver"
		claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "stored", Name: "c"}, Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{"storage": *quantity("3Gi")}},
		}}
		eventually(t, "a pod and a claim", func() error {
			return errors.Join(client.IgnoreAlreadyExists(n.admin.Create(t.Context(), pod.DeepCopy())), client.IgnoreAlreadyExists(n.admin.Create(t.Context(), claim.DeepCopy())))
		})
		n.usage(t, "stored", 1, 1<<30, 1)
		eventually(t, "the claim counts", func() error {
			ns := svns("stored")
			if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns); err != nil {
				return err
			}
			if s := ns.Status.Usage.Storage; len(s) != 2 || !s[0].Used.IsZero() || s[1].Used.Cmp(*quantity("3Gi")) != 0 {
				return fmt.Errorf("storage %+v", s)
			}
			return nil
		})
	})
	t.Run("class deleted", func(t *testing.T) {
		n.classChanged(t, "somebody deleted StorageClass silver", func(c *storagev1.StorageClass) error { return n.admin.Delete(t.Context(), c) })
	})
	t.Run("class edited", func(t *testing.T) {
		n.classChanged(t, "somebody changed StorageClass silver", func(c *storagev1.StorageClass) error {
			no := false
			c.AllowVolumeExpansion = &no
			return n.admin.Update(t.Context(), c)
		})
	})
	t.Run("policies", n.policiesChange)
}

func (n *namespacesTest) classChanged(t *testing.T, text string, act func(*storagev1.StorageClass) error) {
	t.Helper()
	n.synced(t, "stored")
	h := followed(t, n, "silver", v1alpha1.ConditionReady, &v1alpha1.StoragePolicyList{}, func(o any) []metav1.Condition {
		if p, ok := o.(*v1alpha1.StoragePolicy); ok {
			return p.Status.Conditions
		}
		return nil
	})
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "silver"}}
	eventually(t, "it is changed", func() error {
		if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(class), class); err != nil {
			return err
		}
		return act(class)
	})
	h.saw(t, metav1.ConditionFalse, v1alpha1.ReasonDrift, text)
	eventually(t, "it is mended", func() error {
		c := &storagev1.StorageClass{}
		if err := n.admin.Get(t.Context(), client.ObjectKey{Name: "silver"}, c); err != nil {
			return err
		}
		if c.UID == class.UID || !*c.AllowVolumeExpansion || c.Parameters["storagePolicyID"] == "" {
			return fmt.Errorf("it is %+v", c)
		}
		return h.now(metav1.ConditionTrue)
	})
	eventually(t, "an event tells", func() error {
		if n.events(t, "silver", v1alpha1.ReasonDrift, text) == 0 {
			return fmt.Errorf("none with %q", text)
		}
		return nil
	})
	n.synced(t, "stored")
}

// policiesChange: within one poll of 10 s.
func (n *namespacesTest) policiesChange(t *testing.T) {
	edit(t, n, &v1alpha1.Supervisor{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName}}, func(s *v1alpha1.Supervisor) { s.Spec.PolicyPollSeconds = 10 })
	n.synced(t, "stored")
	c, err := pbm.NewClient(t.Context(), n.vim.Client)
	if err != nil {
		t.Fatal(err)
	}
	id := func(name string) pbmtypes.PbmProfileId {
		p := &v1alpha1.StoragePolicy{}
		if err := n.admin.Get(t.Context(), client.ObjectKey{Name: name}, p); err != nil {
			t.Fatal(err)
		}
		return pbmtypes.PbmProfileId{UniqueId: p.Spec.ID}
	}
	h := n.follow(t, "stored")
	update := &pbmtypes.PbmUpdate{This: c.ServiceContent.ProfileManager, ProfileId: id("silver"), UpdateSpec: pbmtypes.PbmCapabilityProfileUpdateSpec{Name: "Plata"}}
	if _, err := methods.PbmUpdate(t.Context(), c, update); err != nil {
		t.Fatal(err)
	}
	if _, err := c.DeleteProfile(t.Context(), []pbmtypes.PbmProfileId{id("gold-fast")}); err != nil {
		t.Fatal(err)
	}
	h.saw(t, metav1.ConditionFalse, v1alpha1.ReasonPolicyGone, `vCenter has no policy "Gold (fast)" any more`)
	eventually(t, "both sides have an event of the policy that is gone", func() error {
		const text = `no policy "Gold (fast)"`
		if n.events(t, "stored", v1alpha1.ReasonPolicyGone, text) == 0 || len(n.posts(t, "stored", text)) == 0 {
			return errors.New("one has none")
		}
		return nil
	})
	eventually(t, "the other has its new name", func() error {
		p := &v1alpha1.StoragePolicy{}
		if err := n.admin.Get(t.Context(), client.ObjectKey{Name: "silver"}, p); err != nil {
			return err
		}
		if p.Status.PolicyName != "Plata" || !meta.IsStatusConditionTrue(p.Status.Conditions, v1alpha1.ConditionReady) || n.events(t, "silver", "Renamed", "Plata") != 1 {
			return fmt.Errorf("status %+v", p.Status)
		}
		return nil
	})
	if err := n.admin.Get(t.Context(), client.ObjectKey{Name: "gold-fast"}, &storagev1.StorageClass{}); err != nil {
		t.Errorf("the class of a policy that is named still: %v", err)
	}
	edit(t, n, svns("stored"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.StoragePolicies = ns.Spec.StoragePolicies[1:] })
	n.synced(t, "stored")
	edit(t, n, svns("shop"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.StoragePolicies = ns.Spec.StoragePolicies[1:] })
	n.synced(t, "shop")
	n.gone(t, &v1alpha1.StoragePolicy{ObjectMeta: metav1.ObjectMeta{Name: "gold-fast"}})
	n.gone(t, &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "gold-fast"}})
	list := &v1alpha1.StoragePolicyList{}
	if err := n.admin.List(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	for _, p := range list.Items {
		if strings.HasPrefix(p.Name, "plata") || strings.HasPrefix(p.Name, "silver-") {
			t.Errorf("a policy is there twice: %s", p.Name)
		}
	}
}

// anew: what an earlier namespace of the name left in vSphere goes when one is
// made again, if it is empty.
func (n *namespacesTest) anew(t *testing.T) {
	ns := svns("anew")
	ns.Spec.Zones = []string{"zone-a"}
	n.apply(t, ns)
	n.synced(t, "anew")
	old, oldFolder := n.one(t, "anew")
	n.forsake(t, "anew")
	if p, f := n.one(t, "anew"); p.Self != old.Self || f.Self != oldFolder.Self {
		t.Errorf("pool and folder went at once: there are %s and %s", p.Self, f.Self)
	}
	again := svns("anew")
	again.Spec.Zones = []string{"zone-a"}
	n.apply(t, again)
	n.synced(t, "anew")
	if p, f := n.one(t, "anew"); p.Self == old.Self || f.Self == oldFolder.Self {
		t.Errorf("the earlier one's pool or folder is there still: %s and %s", p.Self, f.Self)
	}
}

// forsake deletes a SupervisorNamespace past its finalizer: what it has in
// vSphere is nobody's then.
func (n *namespacesTest) forsake(t *testing.T, name string) {
	t.Helper()
	ns := svns(name)
	if err := n.admin.Delete(t.Context(), ns); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its finalizer is gone", func() error {
		err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns)
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		ns.Finalizers = nil
		return n.admin.Update(t.Context(), ns)
	})
}
