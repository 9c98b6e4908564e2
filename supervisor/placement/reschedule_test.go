package placement

import (
	"cmp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	storagehelpers "k8s.io/component-helpers/storage/volume"

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

// A claim whose source another node alone can copy is given to that one.
func TestHandOver(t *testing.T) {
	for name, tt := range map[string]struct {
		reason, selected string
		want, event      string
		source           string // "": data
	}{
		"to a node that reaches it":  {v1alpha1.ClaimOfNode + "n2", "n1", "n2", "Normal PlacedBySource the volume is made on node n2, whose pod writes to PersistentVolumeClaim data", ""},
		"killed halfway":             {v1alpha1.ClaimOfNode + "n2", "n2", "n2", "", ""},
		"to one that does not":       {v1alpha1.ClaimOfNode + "far", "n1", "n1", "", ""},
		"to one that is not there":   {v1alpha1.ClaimOfNode + "gone", "n1", "n1", "", ""},
		"refused for another reason": {"NoRoom", "n1", "n1", "", ""},
		"its source is gone":         {v1alpha1.ClaimOfNode + "n2", "n1", "n1", "", "none"},
	} {
		t.Run(name, func(t *testing.T) {
			far := node("far", corev1.ConditionTrue)
			delete(far.Labels, "shared")
			clone := refusedBy(claim("new", restores(kindClaim, cmp.Or(tt.source, "data"))), func(c *corev1.PersistentVolumeClaim) {
				c.Annotations = map[string]string{storagehelpers.AnnSelectedNode: tt.selected}
				c.Status.Conditions[1].Reason = tt.reason
			})
			var p *Placer
			w, events := seen(t, []runtime.Object{
				node("n1", corev1.ConditionTrue), node("n2", corev1.ConditionTrue), far, volume("pv", "shared", "true"),
				&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: "ours"}, Provisioner: v1alpha1.CSIDriverName},
				claim("data", func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName, c.Status.Phase = "pv", corev1.ClaimBound }), clone,
			}, nil, func(w Cluster) { p = New(w) })
			if err := p.place(t.Context(), "ns/new"); err != nil {
				t.Fatal(err)
			}
			got, err := w.Client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "new", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			if node := got.Annotations[storagehelpers.AnnSelectedNode]; node != tt.want || refusal(got) != nil || len(got.Status.Conditions) != 1 {
				t.Errorf("node %q, want %q; conditions %+v", node, tt.want, got.Status.Conditions)
			}
			event := ""
			select {
			case event = <-events.Events:
			default:
			}
			if !strings.Contains(event, tt.event) || tt.event == "" && event != "" {
				t.Errorf("event %q, want %q in it", event, tt.event)
			}
		})
	}
}

// Two nodes that name each other do not toss a claim to and fro.
func TestHandOverSlowsDown(t *testing.T) {
	clone := refusedBy(claim("new", restores(kindClaim, "data")), func(c *corev1.PersistentVolumeClaim) {
		c.Annotations = map[string]string{storagehelpers.AnnSelectedNode: "n1"}
		c.Status.Conditions[1].Reason = v1alpha1.ClaimOfNode + "n2"
	})
	var p *Placer
	w, _ := seen(t, []runtime.Object{clone}, nil, func(w Cluster) { p = New(w) })
	now := time.Now()
	p.now = func() time.Time { return now }
	p.again["ns/new"] = rescheduling{times: 3, last: now.Add(-4*rescheduleFirst + 1)}
	look := func() string {
		if err := p.handOver(t.Context(), "ns/new", clone, []string{"n1", "n2"}, v1alpha1.ClaimOfNode+"n2"); err != nil {
			t.Fatal(err)
		}
		got, err := w.Client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "new", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return got.Annotations[storagehelpers.AnnSelectedNode]
	}
	if node := look(); node != "n1" {
		t.Fatalf("too early on %s", node)
	}
	now = now.Add(1)
	if node := look(); node != "n2" || p.again["ns/new"].times != 4 {
		t.Errorf("node %q, %+v", node, p.again)
	}
}
