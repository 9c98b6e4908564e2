package spherelet

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/vmpod"
)

func TestFaultsAreShown(t *testing.T) {
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "u1"}, Status: v1.PodStatus{Conditions: []v1.PodCondition{{Type: v1.PodReady, Status: v1.ConditionTrue}}}}
	client := fake.NewClientset(pod)
	events := record.NewFakeRecorder(10)
	teller := &faultTeller{client: client, recorder: events, log: slog.New(slog.DiscardHandler)}
	fault := vmpod.Fault{PodUID: "u1", Namespace: "ns", Name: "web", Reason: vmpod.ReasonVMMStopped, Message: "stopped", At: time.Now()}
	cleared, ended := fault, fault
	cleared.Cleared = true
	ended.Ended, ended.Reason, ended.Message = true, "GuestPanic", strings.Repeat("é", 2000)
	for _, tc := range []struct {
		fault            vmpod.Fault
		event, condition string
	}{
		{fault, "Warning VMMStopped stopped", "False VMMStopped stopped"},
		{cleared, "Normal VMRecovered The pod's VM is well again (VMMStopped)", "True Recovered the pod's VM is well again"},
		{ended, "Warning GuestPanic éé", "True Recovered the pod's VM is well again"}, // another VM takes its place
	} {
		teller.tell(t.Context(), tc.fault)
		if got := <-events.Events; !strings.HasPrefix(got, tc.event) || len(got) > maxEvent+50 || strings.ContainsRune(got, '\ufffd') {
			t.Errorf("event %q, want %q", got, tc.event)
		}
		now, err := client.CoreV1().Pods("ns").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range now.Status.Conditions {
			if c.Type == ConditionVMHealthy {
				got = append(got, string(c.Status)+" "+c.Reason+" "+c.Message)
			}
		}
		if len(now.Status.Conditions) != 2 || strings.Join(got, "; ") != tc.condition {
			t.Errorf("conditions %+v, want %q", now.Status.Conditions, tc.condition)
		}
	}
}

func TestNoticesAreShown(t *testing.T) {
	events := record.NewFakeRecorder(1)
	tellNotice(events, vmpod.Notice{PodUID: "u1", Namespace: "ns", Name: "web", Reason: vmpod.ReasonImageDamaged, Message: "100% of it"})
	if got, want := <-events.Events, "Warning ImageDamaged 100% of it"; got != want {
		t.Errorf("event %q, want %q", got, want)
	}
}
