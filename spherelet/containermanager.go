package spherelet

import (
	"context"
	"fmt"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	internalapi "k8s.io/cri-api/pkg/apis"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/kubelet/config"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	evictionapi "k8s.io/kubernetes/pkg/kubelet/eviction/api"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
	"k8s.io/kubernetes/pkg/kubelet/status"

	"github.com/openatoll/atoll/spherelet/machine"
)

// containerManager is the kubelet's view of the host's resources. There are
// no containers of pods on this host, so there are no cgroups to manage: the
// hypervisor accounts VMs. It overrides what upstream's stub gets wrong:
// capacity of ephemeral storage, reservations, the admission, claims of
// devices, and the answers that in-place resizes need.
type containerManager struct {
	cm.ContainerManager // upstream's stub

	host  *machine.Host
	node  cm.NodeConfig
	admit lifecycle.PodAdmitHandler
	pods  *podContainerManager

	mu       sync.Mutex
	capacity v1.ResourceList
}

var _ cm.ContainerManager = (*containerManager)(nil)

func newContainerManager(host *machine.Host, node cm.NodeConfig, admit lifecycle.PodAdmitHandler, kubeletDir string) *containerManager {
	stub := cm.NewStubContainerManager()
	return &containerManager{ContainerManager: stub, host: host, node: node, admit: admit,
		pods: newPodContainerManager(stub.NewPodContainerManager(), kubeletDir)}
}

// Start learns the capacity. Upstream calls it when the runtime is up.
func (m *containerManager) Start(ctx context.Context, node *v1.Node, active cm.ActivePodsFunc, getNode cm.GetNodeFunc, sources config.SourcesReady, statuses status.PodStatusProvider, runtime internalapi.RuntimeService, localStorage bool) error {
	if _, err := m.resources(); err != nil {
		return fmt.Errorf("capacity of the host: %w", err)
	}
	return m.ContainerManager.Start(ctx, node, active, getNode, sources, statuses, runtime, localStorage)
}

// resources returns the host's capacity, read once: RAM, CPUs and the size of
// the kubelet's file system do not change while it runs.
func (m *containerManager) resources() (v1.ResourceList, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.capacity != nil {
		return m.capacity, nil
	}
	memory, err := m.host.Memory()
	if err != nil {
		return nil, err
	}
	fs, err := m.host.RootFsInfo()
	if err != nil {
		return nil, err
	}
	m.capacity = v1.ResourceList{
		v1.ResourceCPU:              *resource.NewMilliQuantity(int64(m.host.CPUs())*1000, resource.DecimalSI),
		v1.ResourceMemory:           *resource.NewQuantity(memory, resource.BinarySI),
		v1.ResourceEphemeralStorage: *resource.NewQuantity(int64(fs.Capacity), resource.BinarySI),
	}
	return m.capacity, nil
}

// GetCapacity: the stub's is 0 bytes of ephemeral storage, so that pods which
// request some never schedule.
func (m *containerManager) GetCapacity(localStorage bool) v1.ResourceList {
	c, err := m.resources()
	if err != nil {
		return nil
	}
	c = c.DeepCopy()
	if !localStorage {
		delete(c, v1.ResourceEphemeralStorage)
	}
	return c
}

func (m *containerManager) GetNodeConfig() cm.NodeConfig { return m.node }

// GetNodeAllocatableReservation is what the Node's allocatable is less than
// its capacity: reservations and the hard eviction thresholds.
func (m *containerManager) GetNodeAllocatableReservation() v1.ResourceList {
	c, err := m.resources()
	if err != nil {
		return nil
	}
	out := v1.ResourceList{}
	eviction := evictionReservation(m.node.HardEvictionThresholds, c)
	for name := range c {
		sum := resource.NewQuantity(0, resource.DecimalSI)
		for _, l := range []v1.ResourceList{m.node.SystemReserved, m.node.KubeReserved, eviction} {
			sum.Add(l[name])
		}
		if !sum.IsZero() {
			out[name] = *sum
		}
	}
	return out
}

// GetNodeAllocatableAbsolute is the same without the eviction thresholds.
func (m *containerManager) GetNodeAllocatableAbsolute() v1.ResourceList {
	c, err := m.resources()
	if err != nil {
		return nil
	}
	c = c.DeepCopy()
	for name, q := range c {
		for _, l := range []v1.ResourceList{m.node.SystemReserved, m.node.KubeReserved} {
			q.Sub(l[name])
		}
		if q.Sign() < 0 {
			q.Set(0)
		}
		c[name] = q
	}
	return c
}

func evictionReservation(ts []evictionapi.Threshold, capacity v1.ResourceList) v1.ResourceList {
	out := v1.ResourceList{}
	for _, t := range ts {
		name, ok := map[evictionapi.Signal]v1.ResourceName{
			evictionapi.SignalMemoryAvailable: v1.ResourceMemory,
			evictionapi.SignalNodeFsAvailable: v1.ResourceEphemeralStorage,
		}[t.Signal]
		if ok && t.Operator == evictionapi.OpLessThan {
			c := capacity[name]
			out[name] = *evictionapi.GetThresholdQuantity(t.Value, &c)
		}
	}
	return out
}

func (m *containerManager) GetAllocateResourcesPodAdmitHandler() lifecycle.PodAdmitHandler {
	return m.admit
}

// GetResources and PrepareDynamicResources: with the stub a pod with a claim
// would start without its device. Admission refuses it before; this holds if
// it did not.
func (m *containerManager) GetResources(ctx context.Context, pod *v1.Pod, c *v1.Container) (*kubecontainer.RunContainerOptions, error) {
	if err := m.PrepareDynamicResources(ctx, pod); err != nil {
		return nil, err
	}
	return m.ContainerManager.GetResources(ctx, pod, c)
}

func (m *containerManager) PrepareDynamicResources(_ context.Context, pod *v1.Pod) error {
	if n := len(pod.Spec.ResourceClaims); n > 0 {
		return fmt.Errorf("pod %s has %d resource claims: devices of the node cannot be given to a pod VM", pod.UID, n)
	}
	return nil
}

// GetPodCgroupRoot is the "pods" container of the Summary API: what all VMs
// take of the host.
func (m *containerManager) GetPodCgroupRoot() string { return m.host.PodsContainer() }

func (m *containerManager) NewPodContainerManager() cm.PodContainerManager { return m.pods }

// nodeConfig is what the kubelet asks back. CgroupVersion is that of the
// guests, where the containers are.
func nodeConfig(nodeName, kubeletDir string, allocatable cm.NodeAllocatableConfig) cm.NodeConfig {
	allocatable.EnforceNodeAllocatable = sets.New[string]()
	return cm.NodeConfig{
		NodeName:              types.NodeName(nodeName),
		CgroupRoot:            "/",
		KubeletRootDir:        kubeletDir,
		NodeAllocatableConfig: allocatable,
		CPUManagerPolicy:      "none",
		MemoryManagerPolicy:   "None",
		TopologyManagerPolicy: "none",
		EnforceCPULimits:      true,
		CPUCFSQuotaPeriod:     100 * time.Millisecond,
		CgroupVersion:         2,
	}
}
