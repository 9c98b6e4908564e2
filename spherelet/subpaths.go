package spherelet

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/kubelet/container"

	"github.com/openatoll/atoll/spherelet/volumes"
)

// reasonSubPath is that of the event of a Pod whose container waits for a
// sub-path (CreateContainerConfigError).
const reasonSubPath = "SubPathFailed"

// retellSubPath is when a failure that is the same all the time is told again:
// events are kept for an hour.
const retellSubPath = 20 * time.Minute

// A subPathTeller tells why a sub-path could not be prepared, as an event of the
// Pod and in the log: the kubelet, which hides it ("failed to prepare subPath"),
// tries again every few seconds, so each failure is told once.
type subPathTeller struct {
	pods     func() []*v1.Pod
	recorder func() record.EventRecorder // nil from it: not yet
	log      *slog.Logger
	now      func() time.Time

	mu   sync.Mutex
	told map[volumes.SubPath]toldSubPath
}

type toldSubPath struct {
	message string
	at      time.Time
}

var _ volumes.SubPathTeller = (*subPathTeller)(nil)

func (n *node) newSubPathTeller() *subPathTeller {
	return &subPathTeller{
		pods: func() []*v1.Pod {
			if k := n.kubelet.Load(); k != nil {
				return k.GetPods()
			}
			return nil
		},
		recorder: n.events, log: n.o.Logger, now: time.Now, told: map[volumes.SubPath]toldSubPath{},
	}
}

// Failed implements volumes.SubPathTeller.
func (t *subPathTeller) Failed(s volumes.SubPath, err error) {
	if !t.news(s, err.Error()) {
		return
	}
	pod := t.pod(s.PodUID)
	c, volume := useOf(pod, s)
	t.log.Warn("a container waits for the sub-path of a volume", "pod_uid", s.PodUID, "namespace", pod.Namespace, "pod", pod.Name,
		"container", s.Container, "volume", volume, "sub_path", s.Path, "err", err)
	recorder := t.recorder()
	ref, refErr := container.GenerateContainerRef(pod, c)
	if recorder == nil || refErr != nil || pod.Name == "" {
		return // the log has it
	}
	recorder.Event(ref, v1.EventTypeWarning, reasonSubPath, clipEvent(fmt.Sprintf("Container %q, volume %q: %v", s.Container, volume, err)))
}

// Prepared implements volumes.SubPathTeller.
func (t *subPathTeller) Prepared(s volumes.SubPath) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.told, s)
}

// Gone implements volumes.SubPathTeller.
func (t *subPathTeller) Gone(podUID types.UID, volume string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for s := range t.told {
		if s.PodUID == podUID && s.Volume == volume {
			delete(t.told, s)
		}
	}
}

// news says whether a failure is to be told, and notes that it was.
func (t *subPathTeller) news(s volumes.SubPath, message string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	last, now := t.told[s], t.now()
	if last.message == message && now.Sub(last.at) < retellSubPath {
		return false
	}
	t.told[s] = toldSubPath{message, now}
	return true
}

// pod finds a pod of the kubelet; one that it has forgotten has no name.
func (t *subPathTeller) pod(uid types.UID) *v1.Pod {
	pods := t.pods()
	if i := slices.IndexFunc(pods, func(p *v1.Pod) bool { return p.UID == uid }); i >= 0 {
		return pods[i]
	}
	pod := &v1.Pod{}
	pod.UID = uid
	return pod
}

// useOf returns the container, and the volume by its name in the pod's spec.
func useOf(pod *v1.Pod, s volumes.SubPath) (*v1.Container, string) {
	found, volume := &v1.Container{Name: s.Container}, s.Volume
	podutil.VisitContainers(&pod.Spec, podutil.AllContainers, func(c *v1.Container, _ podutil.ContainerType) bool {
		if c.Name != s.Container {
			return true
		}
		found = c
		if s.Mount < len(c.VolumeMounts) {
			volume = c.VolumeMounts[s.Mount].Name
		}
		return false
	})
	return found, volume
}
