package spherelet

import (
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/vmpod"
)

// ConditionVMHealthy is the Pod condition that says what is wrong with its VM.
// A pod whose VM never had a fault does not have it.
const ConditionVMHealthy = v1.PodConditionType("atoll.dev/VMHealthy")

// patchTimeout bounds one patch of a Pod's status.
const patchTimeout = 10 * time.Second

// faultTeller shows faults of pods' VMs where users of kubectl look: as events
// of the Pod, and while a fault lasts as its condition.
type faultTeller struct {
	client   clientset.Interface
	recorder record.EventRecorder
	log      *slog.Logger
}

func (t *faultTeller) tell(ctx context.Context, f vmpod.Fault) {
	ref := &v1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: f.Namespace, Name: f.Name, UID: types.UID(f.PodUID)}
	if f.Cleared {
		t.recorder.Eventf(ref, v1.EventTypeNormal, "VMRecovered", "The pod's VM is well again (%s)", f.Reason)
		t.setCondition(ctx, f, v1.ConditionTrue)
		return
	}
	vmFaults.WithLabelValues(f.Reason).Inc()
	t.recorder.Eventf(ref, v1.EventTypeWarning, f.Reason, "%s", clipEvent(f.Message))
	if !f.Ended { // another VM will take its place: the containers' states tell of this one
		t.setCondition(ctx, f, v1.ConditionFalse)
	}
}

// maxEvent is the longest message of an event that the API of events takes, in
// bytes; the container's status has all of it.
const maxEvent = 1024

func clipEvent(s string) string {
	if len(s) > maxEvent {
		s = strings.ToValidUTF8(s[:maxEvent-len("…")], "") + "…"
	}
	return s
}

func (t *faultTeller) setCondition(ctx context.Context, f vmpod.Fault, status v1.ConditionStatus) {
	condition := v1.PodCondition{Type: ConditionVMHealthy, Status: status, LastTransitionTime: metav1.NewTime(f.At), Reason: f.Reason, Message: f.Message}
	if status == v1.ConditionTrue {
		condition.Reason, condition.Message = "Recovered", "the pod's VM is well again"
	}
	err := patchPod(ctx, t.client, f.Namespace, f.Name, f.PodUID, nil, []v1.PodCondition{condition})
	if err != nil {
		t.log.Warn("condition of a pod could not be set", "pod_uid", f.PodUID, "reason", f.Reason, "err", err)
	}
}

// patchPod adds annotations and conditions to a Pod. Nodes may not change Pods,
// only their status; annotations go with that.
func patchPod(ctx context.Context, client clientset.Interface, namespace, name, uid string, annotations map[string]string, conditions []v1.PodCondition) error {
	metadata := map[string]any{"uid": uid} // not another pod of the same name
	if annotations != nil {
		metadata["annotations"] = annotations
	}
	content := map[string]any{"metadata": metadata}
	if conditions != nil {
		content["status"] = map[string]any{"conditions": conditions}
	}
	patch, err := json.Marshal(content)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patchTimeout)
	defer cancel()
	_, err = client.CoreV1().Pods(namespace).Patch(ctx, name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return err
}
