package controlplane

import (
	"errors"
	"fmt"
	"testing"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/vim25/mo"
	vimtypes "github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const lateNode = "n2"

// joins: a node that registers later is a host with what it has, and its pods
// are shown there.
func (m *mirrorTest) joins(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	nodes := m.admin.CoreV1().Nodes()
	node, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: lateNode, Labels: map[string]string{v1alpha1.LabelAccelerator: "kvm"}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.ResourceVersion = "" // controllers write their taints and labels meanwhile
	node.Status = corev1.NodeStatus{
		Capacity:   corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("6"), corev1.ResourceMemory: resource.MustParse("24Gi")},
		Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, LastHeartbeatTime: metav1.Now(), LastTransitionTime: metav1.Now()}},
	}
	if _, err := nodes.UpdateStatus(ctx, node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	m.hostIs(t, func(h *mo.HostSystem) error {
		if hw := h.Summary.Hardware; hw.NumCpuCores != 6 || hw.MemorySize != 24<<30 || h.Runtime.ConnectionState != vimtypes.HostSystemConnectionStateConnected {
			return fmt.Errorf("%d CPUs, %d bytes, %s", hw.NumCpuCores, hw.MemorySize, h.Runtime.ConnectionState)
		}
		return nil
	})
	as := restFrom(t, m.cfg.Kubeconfig())
	as.Impersonate = rest.ImpersonationConfig{UserName: "system:node:" + lateNode, Groups: []string{"system:nodes"}}
	vm := m.mirror(t, m.podOn(t, clientFrom(t, as), lateNode, "late", "198.19.64.5"))
	var host mo.HostSystem
	if err := m.client.RetrieveOne(ctx, *vm.Runtime.Host, []string{"name"}, &host); err != nil || host.Name != lateNode {
		t.Errorf("its pod is on host %q (%v)", host.Name, err)
	}
}

// leaves: the host of a node that was deleted goes with the last of its pods.
func (m *mirrorTest) leaves(t *testing.T) {
	t.Helper()
	if err := m.admin.CoreV1().Nodes().Delete(t.Context(), lateNode, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	m.hostIs(t, func(h *mo.HostSystem) error {
		if h.Runtime.ConnectionState != vimtypes.HostSystemConnectionStateNotResponding || len(h.Vm) != 1 {
			return fmt.Errorf("%s, VMs %v", h.Runtime.ConnectionState, h.Vm)
		}
		return nil
	})
	m.end(t, "late")
	eventually(t, "no host", func() error {
		_, err := find.NewFinder(m.client.Client).HostSystem(t.Context(), "/Atoll/host/atoll/"+lateNode)
		var missing *find.NotFoundError
		if !errors.As(err, &missing) {
			return fmt.Errorf("looked up: %v", err)
		}
		return nil
	})
}

func (m *mirrorTest) hostIs(t *testing.T, ok func(*mo.HostSystem) error) {
	t.Helper()
	eventually(t, "host "+lateNode, func() error {
		found, err := find.NewFinder(m.client.Client).HostSystem(t.Context(), "/Atoll/host/atoll/"+lateNode)
		if err != nil {
			return err
		}
		var h mo.HostSystem
		if err := found.Properties(t.Context(), found.Reference(), []string{"summary", "runtime", "vm"}, &h); err != nil {
			return err
		}
		return ok(&h)
	})
}
