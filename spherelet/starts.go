package spherelet

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod"
)

// startTeller shows where the time of pods' starts went: as one event and an
// annotation of the Pod, and in a histogram.
type startTeller struct {
	client      clientset.Interface
	recorder    record.EventRecorder
	accelerator string
	log         *slog.Logger
}

func (t *startTeller) tell(ctx context.Context, s vmpod.Start) {
	for _, name := range vmpod.Phases() {
		if had(s, name) {
			startPhases.WithLabelValues(name).Observe(s.Total(name).Seconds())
		}
	}
	startPhases.WithLabelValues("total").Observe(s.Took.Seconds())
	ref := &v1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: s.Namespace, Name: s.Name, UID: types.UID(s.PodUID)}
	t.recorder.Event(ref, v1.EventTypeNormal, "PodStarted", describeStart(s))
	t.annotate(ctx, s)
}

func had(s vmpod.Start, phase string) bool {
	for _, p := range s.Phases {
		if p.Name == phase {
			return true
		}
	}
	return false
}

// describeStart is a sentence with all figures. They need not sum to the whole.
func describeStart(s vmpod.Start) string {
	var parts []string
	for _, name := range vmpod.Phases() {
		if had(s, name) {
			parts = append(parts, fmt.Sprintf("%s %d", name, milliseconds(s.Total(name))))
		}
	}
	ahead := ""
	if s.Prepared {
		ahead = ", its VM prepared ahead"
	}
	return fmt.Sprintf("The first container runs after %d ms%s: %s ms", milliseconds(s.Took), ahead, strings.Join(parts, ", "))
}

func milliseconds(d time.Duration) int64 { return d.Round(time.Millisecond).Milliseconds() }

// podStart rounds both ends of each phase, so that what touched still does and
// nothing ends after the whole.
func podStart(s vmpod.Start, accelerator string) v1alpha1.PodStart {
	out := v1alpha1.PodStart{Begun: s.Begun.UTC().Truncate(time.Millisecond), Total: milliseconds(s.Took), Attempt: s.Attempt,
		Prepared: s.Prepared, Accelerator: accelerator, Phases: []v1alpha1.StartPhase{}}
	for _, p := range s.Phases {
		from := milliseconds(p.From)
		out.Phases = append(out.Phases, v1alpha1.StartPhase{Name: p.Name, From: from, Took: milliseconds(p.From+p.Took) - from})
	}
	return out
}

func (t *startTeller) annotate(ctx context.Context, s vmpod.Start) {
	value, err := json.Marshal(podStart(s, t.accelerator))
	if err == nil {
		err = patchPod(ctx, t.client, s.Namespace, s.Name, s.PodUID, map[string]string{v1alpha1.StartAnnotation: string(value)}, nil)
	}
	if err != nil {
		t.log.Warn("a pod's start could not be written to it", "pod_uid", s.PodUID, "err", err)
	}
}
