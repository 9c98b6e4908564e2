package main

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestJudgeLog(t *testing.T) {
	for _, test := range []struct{ name, log, want string }{
		{"whole", "line 1,line 2,end 2", ""},
		{"empty", "end 0", ""},
		{"gap", "line 1,line 3,end 3", `line 2 of the log is "line 3"`},
		{"repeat", "line 1,line 1,line 2,end 2", `line 2 of the log is "line 1"`},
		{"order", "line 2,line 1,end 2", `line 1 of the log is "line 2"`},
		{"torn", "line 1,li,line 2,end 2", `line 2 of the log is "li"`},
		{"no beginning", "line 2,end 2", `line 1 of the log is "line 2"`},
		{"last line lost", "line 1,end 2", `the log's end is "end 2", want "end 1"`},
	} {
		err := judgeLog(strings.Split(test.log, ","))
		if (err == nil) != (test.want == "") || (err != nil && !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
}

// TestWatcher: what a pod must not notice is seen, and nothing else is.
func TestWatcher(t *testing.T) {
	began := metav1.NewTime(time.Unix(1e9, 0))
	yes := true
	pod := func() *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: "198.19.0.2",
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: began}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: writer, ContainerID: "atoll://a", Ready: true, Started: &yes,
				State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: began}}}},
		}}
	}
	for _, test := range []struct {
		name, want string
		change     func(*corev1.PodStatus)
	}{
		{"nothing", "", func(*corev1.PodStatus) {}},
		{"probed again", "", func(s *corev1.PodStatus) { s.Conditions[0].LastProbeTime = metav1.Now() }},
		{"not ready", "flip", func(s *corev1.PodStatus) { s.Conditions[0].Status = corev1.ConditionFalse }},
		{"was not ready between two looks", "flip", func(s *corev1.PodStatus) { s.Conditions[0].LastTransitionTime = metav1.Now() }},
		{"a condition lost", "flip", func(s *corev1.PodStatus) { s.Conditions = nil }},
		{"neither ready nor known to have started", "flip", func(s *corev1.PodStatus) { s.ContainerStatuses[0].Ready, s.ContainerStatuses[0].Started = false, nil }},
		{"container not ready", "flip", func(s *corev1.PodStatus) { s.ContainerStatuses[0].Ready = false }},
		{"failed", "flip", func(s *corev1.PodStatus) { s.Phase = corev1.PodFailed }},
		{"restarted", "restart", func(s *corev1.PodStatus) { s.ContainerStatuses[0].RestartCount = 1 }},
		{"replaced", "restart", func(s *corev1.PodStatus) { s.ContainerStatuses[0].ContainerID = "atoll://b" }},
		{"another address", "restart", func(s *corev1.PodStatus) { s.PodIP = "198.19.0.3" }},
		{"waiting", "restart", func(s *corev1.PodStatus) { s.ContainerStatuses[0].State = corev1.ContainerState{} }},
		{"no statuses", "restart", func(s *corev1.PodStatus) { s.ContainerStatuses = nil }},
	} {
		f := &findings{began: time.Now()}
		w := &watcher{f: f, was: map[string]*corev1.Pod{"p": pod()}}
		now := pod()
		test.change(&now.Status)
		w.pod(now)
		w.pod(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "other"}})
		got := ""
		for _, v := range f.all {
			got = v.Kind
		}
		if len(f.all) > 1 || got != test.want {
			t.Errorf("%s: %+v, want %q", test.name, f.all, test.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	all := []float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	for q, want := range map[float64]float64{0.5: 5, 0.99: 10, 1: 10, 0: 1, 0.1: 1, 0.11: 2} {
		if got := quantile(all, q); got != want {
			t.Errorf("quantile(%g) = %g, want %g", q, got, want)
		}
	}
	if got := quantile([]float64{7}, 0.5); got != 7 {
		t.Errorf("quantile of one = %g", got)
	}
}

// TestResult: a run that found something, or was too short, fails.
func TestResult(t *testing.T) {
	r := &result{Kills: 3, Asked: 3, Recoveries: []recovery{{Kill: 1, Back: 2}, {Kill: 2, Interrupted: true}, {Kill: 3, Back: 4}}}
	if err := r.verdict(); err != nil {
		t.Errorf("nothing was found: %v", err)
	}
	if got := r.times(func(r recovery) float64 { return r.Back }); len(got) != 2 || got[0] != 2 || got[1] != 4 {
		t.Errorf("times: %v, want those of the recoveries that were measured", got)
	}
	r.violate("orphan", "tap %s", "atl1")
	if err := r.verdict(); err == nil || r.count("orphan") != 1 || r.count("flip") != 0 {
		t.Errorf("an orphan: verdict %v, %+v", err, r.Violations)
	}
	if err := (&result{Kills: 2, Asked: 3}).verdict(); err == nil {
		t.Error("two kills of three are no proof")
	}
}
