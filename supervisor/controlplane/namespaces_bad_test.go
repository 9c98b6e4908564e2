package controlplane

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8stypes "k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// badInput: each gives a reason of its own, touches no other namespace, and is
// over once it is put right.
func (n *namespacesTest) badInput(t *testing.T) {
	parent, err := find.NewFinder(n.vim.Client).ResourcePool(t.Context(), "/Atoll/host/east/Resources/Namespaces")
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := parent.Create(t.Context(), "taken", types.DefaultResourceConfigSpec())
	if err != nil {
		t.Fatal(err)
	}
	n.apply(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "plain"}})
	other := n.synced(t, "both").ResourceVersion
	var deleted []string // Kubernetes takes 5 s for each
	for _, tc := range []struct {
		name   string
		spec   func(*v1alpha1.SupervisorNamespaceSpec)
		reason string
		right  func(t *testing.T, ns *v1alpha1.SupervisorNamespace)
	}{
		{"policy", func(s *v1alpha1.SupervisorNamespaceSpec) {
			s.StoragePolicies = []v1alpha1.StoragePolicyLimit{{Name: "bronze"}}
		}, v1alpha1.ReasonUnknownPolicy, func(t *testing.T, ns *v1alpha1.SupervisorNamespace) {
			edit(t, n, ns, func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.StoragePolicies[0].Name = "silver" })
		}},
		{"class", func(s *v1alpha1.SupervisorNamespaceSpec) { s.VMClasses = []string{"huge"} }, v1alpha1.ReasonUnknownClass, func(t *testing.T, _ *v1alpha1.SupervisorNamespace) {
			n.apply(t, &v1alpha1.VirtualMachineClass{ObjectMeta: metav1.ObjectMeta{Name: "huge"}, Spec: v1alpha1.VirtualMachineClassSpec{CPUs: 8, Memory: *quantity("16Gi")}})
		}},
		{"user", func(s *v1alpha1.SupervisorNamespaceSpec) {
			s.Access = []v1alpha1.AccessEntry{{Kind: v1alpha1.UserSubject, Name: "nobody", Role: v1alpha1.RoleEdit}}
		}, v1alpha1.ReasonUnknownUser, func(t *testing.T, ns *v1alpha1.SupervisorNamespace) {
			edit(t, n, ns, func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.Access[0].Name = "bob" })
		}},
		{"tag", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Tags = []string{"cost/7"} }, v1alpha1.ReasonUnknownTag, func(t *testing.T, ns *v1alpha1.SupervisorNamespace) {
			edit(t, n, ns, func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.Tags = nil })
		}},
		{"reservation", func(s *v1alpha1.SupervisorNamespaceSpec) {
			s.Memory = &v1alpha1.MemoryAllocation{Reservation: quantity("900Gi")}
		}, v1alpha1.ReasonReservationTooLarge, func(t *testing.T, ns *v1alpha1.SupervisorNamespace) {
			edit(t, n, ns, func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.Memory.Reservation = quantity("1Gi") })
		}},
		{"taken", func(*v1alpha1.SupervisorNamespaceSpec) {}, v1alpha1.ReasonPoolNotOurs, func(t *testing.T, _ *v1alpha1.SupervisorNamespace) {
			if err := n.wait(t)(foreign.Destroy(t.Context())); err != nil {
				t.Fatal(err)
			}
		}},
		{"plain", func(*v1alpha1.SupervisorNamespaceSpec) {}, v1alpha1.ReasonNamespaceNotOurs, func(t *testing.T, _ *v1alpha1.SupervisorNamespace) {
			edit(t, n, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "plain"}}, func(k *corev1.Namespace) { k.Labels[v1alpha1.LabelNamespace] = "plain" })
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ns := svns(tc.name)
			ns.Spec.Zones = []string{"zone-a"}
			tc.spec(&ns.Spec)
			n.apply(t, ns)
			bad := n.await(t, tc.name, metav1.ConditionFalse, tc.reason)
			c := meta.FindStatusCondition(bad.Status.Conditions, v1alpha1.ConditionSynced)
			if len(c.Message) < 20 {
				t.Errorf("the message is %q", c.Message)
			}
			if len(bad.Status.Messages) == 0 || bad.Status.Messages[0].Reason != tc.reason {
				t.Errorf("messages %+v", bad.Status.Messages)
			}
			tc.right(t, ns)
			n.synced(t, tc.name)
			if have := n.vsphere(t, tc.name); len(have.pools) != 1 || len(have.folders) != 1 {
				t.Errorf("vSphere has %d pools and %d folders", len(have.pools), len(have.folders))
			}
			if err := n.admin.Delete(t.Context(), svns(tc.name)); err != nil {
				t.Fatal(err)
			}
			deleted = append(deleted, tc.name)
		})
	}
	for _, name := range deleted {
		n.gone(t, svns(name))
	}
	for _, name := range deleted { // all are gone: what goes meanwhile cannot be looked at
		if have := n.vsphere(t, name); len(have.pools)+len(have.folders) != 0 {
			t.Errorf("vSphere still has %+v", have)
		}
	}
	t.Run("zone", func(t *testing.T) {
		ns := svns("zone")
		ns.Spec.Zones = []string{"zone-x"}
		n.apply(t, ns)
		n.await(t, "zone", metav1.ConditionFalse, v1alpha1.ReasonUnknownZone)
		if err := n.admin.Delete(t.Context(), ns); err != nil {
			t.Fatal(err)
		}
		n.gone(t, ns)
	})
	if now := n.synced(t, "both").ResourceVersion; now != other {
		t.Errorf("namespace both was written meanwhile: %s, was %s", now, other)
	}
}

