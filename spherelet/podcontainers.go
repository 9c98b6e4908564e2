package spherelet

import (
	"encoding/json"
	"errors"
	"os"
	"path"
	"path/filepath"
	"sync"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	"k8s.io/kubernetes/pkg/kubelet/cm"
)

// podContainerManager answers for the VM of each pod what upstream reads from
// the pod's cgroup. In-place resizes need "what was applied last": the VM
// itself is resized by the runtime, in UpdatePodSandboxResources, which the
// kubelet calls right before SetPodCgroupConfig; here it is only remembered,
// in the pod's own directory, which the kubelet erases with the pod.
type podContainerManager struct {
	cm.PodContainerManager // upstream's stub
	podsDir                string
	// resizing is told of a pod before the kubelet resizes it, and possibly
	// without a cause; nil: nobody is.
	resizing func(*v1.Pod)
	// starting is called at the beginning of each sync of a pod, before the
	// kubelet waits for its volumes, by the pod's own worker; it may block.
	// Nil: nothing is.
	starting func(*v1.Pod)

	mu sync.Mutex // orders reading and writing of the files
}

var _ cm.PodContainerManager = (*podContainerManager)(nil)

// podResources is the part of cm.ResourceConfig that the kubelet sets on pods,
// in its units. Upstream dereferences every field of what it reads back, so
// none is ever missing: unlimited is -1, as upstream reads it from a cgroup.
type podResources struct {
	Memory    int64  `json:"memory"`
	CPUShares uint64 `json:"cpuShares"`
	CPUQuota  int64  `json:"cpuQuota"`
	CPUPeriod uint64 `json:"cpuPeriod"`
}

const (
	// podResourcesFile stands in the pod's directory.
	podResourcesFile = "atoll-resources.json"
	// cfsPeriod is the kubelet's default CPU period in microseconds.
	cfsPeriod = 100000
)

func newPodContainerManager(stub cm.PodContainerManager, kubeletDir string) *podContainerManager {
	return &podContainerManager{PodContainerManager: stub, podsDir: filepath.Join(kubeletDir, "pods")}
}

// GetPodContainerName names the pool and the pod. The second value becomes
// the cgroup parent in CRI.
func (m *podContainerManager) GetPodContainerName(pod *v1.Pod) (cm.CgroupName, string) {
	name := cm.CgroupName{"atoll", poolOf(pod), "pod" + string(pod.UID)}
	return name, "/" + path.Join(name...)
}

// Exists is always true (the kubelet would kill pods otherwise). It is the
// first call for a pod, so what the pod starts with is recorded here.
func (m *podContainerManager) Exists(pod *v1.Pod) bool {
	if m.starting != nil {
		m.starting(pod)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lookup(pod)
	return true
}

func (m *podContainerManager) EnsureExists(klog.Logger, *v1.Pod) error { return nil }

func (m *podContainerManager) Destroy(klog.Logger, cm.CgroupName) error { return nil }

// GetPodCgroupConfig returns what was applied last, in the shape in which the
// kubelet set it. Asking for it is the first step of a resize (a pod with
// resources of its own is also asked for its status), and pod is what was
// allocated.
func (m *podContainerManager) GetPodCgroupConfig(pod *v1.Pod, name v1.ResourceName) (*cm.ResourceConfig, error) {
	if m.resizing != nil && name == v1.ResourceMemory { // of two questions the first
		m.resizing(pod)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.lookup(pod)
	switch name {
	case v1.ResourceMemory:
		return &cm.ResourceConfig{Memory: &r.Memory}, nil
	case v1.ResourceCPU:
		return &cm.ResourceConfig{CPUShares: &r.CPUShares, CPUQuota: &r.CPUQuota, CPUPeriod: &r.CPUPeriod}, nil
	}
	return nil, errors.New("pod " + string(pod.UID) + ": resource " + string(name) + " is not limited by pod")
}

// SetPodCgroupConfig remembers the fields that are set.
func (m *podContainerManager) SetPodCgroupConfig(_ klog.Logger, pod *v1.Pod, c *cm.ResourceConfig) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.lookup(pod)
	r.set(c)
	return m.store(pod.UID, r)
}

// set takes over the fields that c has.
func (r *podResources) set(c *cm.ResourceConfig) {
	if c == nil {
		return
	}
	setIf(&r.Memory, c.Memory)
	setIf(&r.CPUShares, c.CPUShares)
	setIf(&r.CPUQuota, c.CPUQuota)
	setIf(&r.CPUPeriod, c.CPUPeriod)
}

func setIf[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

// lookup finds what was applied to the pod, or takes what it is admitted
// with. A file that cannot be read is as good as none.
func (m *podContainerManager) lookup(pod *v1.Pod) podResources {
	var r podResources
	b, err := os.ReadFile(m.file(pod.UID))
	if err != nil || json.Unmarshal(b, &r) != nil {
		r = podResources{Memory: -1, CPUShares: cm.MinShares, CPUQuota: -1, CPUPeriod: cfsPeriod}
		r.set(cm.ResourceConfigForPod(pod, true, cfsPeriod, false, kubeletconfig.NoneMemoryReservationPolicy))
		if err := m.store(pod.UID, r); err != nil {
			klog.ErrorS(err, "The pod's resources could not be recorded; a restart takes the allocated ones", "podUID", pod.UID)
		}
	}
	return r
}

func (m *podContainerManager) store(uid types.UID, r podResources) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	file := m.file(uid)
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		return err
	}
	tmp := file + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

func (m *podContainerManager) file(uid types.UID) string {
	return filepath.Join(m.podsDir, string(uid), podResourcesFile)
}
