package spherelet

import (
	"encoding/json"
	"log/slog"
	"reflect"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/testutil"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod"
)

func TestStartsAreShown(t *testing.T) {
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u1", Annotations: map[string]string{"a": "kept"}}}
	client := fake.NewClientset(pod)
	events := record.NewFakeRecorder(1)
	metrics.NewKubeRegistry().MustRegister(startPhases) // it counts from then on
	teller := &startTeller{client: client, recorder: events, accelerator: "tcg", log: slog.New(slog.DiscardHandler)}
	begun := time.Date(2026, 1, 2, 3, 4, 5, 6789000, time.UTC)
	const ms = time.Millisecond
	teller.tell(t.Context(), vmpod.Start{PodUID: "u1", Namespace: "ns", Name: "web", Begun: begun, Took: 2000 * ms, Prepared: true, Phases: []vmpod.Phase{
		{Name: vmpod.PhaseQueue, Took: 40*ms + 400*time.Microsecond}, {Name: vmpod.PhaseVM, From: 40*ms + 400*time.Microsecond, Took: 100*ms + 200*time.Microsecond},
		{Name: vmpod.PhaseVM, From: 200 * ms, Took: 300 * ms}, {Name: vmpod.PhaseContainer, From: 1900 * ms, Took: 100 * ms},
	}})
	if got, want := <-events.Events, "Normal PodStarted The first container runs after 2000 ms, its VM prepared ahead: queue 40, vm 400, container 100 ms"; got != want {
		t.Errorf("event %q, want %q", got, want)
	}
	now, err := client.CoreV1().Pods("ns").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got v1alpha1.PodStart
	if err := json.Unmarshal([]byte(now.Annotations[v1alpha1.StartAnnotation]), &got); err != nil {
		t.Fatalf("%v in %v", err, now.Annotations)
	}
	want := v1alpha1.PodStart{Begun: begun.Truncate(ms), Total: 2000, Prepared: true, Accelerator: "tcg", Phases: []v1alpha1.StartPhase{
		{Name: "queue", Took: 40}, {Name: "vm", From: 40, Took: 101}, {Name: "vm", From: 200, Took: 300}, {Name: "container", From: 1900, Took: 100},
	}}
	if !reflect.DeepEqual(got, want) || now.Annotations["a"] != "kept" {
		t.Errorf("annotations %v, want %+v and what was there", now.Annotations, want)
	}
	if actions := client.Actions(); len(actions) < 1 || actions[0].GetSubresource() != "status" {
		t.Errorf("%v, want a patch of the status", actions)
	}
	for phase, want := range map[string]float64{"total": 2, "queue": .0404, "vm": .4002, "container": .1, "image": 0} {
		sum, err := testutil.GetHistogramMetricValue(startPhases.WithLabelValues(phase))
		if err != nil || sum < want-1e-9 || sum > want+1e-9 {
			t.Errorf("phase %s: %v %v, want %v", phase, sum, err, want)
		}
	}
}

func TestQueuedAt(t *testing.T) {
	second := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, tc := range map[string]struct {
		scheduled, seen, want time.Time
	}{
		"within the second":    {second, second.Add(700 * time.Millisecond), second.Add(700 * time.Millisecond)},
		"long before":          {second, second.Add(5 * time.Second), second},
		"a clock that is late": {second, second.Add(-time.Minute), second.Add(-time.Minute)},
		"never seen":           {second, time.Time{}, second},
		"a static pod":         {time.Time{}, second, second},
		"neither":              {},
	} {
		pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{}}}
		if !tc.seen.IsZero() {
			pod.Annotations[kubetypes.ConfigFirstSeenAnnotationKey] = tc.seen.Format(time.RFC3339Nano)
		}
		if !tc.scheduled.IsZero() {
			pod.Status.Conditions = []v1.PodCondition{{Type: v1.PodScheduled, Status: v1.ConditionTrue, LastTransitionTime: metav1.NewTime(tc.scheduled)}}
		}
		if got := queuedAt(pod); !got.Equal(tc.want) {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
}
