package main

import (
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestReadCalls(t *testing.T) {
	const text = `# TYPE atoll_namespaces_vcenter_calls_total counter
atoll_namespaces_vcenter_calls_total{error="",method="SetField"} 7
atoll_namespaces_vcenter_calls_total{error="unavailable",method="SetField"} 2
atoll_namespaces_vcenter_calls_total{error="",method="WaitForUpdatesEx"} 1.2e+03
atoll_namespaces_vcenter_call_seconds_count{method="SetField"} 9
`
	c, err := readCalls(strings.NewReader(text))
	if err != nil || c["SetField"] != 9 || c["WaitForUpdatesEx"] != 1200 || c.total() != 1209 {
		t.Fatalf("%v, %v", c, err)
	}
	if _, err := readCalls(strings.NewReader("something_else 1\n")); err == nil {
		t.Error("a supervisor that counts nothing was taken for one that asks nothing")
	}
	more := calls{"SetField": 9, "WaitForUpdatesEx": 1201, "UpdateConfig": 1}.since(c)
	if got := more.String(); got != "1 UpdateConfig, 1 WaitForUpdatesEx" || more.total() != 2 {
		t.Errorf("since: %s", got)
	}
	if got := c.since(c).String(); got != "nothing" {
		t.Errorf("no calls are %q", got)
	}
}

func TestSyncedAbove(t *testing.T) {
	at := func(generation, observed int64, status metav1.ConditionStatus) *v1alpha1.SupervisorNamespace {
		ns := benchSpec("n")
		ns.Generation = generation
		ns.Status.Conditions = []metav1.Condition{{Type: v1alpha1.ConditionSynced, Status: status, ObservedGeneration: observed}}
		return ns
	}
	for _, tc := range []struct {
		ns    *v1alpha1.SupervisorNamespace
		above int64
		want  bool
	}{
		{benchSpec("n"), 0, false},
		{at(1, 1, metav1.ConditionTrue), 0, true},
		{at(1, 1, metav1.ConditionFalse), 0, false},
		{at(1, 1, metav1.ConditionTrue), 1, false}, // of before the change
		{at(2, 1, metav1.ConditionTrue), 1, false}, // has not been looked at
		{at(2, 2, metav1.ConditionTrue), 1, true},
	} {
		if got := syncedAbove(tc.ns, tc.above); got != tc.want {
			t.Errorf("generation %d, %+v, above %d: %t", tc.ns.Generation, tc.ns.Status.Conditions, tc.above, got)
		}
	}
}

func TestPlain(t *testing.T) {
	got := plain(metav1.ObjectMeta{
		Name: "q", UID: "u", ResourceVersion: "7", Finalizers: []string{"f"},
		Labels: map[string]string{v1alpha1.LabelNamespace: "n", "kubernetes.io/metadata.name": "n"}, Annotations: map[string]string{v1alpha1.AnnotationPool: "resgroup-1"},
	})
	if got.Name != "q" || got.UID != "" || got.ResourceVersion != "" || got.Finalizers != nil {
		t.Errorf("%+v", got)
	}
	if len(got.Labels) != 1 || got.Labels[v1alpha1.LabelNamespace] != "" || len(got.Annotations) != 1 || got.Annotations[v1alpha1.AnnotationPool] != "" {
		t.Errorf("the controller would take it for its own: %+v", got)
	}
}