// badDays: vCenter refuses, loses sessions, is restarted. The status says which,
// nothing is doubled, and it is over by itself.
func (n *namespacesTest) badDays(t *testing.T) {
	t.Run("permission withdrawn", func(t *testing.T) {
		remove := n.vc.Faults().Add(vcsim.Fault{Method: "UpdateConfig", Fault: &types.NoPermission{PrivilegeId: "Resource.EditPool"}})
		edit(t, n, svns("both"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.CPU.Limit = quantity("4") })
		ns := n.await(t, "both", metav1.ConditionFalse, v1alpha1.ReasonPermissionDenied)
		if c := meta.FindStatusCondition(ns.Status.Conditions, v1alpha1.ConditionSynced); !strings.Contains(c.Message, "Resource.EditPool") {
			t.Errorf("the message names no privilege: %s", c.Message)
		}
		remove()
		n.synced(t, "both")
	})
	t.Run("call fails", func(t *testing.T) {
		n.vc.Faults().Add(vcsim.Fault{Method: "CreateResourcePool", Times: 2, Fault: &types.RuntimeFault{}})
		ns := svns("fails")
		n.apply(t, ns)
		n.await(t, "fails", metav1.ConditionFalse, v1alpha1.ReasonTaskFailed)
		n.synced(t, "fails")
		if have := n.vsphere(t, "fails"); len(have.pools) != 2 || len(have.folders) != 1 {
			t.Errorf("vSphere has %d pools and %d folders", len(have.pools), len(have.folders))
		}
	})
	t.Run("answer lost", func(t *testing.T) {
		// The call was made, and nobody knows.
		n.vc.Faults().Add(vcsim.Fault{Method: "CreateResourcePool", Times: 1, Drop: true, Late: true})
		ns := svns("lost")
		n.apply(t, ns)
		n.synced(t, "lost")
		if have := n.vsphere(t, "lost"); len(have.pools) != 2 || len(have.folders) != 1 {
			t.Errorf("vSphere has %d pools and %d folders", len(have.pools), len(have.folders))
		}
	})
	t.Run("sessions dropped", func(t *testing.T) {
		n.vc.EndSessions(nsUser)
		n.vim = n.connect(t)
		edit(t, n, svns("both"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.CPU.Limit = quantity("6") })
		n.synced(t, "both")
		if p := n.vsphere(t, "both").pools[0]; *p.Config.CpuAllocation.Limit != 3*nsMHz {
			t.Errorf("the pool has %d MHz", *p.Config.CpuAllocation.Limit)
		}
	})
	t.Run("restarted", n.restarted)
}

