package podmirror

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func onlyPool() v1alpha1.PoolStatus { return v1alpha1.PoolStatus{Zone: "zone-a", ID: "resgroup-1"} }

// TestMirrorsFollowPods is one life: made, changed, replaced by a later pod of
// the name, gone.
func TestMirrorsFollowPods(t *testing.T) {
	ctx, inventory := t.Context(), newFakeInventory()
	client := fake.NewClientset(vmPod("shop", "web", uidA), vmPod("plain", "web", uidC))
	c := newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
	pods := client.CoreV1().Pods("shop")
	vms := inventory.await(t, "a mirror", func(vms map[string]VM) bool { return len(vms) > 0 })
	if vm := vms[uidA]; len(vms) != 1 || vm.Pool != "resgroup-1" || vm.Folder != "group-shop" || !vm.On {
		t.Fatalf("shown is %+v, want the pod of the namespace that has a pool", vms)
	}
	pod, err := pods.Get(ctx, "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pod.Status.Phase = corev1.PodSucceeded
	if _, err := pods.UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "off", func(vms map[string]VM) bool { return !vms[uidA].On })

	if err := pods.Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := pods.Create(ctx, vmPod("shop", "web", uidB), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "the later pod alone", func(vms map[string]VM) bool { return len(vms) == 1 && vms[uidB].On })
	if err := pods.Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "none", func(vms map[string]VM) bool { return len(vms) == 0 })
	c.stop()
}

// TestMirrorNamesItselfOnThePod through the status, once.
func TestMirrorNamesItselfOnThePod(t *testing.T) {
	inventory := newFakeInventory()
	client := fake.NewClientset(vmPod("shop", "web", uidA))
	watch, err := client.CoreV1().Pods("shop").Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c := newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
	for e := range watch.ResultChan() {
		if pod := e.Object.(*corev1.Pod); pod.Annotations[v1alpha1.PodVMMoIDAnnotation] == "vm-1111:vcenter" {
			break
		}
	}
	// A later pod's mirror comes after what the annotation has brought about.
	if _, err := client.CoreV1().Pods("shop").Create(t.Context(), vmPod("shop", "later", uidB), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "the later pod", func(vms map[string]VM) bool { return len(vms) == 2 })
	c.stop()
	patches := 0
	for _, a := range client.Actions() {
		if p, ok := a.(clienttesting.PatchAction); ok && p.GetName() == "web" {
			patches++
			if a.GetSubresource() != "status" || a.GetResource().Resource != "pods" {
				t.Errorf("%v, want a patch of a Pod's status", a)
			}
		}
	}
	if patches != 1 {
		t.Errorf("%d patches, want 1", patches)
	}
}

// TestMirrorsWaitForTheirPool: what a namespace has comes later, and in its
// zones.
func TestMirrorsWaitForTheirPool(t *testing.T) {
	ctx, inventory := t.Context(), newFakeInventory()
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "zone-b"}}}
	client := fake.NewClientset(vmPod("shop", "web", uidA), node)
	c := newCluster(t, inventory, client, supervisorNamespace(t, "other", onlyPool()))
	zones := supervisorNamespace(t, "shop", onlyPool(), v1alpha1.PoolStatus{Zone: "zone-b", ID: "resgroup-2"})
	if _, err := c.dynamic.Resource(namespacesResource).Create(ctx, zones, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "in the zone's pool", func(vms map[string]VM) bool { return vms[uidA].Pool == "resgroup-2" })
	node.Labels[corev1.LabelTopologyZone] = "zone-a"
	if _, err := client.CoreV1().Nodes().Update(ctx, node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "moved with the node", func(vms map[string]VM) bool { return vms[uidA].Pool == "resgroup-1" })
	if err := c.dynamic.Resource(namespacesResource).Delete(ctx, "shop", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "gone with the namespace", func(vms map[string]VM) bool { return len(vms) == 0 })
}

