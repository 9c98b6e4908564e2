package placement

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// refusedBy is a claim that its node gives back.
func refusedBy(c *corev1.PersistentVolumeClaim, change func(*corev1.PersistentVolumeClaim)) *corev1.PersistentVolumeClaim {
	c.Status.Conditions = []corev1.PersistentVolumeClaimCondition{{Type: "example.com/Kept"}, {Type: v1alpha1.ClaimRefused, Status: corev1.ConditionTrue, Message: "node n1: full"}}
	if change != nil {
		change(c)
	}
	return c
}

// A claim that waits for its first pod is taken from a node that makes no volume.
func TestReschedule(t *testing.T) {
	for name, tt := range map[string]struct {
		claim       *corev1.PersistentVolumeClaim
		more        []runtime.Object
		node, event string
		said        bool // the node's word is still there
	}{
		"selected":          {wants("waits", "1Gi", "n1"), nil, "n1", "", false},
		"not ready":         {wants("waits", "1Gi", "down"), nil, "down", "", false},
		"refused":           {refusedBy(wants("waits", "1Gi", "n1"), nil), nil, "", "Warning Rescheduled node n1 makes no volume, the scheduler selects again: node n1: full", false},
		"made all the same": {refusedBy(wants("waits", "1Gi", "n1"), nil), []runtime.Object{volume("pvc-uid", host, "n1")}, "n1", "", true},
		"gone":              {wants("waits", "1Gi", "gone"), nil, "", "node gone makes no volume, the scheduler selects again: it has left the cluster", false},
		"gone, made there":  {wants("waits", "1Gi", "gone"), []runtime.Object{volume("pvc-uid", host, "gone")}, "gone", "", false},
		"killed halfway":    {refusedBy(wants("waits", "1Gi", ""), nil), nil, "", "", false},
		"bound meanwhile":   {refusedBy(wants("waits", "1Gi", "n1"), func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName = "pv" }), nil, "n1", "", false},
		"vCenter's":         {wants("vcenter", "1Gi", "gone"), nil, "gone", "", false},
		"another driver's":  {wants("theirs", "1Gi", "gone"), nil, "gone", "", false},
	} {
		t.Run(name, func(t *testing.T) {
			p, look := roomy(t, tt.claim, tt.more...)
			if node, event := look(); node != tt.node || !strings.Contains(event, tt.event) || tt.event == "" && event != "" {
				t.Errorf("node %q, event %q; want %q, %q", node, event, tt.node, tt.event)
			}
			got, err := p.Client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "new", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if said := refusal(got) != nil; said != tt.said || len(tt.claim.Status.Conditions) > 0 && len(got.Status.Conditions) == 0 {
				t.Errorf("conditions %+v", got.Status.Conditions)
			}
		})
	}
}

// A node that says that it has room and makes no volume is not asked in a loop.
func TestRescheduleSlowsDown(t *testing.T) {
	p, look := roomy(t, refusedBy(wants("waits", "1Gi", "n1"), nil))
	now := time.Now()
	p.now = func() time.Time { return now }
	p.again["ns/new"] = rescheduling{times: 3, last: now.Add(-4*rescheduleFirst + 1)}
	if node, event := look(); node != "n1" || event != "" {
		t.Fatalf("too early: node %q, event %q", node, event)
	}
	now = now.Add(1)
	if node, _ := look(); node != "" || p.again["ns/new"].times != 4 {
		t.Errorf("node %q, %+v", node, p.again)
	}
	for times, want := range map[int]time.Duration{0: 0, 1: rescheduleFirst, 4: 8 * rescheduleFirst, 7: rescheduleAtMost, 1000: rescheduleAtMost} {
		if left := (rescheduling{times, now}).left(now); left != want {
			t.Errorf("after %d times %s, want %s", times, left, want)
		}
	}
}
