package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
)

// auditor answers as told.
type auditor struct {
	state   storage.ComplianceState
	message string
	err     error
}

func (a auditor) Compliance(context.Context, string) (storage.Compliance, error) {
	return storage.Compliance{State: a.state, Message: a.message}, a.err
}

func TestAudit(t *testing.T) {
	const by = v1alpha1.AnnotationPolicyComplianceBy
	says := func(state, reason, node string) map[string]string {
		m := map[string]string{v1alpha1.AnnotationPolicyCompliance: state, by: node}
		if reason != "" {
			m[v1alpha1.AnnotationPolicyComplianceReason] = reason
		}
		return m
	}
	gone := fmt.Errorf("volume id: %w", errdefs.ErrNotFound)
	for name, tc := range map[string]struct {
		host   string
		before map[string]string
		answer auditor
		want   map[string]string
		event  string // in it; empty: none
	}{
		"the first look":           {"n1", nil, auditor{state: storage.Compliant}, says("Compliant", "", "n1"), ""},
		"a breach":                 {"n1", says("Compliant", "", "n1"), auditor{state: storage.NonCompliant, message: "thin"}, says("NonCompliant", "thin", "n1"), "Warning PolicyNotCompliant volume pv is not kept as its storage policy says: thin"},
		"over":                     {"n1", says("NonCompliant", "thin", "n1"), auditor{state: storage.Compliant}, says("Compliant", "", "n1"), "Normal PolicyCompliant"},
		"said already":             {"n1", says("NonCompliant", "thin", "n1"), auditor{state: storage.NonCompliant, message: "thin"}, says("NonCompliant", "thin", "n1"), ""},
		"another reason":           {"n1", says("NonCompliant", "thin", "n1"), auditor{state: storage.NonCompliant, message: "gone"}, says("NonCompliant", "gone", "n1"), "gone"},
		"not known":                {"n1", says("Compliant", "", "n1"), auditor{state: storage.ComplianceUnknown, message: "away"}, says("Unknown", "away", "n1"), "Warning PolicyComplianceUnknown"},
		"an error":                 {"n1", nil, auditor{err: errors.New("broken")}, says("Unknown", "broken", "n1"), "broken"},
		"no such volume":           {"n1", nil, auditor{err: gone}, says("NonCompliant", "its datastore has no such volume: volume id: not found", "n1"), "PolicyNotCompliant"},
		"of another node":          {"n2", nil, auditor{state: storage.NonCompliant, message: "thin"}, nil, ""},
		"another works and says":   {"n1", says("Compliant", "", "works"), auditor{state: storage.ComplianceUnknown, message: "away"}, says("Compliant", "", "works"), ""},
		"another is lost and said": {"n1", says("Compliant", "", "lost"), auditor{state: storage.NonCompliant, message: "thin"}, says("NonCompliant", "thin", "n1"), "thin"},
	} {
		t.Run(name, func(t *testing.T) {
			pv := pvOf("64Mi", tc.host)
			pv.UID, pv.Annotations = "pv-uid", maps.Clone(tc.before)
			pv.Spec.ClaimRef.Namespace, pv.Spec.ClaimRef.Name = "ns", "data"
			g := newGroup(t, &driver{}, nil, pv)
			g.Auditor = tc.answer
			ready := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "works"}, Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}}}
			if _, err := g.client.CoreV1().Nodes().Create(t.Context(), ready, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := newAuditController(g).pass(t.Context()); err != nil {
				t.Fatal(err)
			}
			got, err := g.client.CoreV1().PersistentVolumes().Get(t.Context(), "pv", metav1.GetOptions{})
			if err != nil || !maps.Equal(got.Annotations, tc.want) {
				t.Errorf("annotations %v, want %v (%v)", got.Annotations, tc.want, err)
			}
			select {
			case e := <-g.events.(*record.FakeRecorder).Events:
				if tc.event == "" || !strings.Contains(e, tc.event) {
					t.Errorf("event %q, want %q", e, tc.event)
				}
			default:
				if tc.event != "" {
					t.Errorf("no event, want %q", tc.event)
				}
			}
		})
	}
}

// hanging answers when it is let go.
type hanging chan storage.Compliance

func (h hanging) Compliance(context.Context, string) (storage.Compliance, error) { return <-h, nil }

// A datastore that hangs costs one question, and is asked again once it has
// answered.
func TestAuditOfADatastoreThatHangs(t *testing.T) {
	h := make(hanging)
	g := newGroup(t, &driver{}, nil, nil)
	g.Auditor = h
	a := newAuditController(g)
	open := make(chan storage.Compliance, 1)
	a.asked["ds"] = open // a question whose time is over
	if c := a.judge(t.Context(), "ds.v-1"); c.State != storage.ComplianceUnknown || !strings.Contains(c.Message, "does not answer") {
		t.Errorf("%+v", c)
	}
	open <- storage.Compliance{}
	go func() { h <- storage.Compliance{State: storage.Compliant} }()
	if c := a.judge(t.Context(), "ds.v-1"); c.State != storage.Compliant {
		t.Errorf("%+v", c)
	}
}