// restarted: while vCenter is away nothing is concluded, and a namespace that is
// deleted meanwhile waits.
func (n *namespacesTest) restarted(t *testing.T) {
	address := n.vc.URL().Host
	if err := n.vc.Close(); err != nil {
		t.Fatal(err)
	}
	n.apply(t, svns("meanwhile"))
	n.await(t, "meanwhile", metav1.ConditionUnknown, v1alpha1.ReasonVCenterUnreachable)
	if err := n.admin.Delete(t.Context(), svns("lost")); err != nil {
		t.Fatal(err)
	}
	n.await(t, "lost", metav1.ConditionUnknown, v1alpha1.ReasonVCenterUnreachable)
	ns := n.await(t, "both", metav1.ConditionUnknown, v1alpha1.ReasonVCenterUnreachable)
	if !meta.IsStatusConditionTrue(ns.Status.Conditions, v1alpha1.ConditionReady) || len(ns.Status.Pools) != 2 {
		t.Errorf("a namespace that was there cannot be used any more: %+v", ns.Status)
	}
	var c vcsim.Config
	if err := c.Listen.UnmarshalText([]byte(address)); err != nil {
		t.Fatal(err)
	}
	n.startVCenter(t, c)
	// The watch backs off: it may be a while until it tries again.
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		sup := &v1alpha1.Supervisor{}
		if err := n.admin.Get(t.Context(), client.ObjectKey{Name: v1alpha1.SupervisorName}, sup); err == nil && meta.IsStatusConditionTrue(sup.Status.Conditions, v1alpha1.ConditionConnected) {
			break
		}
	}
	n.synced(t, "meanwhile")
	n.synced(t, "both")
	n.gone(t, svns("lost"))
	if have := n.vsphere(t, "lost"); len(have.pools)+len(have.folders) != 0 {
		t.Errorf("vSphere still has %+v", have)
	}
	if have := n.vsphere(t, "both"); len(have.pools) != 2 || len(have.folders) != 1 {
		t.Errorf("vSphere has %+v", have)
	}
}

// selfService: users of a template make namespaces by kubectl.
func (n *namespacesTest) selfService(t *testing.T) {
	one := int32(1)
	template := &v1alpha1.NamespaceTemplate{ObjectMeta: metav1.ObjectMeta{Name: "small"}, Spec: v1alpha1.NamespaceTemplateSpec{
		AllowedUsers: []v1alpha1.TemplateSubject{{Kind: v1alpha1.GroupSubject, Name: "devs"}}, MaxNamespacesPerUser: &one,
		Settings: v1alpha1.NamespaceSettings{CPU: &v1alpha1.CPUAllocation{Limit: quantity("1")}},
	}}
	n.apply(t, template)
	ada, bob := n.as(t, "sso:ada@vsphere.local", "sso:devs@vsphere.local"), n.as(t, "sso:bob@vsphere.local")
	eventually(t, "ada makes a namespace", func() error {
		return ada.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "adas"}})
	})
	var ns *v1alpha1.SupervisorNamespace
	eventually(t, "it becomes one of vSphere's", func() error {
		ns = svns("adas")
		return n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns)
	})
	ns = n.synced(t, "adas")
	if ns.Status.Template != "small" || ns.Spec.CPU.Limit.String() != "1" || len(ns.Spec.Access) != 1 || ns.Spec.Access[0].Name != "ada" || ns.Spec.Access[0].Role != v1alpha1.RoleOwner {
		t.Errorf("made from the template: %+v, status %+v", ns.Spec, ns.Status)
	}
	if have := n.vsphere(t, "adas"); len(have.pools) != 2 || *have.pools[0].Config.CpuAllocation.Limit != nsMHz/2 {
		t.Errorf("vSphere has %+v", have)
	}
	eventually(t, "ada may use it", func() error {
		return ada.Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "adas", Name: "x"}})
	})
	eventually(t, "one is the most", func() error {
		err := ada.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "more"}}, client.DryRunAll)
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "delete one") {
			return fmt.Errorf("a second one: %v", err)
		}
		return nil
	})
	if err := bob.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "bobs"}}); !apierrors.IsForbidden(err) {
		t.Errorf("bob, whom no template allows: %v", err)
	}
	n.plain(t)
	n.admissionKept(t)

	// Its owner deletes it as a Namespace; an administrator's is refused so.
	if err := ada.Delete(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "adas"}}); err != nil {
		t.Fatal(err)
	}
	n.gone(t, svns("adas"))
	n.gone(t, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "adas"}})
	if have := n.vsphere(t, "adas"); len(have.pools)+len(have.folders) != 0 {
		t.Errorf("vSphere still has %+v", have)
	}
	err := n.admin.Delete(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "both"}})
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "kubectl delete supervisornamespace both") {
		t.Errorf("deleting a Namespace that is in vSphere: %v", err)
	}
}

