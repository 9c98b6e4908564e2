package spherelet

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"

	"github.com/openatoll/atoll/vmpod"
)

// resizer is a runtime whose VMs have room for so many CPUs.
type resizer struct {
	recorder
	cpus    int
	resized []vmpod.Hint
}

func (r *resizer) CanResize(_ context.Context, h vmpod.Hint) error {
	if h.CPUs > r.cpus {
		return fmt.Errorf("%d CPUs at most: %w", r.cpus, errdefs.ErrResourceExhausted)
	}
	return nil
}

func (r *resizer) Resize(_ context.Context, h vmpod.Hint) error {
	r.resized = append(r.resized, h)
	return nil
}

func podWith(requests, limits v1.ResourceList) *v1.Pod {
	p := pod("a")
	p.Spec.Containers[0].Resources = v1.ResourceRequirements{Requests: requests, Limits: limits}
	return p
}

func TestAdmitResize(t *testing.T) {
	r := &resizer{cpus: 2}
	h := handler(&r.recorder, record.NewFakeRecorder(10))
	h.host.CPUs = 8
	h.preps = newPreparations(r, func() map[string]bool { return nil }, slog.Default())
	for name, c := range map[string]struct {
		requests, limits v1.ResourceList
		want             string // part of the message; empty: it is let in
	}{
		"what the VM has room for":  {nil, v1.ResourceList{"cpu": resource.MustParse("1500m")}, ""},
		"more than the VM can have": {nil, v1.ResourceList{"cpu": resource.MustParse("2500m")}, "2 CPUs at most"},
		"more than the host has":    {v1.ResourceList{"cpu": resource.MustParse("9")}, nil, "the host has 8 CPUs"},
	} {
		got := h.Admit(&lifecycle.PodAdmitAttributes{Pod: podWith(c.requests, c.limits), Operation: lifecycle.ResizeOperation})
		if c.want == "" {
			if !got.Admit {
				t.Errorf("%s: %+v", name, got)
			}
			continue
		}
		if got.Admit || got.Reason != v1.PodReasonInfeasible || !strings.Contains(got.Message, c.want) {
			t.Errorf("%s: %+v, want %s with %q", name, got, v1.PodReasonInfeasible, c.want)
		}
	}
	if len(r.prepared)+len(r.resized) != 0 {
		t.Errorf("the runtime was told before the resize was allocated: %v, %v", r.prepared, r.resized)
	}
}

// TestResizeIsTold: the kubelet's first question of a resize is when the
// runtime learns the pod's new size, requests included.
func TestResizeIsTold(t *testing.T) {
	r := &resizer{cpus: 2}
	h := handler(&r.recorder, record.NewFakeRecorder(10))
	h.preps = newPreparations(r, func() map[string]bool { return nil }, slog.Default())
	m := newPodContainerManager(cm.NewStubContainerManager().NewPodContainerManager(), t.TempDir())
	m.resizing = h.resizing
	p := podWith(v1.ResourceList{"memory": resource.MustParse("1Gi"), "cpu": resource.MustParse("1200m")}, nil)
	for _, name := range []v1.ResourceName{v1.ResourceMemory, v1.ResourceCPU} {
		if _, err := m.GetPodCgroupConfig(p, name); err != nil {
			t.Fatal(err)
		}
	}
	if len(r.resized) != 1 || r.resized[0].CPUs != 2 || r.resized[0].Memory <= 1<<30 || r.resized[0].Owner.PodUID != string(p.UID) {
		t.Errorf("told %+v, want once 2 CPUs and more than 1 GiB", r.resized)
	}
	if len(r.prepared) != 0 {
		t.Errorf("a resize began a preparation: %v", r.prepared)
	}
}
