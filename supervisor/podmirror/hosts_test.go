package podmirror

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func vmNode(name string, ready corev1.ConditionStatus) *corev1.Node {
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1alpha1.LabelAccelerator: "kvm"}},
		Status: corev1.NodeStatus{
			Capacity:   corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("8"), corev1.ResourceMemory: resource.MustParse("32Gi"), corev1.ResourcePods: resource.MustParse("110")},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeMemoryPressure, Status: corev1.ConditionFalse}, {Type: corev1.NodeReady, Status: ready}},
		},
	}
}

func TestHostOf(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*corev1.Node)
		want   Host
		no     bool
	}{
		"ready":             {want: Host{Name: "n", CPUs: 8, Memory: 32 << 30}},
		"not ready":         {change: func(n *corev1.Node) { n.Status.Conditions[1].Status = corev1.ConditionFalse }, want: Host{Name: "n", CPUs: 8, Memory: 32 << 30, State: HostTroubled}},
		"not heard of":      {change: func(n *corev1.Node) { n.Status.Conditions[1].Status = corev1.ConditionUnknown }, want: Host{Name: "n", CPUs: 8, Memory: 32 << 30, State: HostNotResponding}},
		"just registered":   {change: func(n *corev1.Node) { n.Status = corev1.NodeStatus{} }, want: Host{Name: "n", State: HostNotResponding}},
		"no VMs of its own": {change: func(n *corev1.Node) { n.Labels = nil }, no: true},
	} {
		t.Run(name, func(t *testing.T) {
			node := vmNode("n", corev1.ConditionTrue)
			if c.change != nil {
				c.change(node)
			}
			kept, err := reduceNode(node)
			if err != nil {
				t.Fatal(err)
			}
			if got, ok := hostOf(kept.(*corev1.Node)); got != c.want || ok == c.no {
				t.Errorf("%+v %v, want %+v %v", got, ok, c.want, !c.no)
			}
		})
	}
}

// TestHostsFollowNodes: a node that joins brings its host and its pods' mirrors,
// one that is not heard of shows so, and one that is deleted goes when its pods
// have gone.
func TestHostsFollowNodes(t *testing.T) {
	ctx, inventory := t.Context(), newFakeInventory()
	pod := vmPod("shop", "web", uidA)
	pod.Spec.NodeName = "n2"
	client := fake.NewClientset(pod)
	inventory.hosts["gone"] = Host{Name: "gone"} // shown once, and deleted while nobody watched
	// The fake API tells a watch of nothing that came between list and watch.
	watched := make(chan struct{})
	client.PrependWatchReactor("nodes", func(a clienttesting.Action) (bool, watch.Interface, error) {
		w, err := client.Tracker().Watch(a.GetResource(), a.GetNamespace())
		close(watched)
		return true, w, err
	})
	c := newCluster(t, inventory, client, supervisorNamespace(t, "shop", onlyPool()))
	<-watched
	hosts := func(what string, ok func(map[string]Host) bool) {
		t.Helper()
		inventory.await(t, what, func(map[string]VM) bool { return ok(inventory.hosts) })
	}
	hosts("the one that is gone", func(h map[string]Host) bool { return len(h) == 1 })
	node, err := client.CoreV1().Nodes().Create(ctx, vmNode("n2", corev1.ConditionTrue), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	hosts("its host", func(h map[string]Host) bool { return h["n2"] == Host{Name: "n2", CPUs: 8, Memory: 32 << 30} })
	inventory.await(t, "its pod's mirror", func(vms map[string]VM) bool { return vms[uidA].Host == "n2" })

	node.Status.Conditions[1].Status = corev1.ConditionUnknown
	if _, err := client.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	hosts("not heard of", func(h map[string]Host) bool { return h["n2"].State == HostNotResponding && h["n2"].CPUs == 8 })
	if err := client.CoreV1().Nodes().Delete(ctx, "n2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	hosts("it stays with its pod", func(h map[string]Host) bool { return h["n2"].CPUs == 0 && h["n2"].State == HostNotResponding })
	if err := client.CoreV1().Pods("shop").Delete(ctx, "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	hosts("it goes", func(h map[string]Host) bool { return len(h) == 1 })
	c.stop()
}
