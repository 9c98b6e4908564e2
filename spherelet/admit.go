package spherelet

import (
	"log/slog"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubectl/pkg/util/qos"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"github.com/openatoll/atoll/spherelet/admission"
	"github.com/openatoll/atoll/spherelet/resources"
	"github.com/openatoll/atoll/vmpod"
)

// admitHandler is called by the kubelet, under a lock, before the first sync
// of every pod (static ones too), for running pods again after a restart, and
// for resizes. It must not block.
type admitHandler struct {
	host   admission.Host
	policy resources.Policy
	// extended reports whether the Node offers a resource.
	extended func(name string) bool
	preps    *preparations
	events   func() record.EventRecorder // nil before the kubelet runs
	log      *slog.Logger
}

var _ lifecycle.PodAdmitHandler = (*admitHandler)(nil)

// Admit refuses what cannot be honoured; the kubelet turns Reason and Message
// into the pod's status (Failed) and an event. What it admits is announced to
// the runtime with its size.
func (h *admitHandler) Admit(attrs *lifecycle.PodAdmitAttributes) lifecycle.PodAdmitResult {
	pod := attrs.Pod
	host := h.host
	host.ExtendedResource = h.extended
	if refusals := admission.Check(pod, host); len(refusals) > 0 {
		reason, message := admission.Explain(refusals)
		admissionRefusals.WithLabelValues(reason).Inc()
		h.log.Info("pod refused", "pod_uid", pod.UID, "namespace", pod.Namespace, "pod", pod.Name, "reason", reason, "why", message)
		if attrs.Operation == lifecycle.ResizeOperation {
			reason = v1.PodReasonInfeasible // the kubelet knows no other that lasts
		}
		return lifecycle.PodAdmitResult{Reason: reason, Message: message}
	}
	if attrs.Operation == lifecycle.ResizeOperation {
		return h.admitResize(pod)
	}
	if hasRun(pod) || pod.DeletionTimestamp != nil {
		return lifecycle.PodAdmitResult{Admit: true}
	}
	size := resources.ForPod(pod, h.policy)
	h.tell(pod, size)
	h.preps.start(hintOf(pod, size))
	return lifecycle.PodAdmitResult{Admit: true}
}

// admitResize refuses a resize for which the VM that runs has no room. The
// kubelet makes an event and a condition of it and keeps the pod as it is.
func (h *admitHandler) admitResize(pod *v1.Pod) lifecycle.PodAdmitResult {
	if err := h.preps.canResize(hintOf(pod, resources.ForPod(pod, h.policy))); err != nil {
		h.log.Info("resize refused", "pod_uid", pod.UID, "namespace", pod.Namespace, "pod", pod.Name, "why", err)
		return lifecycle.PodAdmitResult{Reason: v1.PodReasonInfeasible, Message: err.Error()}
	}
	return lifecycle.PodAdmitResult{Admit: true}
}

// resizing tells the runtime how large the pod's VM is to be, when the kubelet
// is about to carry a resize out: CRI says nothing of requests for memory.
func (h *admitHandler) resizing(pod *v1.Pod) {
	h.preps.resize(hintOf(pod, resources.ForPod(pod, h.policy)))
}

// hasRun reports that the pod was started before, by an earlier spherelet: it
// has its VM, or will get it when the kubelet makes a new sandbox.
func hasRun(pod *v1.Pod) bool {
	for _, s := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
		if s.ContainerID != "" || s.RestartCount > 0 {
			return true
		}
	}
	return false
}

// tell says as events what the pod's owner would not expect.
func (h *admitHandler) tell(pod *v1.Pod, size resources.Size) {
	rec := h.events()
	if rec == nil {
		return
	}
	if size.CPUCapped || size.MemoryCapped {
		rec.Eventf(pod, v1.EventTypeNormal, "SizeCapped",
			"The pod's requests and limits sum to more than the host has; its VM is as large as the host: %s", size)
	}
	for _, n := range admission.Notices(pod) {
		rec.Eventf(pod, v1.EventTypeWarning, n.Reason, "%s", n.Message)
	}
}

func hintOf(pod *v1.Pod, size resources.Size) vmpod.Hint {
	return vmpod.Hint{
		Owner:          vmpod.Owner{PodUID: string(pod.UID), Namespace: pod.Namespace, Name: pod.Name},
		CPUs:           size.CPUs,
		Memory:         size.Memory,
		EphemeralBytes: size.EphemeralBytes,
		Pool:           poolOf(pod),
		Images:         earlyImages(pod),
		Queued:         queuedAt(pod),
	}
}

// queuedAt is when the pod was given to this node: scheduled, as the API has it
// in whole seconds, or if that is no earlier than it can tell, when the kubelet
// first saw it. Zero if neither is known.
func queuedAt(pod *v1.Pod) time.Time {
	seen, err := time.Parse(time.RFC3339Nano, pod.Annotations[kubetypes.ConfigFirstSeenAnnotationKey])
	if err != nil {
		seen = time.Time{}
	}
	for _, c := range pod.Status.Conditions {
		if c.Type != v1.PodScheduled || c.Status != v1.ConditionTrue {
			continue
		}
		at := c.LastTransitionTime.Time
		if seen.IsZero() || seen.Sub(at) > time.Second {
			return at.UTC()
		}
	}
	return seen.UTC()
}

// earlyImages are those whose disks the VM may have before the kubelet has
// checked that the pod's pull secrets allow them. With one image for all
// containers nothing runs in the VM before that; with several, a container
// could read the disk of one that is refused to its neighbour.
func earlyImages(pod *v1.Pod) []string {
	if refs := admission.Images(pod); len(refs) == 1 {
		return refs
	}
	return nil
}

// Pools are named after the quality of service.
var pools = map[v1.PodQOSClass]string{
	v1.PodQOSGuaranteed: "guaranteed",
	v1.PodQOSBurstable:  "burstable",
	v1.PodQOSBestEffort: "besteffort",
}

func poolOf(pod *v1.Pod) string { return pools[qos.GetPodQOS(pod)] }