// TestRestartRebuilds: what is there is taken over, what has no pod any more
// goes, and nothing goes while the inventory cannot tell what it has.
func TestRestartRebuilds(t *testing.T) {
	inventory := newFakeInventory()
	for name, uid := range map[string]string{"web": uidA, "left": uidB} {
		vm, ok := vmOf(vmPod("shop", name, uid), place{"resgroup-1", "group-shop"})
		if !ok {
			t.Fatal("no VM")
		}
		inventory.vms[uid] = vm
	}
	inventory.set("Mirrored", errDown)
	client := fake.NewClientset(vmPod("shop", "web", uidA), vmPod("shop", "new", uidC))
	newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
	vms := inventory.await(t, "asked three times", func(map[string]VM) bool { return inventory.calls >= 3 })
	if len(vms) != 2 {
		t.Errorf("shown is %v while nobody knows what was there", vms)
	}
	inventory.set("Mirrored", nil)
	inventory.await(t, "as the pods", func(vms map[string]VM) bool {
		_, left := vms[uidB]
		return len(vms) == 2 && !left && vms[uidC].Name == "new" && vms[uidA].Name == "web"
	})
}

func TestMirrorIsMadeInTheEnd(t *testing.T) {
	inventory := newFakeInventory()
	inventory.set("Mirror", errDown)
	client := fake.NewClientset(vmPod("shop", "web", uidA))
	newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
	inventory.await(t, "tried twice", func(map[string]VM) bool { return inventory.calls >= 3 }) // Mirrored, Mirror, Mirror
	inventory.set("Mirror", nil)
	inventory.await(t, "shown", func(vms map[string]VM) bool { return len(vms) == 1 })
}

// TestNothingNewIsNotTold: a status that changes nothing of the mirror makes no
// call.
func TestNothingNewIsNotTold(t *testing.T) {
	ctx, inventory := t.Context(), newFakeInventory()
	client := fake.NewClientset(vmPod("shop", "web", uidA))
	newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
	inventory.await(t, "shown", func(vms map[string]VM) bool { return len(vms) == 1 })
	before := inventory.calls
	for range 20 {
		patch := []byte(`{"status":{"conditions":[{"type":"Ready","status":"True"}]}}`)
		if _, err := client.CoreV1().Pods("shop").Patch(ctx, "web", types.MergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.CoreV1().Pods("shop").Create(ctx, vmPod("shop", "later", uidB), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	inventory.await(t, "the later pod", func(vms map[string]VM) bool { return len(vms) == 2 })
	if more := inventory.calls - before; more != 1 {
		t.Errorf("%d calls, want the later pod's alone", more)
	}
}

func TestPowerIsPassedOn(t *testing.T) {
	for _, op := range []PowerOp{PowerOff, GuestShutdown} {
		inventory := newFakeInventory()
		client := fake.NewClientset(vmPod("shop", "web", uidA))
		c := newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
		inventory.await(t, "shown", func(vms map[string]VM) bool { return len(vms) == 1 })
		if err := c.Power(t.Context(), PowerRequest{Op: op, UUID: uidA, User: "ada@vsphere.local"}); err != nil {
			t.Fatalf("%s: %v", op, err)
		}
		inventory.await(t, "gone with its pod", func(vms map[string]VM) bool { return len(vms) == 0 })
		for _, a := range client.Actions() {
			if d, ok := a.(interface{ GetDeleteOptions() metav1.DeleteOptions }); ok {
				o := d.GetDeleteOptions()
				if o.Preconditions == nil || *o.Preconditions.UID != uidA || o.GracePeriodSeconds != nil {
					t.Errorf("%s: deleted with %+v, want this pod with its own grace period", op, o)
				}
			}
		}
		if err := c.Power(t.Context(), PowerRequest{Op: op, UUID: uidA, User: "ada@vsphere.local"}); !errdefs.IsNotFound(err) {
			t.Errorf("%s once more: %v, want ErrNotFound", op, err)
		}
		c.stop()
	}
}

func TestPowerIsRefusedWithAReason(t *testing.T) {
	inventory := newFakeInventory()
	client := fake.NewClientset(vmPod("shop", "web", uidA))
	c := newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
	inventory.await(t, "shown", func(vms map[string]VM) bool { return len(vms) == 1 })
	for _, op := range []PowerOp{PowerOn, PowerReset, PowerSuspend, GuestReboot, GuestStandby, Destroy, "else"} {
		err := c.Power(t.Context(), PowerRequest{Op: op, UUID: uidA, User: "ada@vsphere.local"})
		if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "shop/web") || !strings.Contains(err.Error(), "kubectl") {
			t.Errorf("%s: %v, want a refusal that names the pod and what to do", op, err)
		}
	}
	if _, err := client.CoreV1().Pods("shop").Get(t.Context(), "web", metav1.GetOptions{}); err != nil {
		t.Errorf("the pod: %v", err)
	}
	if _, err := New(Options{}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("New without anything: %v", err)
	}
}
