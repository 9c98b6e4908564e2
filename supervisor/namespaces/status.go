package namespaces

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// maxMessages in a status; maxText bytes in each.
const (
	maxMessages = 10
	maxText     = 1024
)

// note keeps a message for people in the status, the newest first.
func (p *pass) note(severity v1alpha1.MessageSeverity, reason, text string) {
	p.notes = append(p.notes, v1alpha1.Message{Severity: severity, Reason: reason, Text: clip(text, maxText), Time: metav1.NewTime(p.now())})
}

// finish writes the status and says when to look again.
func (p *pass) finish(ctx context.Context) (reconcile.Result, error) {
	st := &p.ns.Status
	st.ObservedGeneration, st.Template = p.ns.Generation, p.ns.Labels[v1alpha1.LabelTemplate]
	p.conclude()
	if p.onlyUsage() {
		if wait := usageEvery - p.now().Sub(p.conn.lastUsage(p.ns.Name)); wait > 0 {
			return reconcile.Result{RequeueAfter: wait}, nil
		}
		p.conn.setLastUsage(p.ns.Name, p.now())
	}
	if err := p.writeStatus(ctx); err != nil {
		return reconcile.Result{}, err
	}
	if p.retry {
		return reconcile.Result{RequeueAfter: p.backoff(p.ns.Name)}, nil
	}
	p.succeeded(p.ns.Name)
	return reconcile.Result{}, nil
}

// onlyUsage tells whether nothing in the status changed but what pods use.
func (p *pass) onlyUsage() bool {
	a, b := p.before.Status.DeepCopy(), p.ns.Status.DeepCopy()
	if equality.Semantic.DeepEqual(a, b) {
		return false
	}
	a.Usage, b.Usage = nil, nil
	return equality.Semantic.DeepEqual(a, b)
}

// conclude sets conditions and messages from what the pass found.
func (p *pass) conclude() {
	switch {
	case len(p.problems) == 0:
		p.setSynced(metav1.ConditionTrue, v1alpha1.ReasonSynced, "vSphere and Kubernetes are as the spec has it")
	default:
		worst := p.problems[0]
		status := metav1.ConditionFalse
		if !slices.ContainsFunc(p.problems, func(x problem) bool { return !x.unknown }) {
			status = metav1.ConditionUnknown
		}
		var texts []string
		for _, x := range p.problems {
			texts = append(texts, x.text)
		}
		p.setSynced(status, worst.reason, strings.Join(texts, "; "))
	}
	ready := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonSynced, Message: "the namespace can be used", ObservedGeneration: p.ns.Generation}
	if !p.usable {
		ready.Status, ready.Reason, ready.Message = metav1.ConditionFalse, v1alpha1.ReasonProgressing, "the namespace is being made"
		if len(p.problems) > 0 {
			ready.Reason, ready.Message = p.problems[0].reason, clip(p.problems[0].text, maxText)
		}
	}
	meta.SetStatusCondition(&p.ns.Status.Conditions, ready)
	p.setMessages()
}

func (p *pass) setSynced(status metav1.ConditionStatus, reason, message string) {
	c := metav1.Condition{Type: v1alpha1.ConditionSynced, Status: status, Reason: reason, Message: clip(message, maxText), ObservedGeneration: p.ns.Generation}
	old := meta.FindStatusCondition(p.ns.Status.Conditions, c.Type)
	changed := old == nil || old.Status != status || old.Reason != reason
	meta.SetStatusCondition(&p.ns.Status.Conditions, c)
	switch {
	case !changed || reason == v1alpha1.ReasonDrift || reason == v1alpha1.ReasonQuotaEdited: // tell has told
	case old == nil && status == metav1.ConditionTrue: // made as it should be: no news
	case status == metav1.ConditionTrue:
		p.event(corev1.EventTypeNormal, reason, "Reconcile", "%s", message)
	case reason == v1alpha1.ReasonDeleting || reason == v1alpha1.ReasonDraining:
	default:
		p.event(corev1.EventTypeWarning, reason, "Reconcile", "%s", clip(message, maxText))
		if status == metav1.ConditionFalse {
			p.posts = append(p.posts, message)
		}
	}
}

// setMessages keeps what happened, and what is wrong for as long as it is.
func (p *pass) setMessages() {
	old := p.ns.Status.Messages
	out := slices.Clone(p.notes)
	for _, x := range p.problems {
		severity := v1alpha1.SeverityError
		if x.unknown {
			severity = v1alpha1.SeverityWarning
		}
		m := v1alpha1.Message{Severity: severity, Reason: x.reason, Text: clip(x.text, maxText), Time: metav1.NewTime(p.now())}
		for _, o := range old {
			if o.Reason == m.Reason && o.Text == m.Text {
				m.Time = o.Time
			}
		}
		out = append(out, m)
	}
	for _, o := range old {
		if happened(o) && !slices.ContainsFunc(out, func(m v1alpha1.Message) bool { return m.Reason == o.Reason && m.Text == o.Text }) {
			out = append(out, o)
		}
	}
	slices.SortStableFunc(out, func(a, b v1alpha1.Message) int { return b.Time.Compare(a.Time.Time) })
	p.ns.Status.Messages = out[:min(len(out), maxMessages)]
}

// happened tells what is over, and worth knowing still, from what is wrong.
func happened(m v1alpha1.Message) bool {
	return m.Reason == v1alpha1.ReasonDrift || m.Reason == v1alpha1.ReasonQuotaEdited
}

// writeStatus writes the status if it changed. It fails with a conflict rather
// than overwrite what it has not seen.
func (p *pass) writeStatus(ctx context.Context) error {
	if equality.Semantic.DeepEqual(p.before.Status, p.ns.Status) {
		return nil
	}
	// An update: a patch, which has the API server encode, merge and decode the
	// whole, costs it twice as much.
	if err := p.client.Status().Update(ctx, p.ns); err != nil {
		return fmt.Errorf("status of namespace %s: %w", p.ns.Name, err)
	}
	p.wrote(p.ns)
	p.before = p.ns.DeepCopy()
	return nil
}

// notReady is an object's Ready condition where it is false.
func notReady(conditions []metav1.Condition) *metav1.Condition {
	c := meta.FindStatusCondition(conditions, v1alpha1.ConditionReady)
	if c == nil || c.Status != metav1.ConditionFalse {
		return nil
	}
	return c
}