// admissionKept: what admission reads, and the right that it narrows, are there
// again when somebody deleted or changed them.
func (n *namespacesTest) admissionKept(t *testing.T) {
	t.Helper()
	config := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: "atoll-self-service"}}
	binding := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "atoll:self-service"}}
	kept := func(old, oldBinding k8stypes.UID) func() error {
		return func() error {
			err := errors.Join(n.admin.Get(t.Context(), client.ObjectKeyFromObject(config), config), n.admin.Get(t.Context(), client.ObjectKeyFromObject(binding), binding))
			if err == nil && (config.UID == old || binding.UID == oldBinding || config.Data["plain"] != "Allow" || config.Data["template.small"] == "" || len(binding.Subjects) != 1) {
				err = fmt.Errorf("data %v, subjects %v", config.Data, binding.Subjects)
			}
			return err
		}
	}
	eventually(t, "admission's ConfigMap is there", kept("", ""))
	if err := errors.Join(n.admin.Delete(t.Context(), config), n.admin.Delete(t.Context(), binding)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what was deleted is made again", kept(config.UID, binding.UID))
	edit(t, n, config, func(c *corev1.ConfigMap) { c.Data["plain"], c.Data["template.small"] = "Refuse", "u:mallory" })
	eventually(t, "what was changed is changed back", func() error {
		err := kept("", "")()
		if err == nil && strings.Contains(config.Data["template.small"], "mallory") {
			err = errors.New("mallory may make namespaces")
		}
		return err
	})
}

// plain namespaces of somebody who may make any, as the Supervisor has it.
func (n *namespacesTest) plain(t *testing.T) {
	t.Helper()
	n.apply(t, &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "carol"}, RoleRef: rbacv1.RoleRef{APIGroup: "rbac.authorization.k8s.io", Kind: "ClusterRole", Name: "cluster-admin"},
		Subjects: []rbacv1.Subject{{APIGroup: "rbac.authorization.k8s.io", Kind: "User", Name: "carol"}},
	})
	carol := n.as(t, "carol")
	try := func(labels map[string]string) error {
		return carol.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "carols", Labels: labels}}, client.DryRunAll)
	}
	eventually(t, "plain namespaces are left alone", func() error { return try(nil) })
	for label, want := range map[string]string{v1alpha1.LabelTemplate: "does not allow you", v1alpha1.LabelNamespace: "leave it out"} {
		if err := try(map[string]string{label: "small"}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("with the label %s: %v", label, err)
		}
	}
	sup := &v1alpha1.Supervisor{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName}}
	edit(t, n, sup, func(s *v1alpha1.Supervisor) { s.Spec.PlainNamespaces = v1alpha1.RefusePlainNamespaces })
	eventually(t, "plain namespaces are refused", func() error {
		if err := try(nil); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "plainNamespaces") {
			return fmt.Errorf("it is not: %v", err)
		}
		return nil
	})
	edit(t, n, sup, func(s *v1alpha1.Supervisor) { s.Spec.PlainNamespaces = v1alpha1.AllowPlainNamespaces })
}

// deletion ends pods first, then pools and folder.
func (n *namespacesTest) deletion(t *testing.T) {
	n.synced(t, "shop")
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "slow", Finalizers: []string{"example.com/held"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "none"}}},
	}
	eventually(t, "a pod", func() error { return n.admin.Create(t.Context(), pod.DeepCopy()) })
	eventually(t, "its use is in the status", func() error {
		ns := svns("shop")
		if err := n.admin.Get(t.Context(), client.ObjectKeyFromObject(ns), ns); err != nil {
			return err
		}
		if u := ns.Status.Usage; u == nil || u.Pods == nil || *u.Pods != 1 || u.CPU.IsZero() {
			return fmt.Errorf("usage %+v", u)
		}
		return nil
	})
	if err := n.admin.Delete(t.Context(), svns("shop")); err != nil {
		t.Fatal(err)
	}
	ns := n.await(t, "shop", metav1.ConditionFalse, v1alpha1.ReasonDraining)
	if c := meta.FindStatusCondition(ns.Status.Conditions, v1alpha1.ConditionSynced); !strings.Contains(c.Message, "slow") {
		t.Errorf("the message names no pod: %s", c.Message)
	}
	if have := n.vsphere(t, "shop"); len(have.pools) != 1 || len(have.folders) != 1 {
		t.Errorf("pool or folder went before the pods: %+v", have)
	}
	edit(t, n, pod, func(p *corev1.Pod) { p.Finalizers = nil })
	n.gone(t, svns("shop"))
	if have := n.vsphere(t, "shop"); len(have.pools)+len(have.folders) != 0 {
		t.Errorf("vSphere still has %+v", have)
	}
	k := &corev1.Namespace{}
	if err := n.admin.Get(t.Context(), client.ObjectKey{Name: "shop"}, k); !apierrors.IsNotFound(err) {
		t.Errorf("the Namespace: %v", errors.Join(err, fmt.Errorf("phase %s", k.Status.Phase)))
	}
}
