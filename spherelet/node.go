package spherelet

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// Labels, annotations and condition that a spherelet puts on its Node.
const (
	LabelAccelerator          = v1alpha1.LabelAccelerator
	LabelKVM                  = "atoll.dev/kvm"          // usable, unusable or absent
	LabelGuestKernel          = "atoll.dev/guest-kernel" // stock or tuned
	AnnotationKVMReason       = "atoll.dev/kvm-reason"
	AnnotationGuestKernel     = "atoll.dev/guest-kernel-release"
	ConditionHardwareIsolated = v1.NodeConditionType("HardwareVirtualization")
)

// nodeSyncInterval is how often the Node is compared with the facts (in the
// kubelet's own cache; the API server is asked only when they differ).
const nodeSyncInterval = 30 * time.Second

// nodeFacts keeps the Node saying how its pods run. The kubelet sets labels
// only when it registers the Node; facts may be others after a reboot.
type nodeFacts struct {
	facts    Facts
	nodeName string
	client   clientset.Interface
	recorder record.EventRecorder
	node     func(context.Context) (*v1.Node, error)
	log      *slog.Logger
}

func (f Facts) labels() map[string]string {
	l := map[string]string{LabelAccelerator: f.Accelerator, LabelKVM: f.KVM, LabelGuestKernel: f.GuestKernel}
	maps.DeleteFunc(l, func(_, v string) bool { return v == "" })
	return l
}

func (f Facts) annotations() map[string]string {
	return map[string]string{AnnotationKVMReason: f.KVMReason, AnnotationGuestKernel: f.GuestRelease}
}

// condition says whether pods are kept apart by hardware virtualization.
func (f Facts) condition() v1.NodeCondition {
	c := v1.NodeCondition{Type: ConditionHardwareIsolated, Status: v1.ConditionTrue, Reason: "KVMUsable",
		Message: "pod VMs run on KVM"}
	switch {
	case f.Accelerator == "kvm":
	case f.KVM == KVMUnusable:
		c.Status, c.Reason, c.Message = v1.ConditionFalse, "KVMUnusable", "/dev/kvm is there and does not work: "+f.KVMReason
	case f.KVM == KVMAbsent:
		c.Status, c.Reason, c.Message = v1.ConditionFalse, "KVMAbsent", "there is no /dev/kvm"
		if f.KVMReason != "" {
			c.Message += ": " + f.KVMReason
		}
	default:
		c.Status, c.Reason, c.Message = v1.ConditionFalse, "EmulationChosen", "KVM is usable, and the configuration asks for emulation"
	}
	if c.Status == v1.ConditionFalse {
		c.Message += "; pod VMs are emulated (TCG), which is slow and no security boundary"
	}
	return c
}

// run reports until ctx ends.
func (n *nodeFacts) run(ctx context.Context) {
	n.announce()
	wait := 200 * time.Millisecond
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		node, err := n.node(ctx)
		if err != nil { // not registered yet
			wait = min(wait*2, nodeSyncInterval)
			continue
		}
		if wait = nodeSyncInterval; n.sync(ctx, node) != nil {
			wait = 2 * time.Second
		}
	}
}

// announce says once a start what an admin must know.
func (n *nodeFacts) announce() {
	c := n.facts.condition()
	ref := &v1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: n.nodeName}
	if c.Status == v1.ConditionTrue {
		return
	}
	n.log.Warn("pod VMs are emulated: slow, and no security boundary", "reason", c.Reason, "message", c.Message)
	if c.Reason == "KVMUnusable" {
		n.recorder.Eventf(ref, v1.EventTypeWarning, c.Reason, "%s", c.Message)
	}
	n.recorder.Eventf(ref, v1.EventTypeWarning, "EmulationIsNoBoundary",
		"Pod VMs on this node are emulated by QEMU (TCG), which is no security boundary: do not run pods that must not trust each other")
}

func (n *nodeFacts) sync(ctx context.Context, node *v1.Node) error {
	if patch := metadataPatch(node, n.facts); patch != nil {
		if _, err := n.client.CoreV1().Nodes().Patch(ctx, n.nodeName, types.StrategicMergePatchType, patch, metav1.PatchOptions{}); err != nil {
			n.log.Warn("labels of the Node could not be set", "node", n.nodeName, "err", err)
			return err
		}
	}
	if patch := conditionPatch(node, n.facts.condition(), time.Now()); patch != nil {
		if _, err := n.client.CoreV1().Nodes().PatchStatus(ctx, n.nodeName, patch); err != nil {
			n.log.Warn("condition of the Node could not be set", "node", n.nodeName, "err", err)
			return err
		}
	}
	return nil
}

// metadataPatch is what node lacks of the facts; nil when nothing. An
// annotation without a value is taken away.
func metadataPatch(node *v1.Node, f Facts) []byte {
	labels, annotations := map[string]string{}, map[string]any{}
	for k, v := range f.labels() {
		if node.Labels[k] != v {
			labels[k] = v
		}
	}
	for k, v := range f.annotations() {
		switch old, ok := node.Annotations[k]; {
		case v != "" && old != v:
			annotations[k] = v
		case v == "" && ok:
			annotations[k] = nil
		}
	}
	if len(labels)+len(annotations) == 0 {
		return nil
	}
	return mustJSON(map[string]any{"metadata": map[string]any{"labels": labels, "annotations": annotations}})
}

// conditionPatch sets the condition, if it is another one than node has.
func conditionPatch(node *v1.Node, c v1.NodeCondition, now time.Time) []byte {
	c.LastTransitionTime, c.LastHeartbeatTime = metav1.NewTime(now), metav1.NewTime(now)
	for _, old := range node.Status.Conditions {
		if old.Type != c.Type {
			continue
		}
		if old.Status == c.Status && old.Reason == c.Reason && old.Message == c.Message {
			return nil
		}
		if old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
	}
	return mustJSON(map[string]any{"status": map[string]any{"conditions": []v1.NodeCondition{c}}})
}

// mustJSON marshals what cannot fail: maps of strings and API types.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("patch of the Node: %v", err))
	}
	return b
}
