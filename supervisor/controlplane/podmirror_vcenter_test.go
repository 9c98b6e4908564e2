package controlplane

import (
	"fmt"
	"testing"

	"github.com/vmware/govmomi/object"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// TestPodsOfASupervisorNamespace takes all of it together, as `atoll up` runs it:
// what the controller of namespaces makes is what admission limits pods by and
// where the supervisor mirrors them, also after a kill.
func TestPodsOfASupervisorNamespace(t *testing.T) {
	if testing.Short() {
		t.Skip("starts control planes; about 20 s")
	}
	ctx := t.Context()
	cfg := testConfig(t)
	cfg.VCenter = &VCenter{Port: DefaultVCenterPort, Hosts: []vcsim.Host{{Name: "n1", CPUs: 4, Memory: 8 << 30}}}
	s := startServer(t, cfg)
	m := &mirrorTest{cfg: cfg, dir: t.TempDir(), memory: "64Mi", admin: clientFrom(t, restFrom(t, cfg.Kubeconfig()))}
	as := restFrom(t, cfg.Kubeconfig())
	as.Impersonate = rest.ImpersonationConfig{UserName: "system:node:n1", Groups: []string{"system:nodes"}}
	m.node = clientFrom(t, as)
	m.client, _ = vcenterAdmin(t, cfg)
	m.supervisorNamespace(t, v1alpha1.SupervisorNamespaceSpec{Zones: []string{vcenterCluster}, NamespaceSettings: v1alpha1.NamespaceSettings{
		Memory: &v1alpha1.MemoryAllocation{Limit: resource.NewQuantity(1<<30, resource.BinarySI)},
	}})

	_, err := m.admin.CoreV1().Pods("shop").Create(ctx, plainPod("", "1Gi"), metav1.CreateOptions{})
	refused(t, "a pod that is too large", err, "the memory limit of namespace shop is 1024Mi")
	pod := m.pod(t, "web", "198.19.0.5")
	if a := pod.Spec.Affinity; a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		t.Errorf("affinity %v, want the zone of the namespace", a)
	}
	vm := m.mirror(t, pod)
	path, err := object.NewSearchIndex(m.client.Client).FindByInventoryPath(ctx, "/Atoll/vm/Namespaces/shop/web")
	if err != nil || path == nil || path.Reference() != vm.Self {
		t.Errorf("by its path: %v (%v), want %v", path, err, vm.Self)
	}
	named := func() error {
		now, err := m.admin.CoreV1().Pods("shop").Get(ctx, "web", metav1.GetOptions{})
		if want := m.mirror(t, pod).Self.Value + ":" + m.client.ServiceContent.About.InstanceUuid; err == nil && now.Annotations[v1alpha1.PodVMMoIDAnnotation] != want {
			err = fmt.Errorf("%v, want %s", now.Annotations, want)
		}
		return err
	}
	eventually(t, "the Pod names its VM", named)
	m.joins(t)

	s.kill(t)
	s = startServer(t, cfg)
	m.client, _ = vcenterAdmin(t, cfg)
	m.shows(t, "late", "web")
	m.leaves(t)
	eventually(t, "the Pod names its VM after a kill", named)
	vm = m.mirror(t, pod)
	if err := object.NewVirtualMachine(m.client.Client, vm.Self).ShutdownGuest(ctx); err != nil {
		t.Errorf("shut down: %v", err)
	}
	if now, err := m.admin.CoreV1().Pods("shop").Get(ctx, "web", metav1.GetOptions{}); err != nil || now.DeletionTimestamp == nil {
		t.Errorf("the pod is not being deleted: %v", err)
	}
	m.end(t, "web")
	m.shows(t)
	s.stop(t)
}

// supervisorNamespace makes one named shop, and waits until pods can be made.
func (m *mirrorTest) supervisorNamespace(t *testing.T, spec v1alpha1.SupervisorNamespaceSpec) {
	t.Helper()
	ctx := t.Context()
	dyn, err := dynamic.NewForConfig(restFrom(t, m.cfg.Kubeconfig()))
	if err != nil {
		t.Fatal(err)
	}
	o, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&v1alpha1.SupervisorNamespace{
		TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion, Kind: "SupervisorNamespace"}, ObjectMeta: metav1.ObjectMeta{Name: "shop"}, Spec: spec,
	})
	if err != nil {
		t.Fatal(err)
	}
	delete(o, "status")
	namespaces := dyn.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisornamespaces"))
	eventually(t, "a SupervisorNamespace", func() error {
		_, err := namespaces.Create(ctx, &unstructured.Unstructured{Object: o}, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return nil
		}
		return err
	})
	eventually(t, "both sides of the namespace", func() error {
		have, err := namespaces.Get(ctx, "shop", metav1.GetOptions{})
		if err != nil {
			return err
		}
		pools, _, _ := unstructured.NestedSlice(have.Object, "status", "pools")
		folder, _, _ := unstructured.NestedString(have.Object, "status", "folder", "id")
		if len(pools) == 0 || folder == "" {
			return fmt.Errorf("status %v", have.Object["status"])
		}
		ns, err := m.admin.CoreV1().Namespaces().Get(ctx, "shop", metav1.GetOptions{})
		if err == nil && ns.Annotations[v1alpha1.AnnotationFolder] != folder {
			err = fmt.Errorf("annotations %v", ns.Annotations)
		}
		if err == nil {
			_, err = m.admin.CoreV1().ServiceAccounts("shop").Get(ctx, "default", metav1.GetOptions{})
		}
		return err
	})
	// Admission has the Namespace from a cache of its own.
	eventually(t, "admission knows the namespace", func() error {
		pod := plainPod("", "2Gi")
		pod.Name, pod.GenerateName = "probe", ""
		_, err := m.admin.CoreV1().Pods("shop").Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if !apierrors.IsForbidden(err) {
			return fmt.Errorf("a pod of 2Gi: %v", err)
		}
		return nil
	})
}
