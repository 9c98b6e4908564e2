package namespaces

import (
	"context"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

// tell says on both sides what somebody changed, before anything is done about
// it: Synced is False until a pass has found all well. It is not fresh where
// passes before this one have told it already and could not mend it.
func (p *pass) tell(ctx context.Context, reason, message string) (fresh bool, err error) {
	if !slices.Contains(p.toldBefore(), message) {
		p.note(v1alpha1.SeverityWarning, reason, message)
		p.setSynced(metav1.ConditionFalse, reason, message)
		p.setMessages()
		if err := p.writeStatus(ctx); err != nil {
			return false, err
		}
		p.event(corev1.EventTypeWarning, reason, "Reconcile", "%s", clip(message, maxText))
		p.posts = append(p.posts, message)
		fresh = true
	}
	p.found = append(p.found, message)
	return fresh, nil
}

func (p *pass) toldBefore() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.told[p.ns.Name]
}

// keepTold remembers what this pass found, unless all is well at its end: the
// same may come to be once more, and is told then.
func (p *pass) keepTold(ended bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	found := p.found
	if !ended {
		found = append(found, p.told[p.ns.Name]...)
	}
	if len(found) == 0 || ended && len(p.problems) == 0 {
		delete(p.told, p.ns.Name)
		return
	}
	p.told[p.ns.Name] = found
}

// post puts what was told on the pools, where administrators read it: at the end
// of a pass, when a pool that was deleted is there again. Failing is no reason to
// stop: the status has it.
func (p *pass) post(ctx context.Context) {
	if len(p.posts) == 0 {
		return
	}
	vcenter, err := p.conn.client()
	if err != nil {
		return
	}
	for _, message := range p.posts {
		if err := vcenter.Post(ctx, p.ref(), vc.Event{Severity: vc.EventWarning, Message: clip("Atoll: "+message, 1000)}); err != nil {
			p.log.Warn("event not posted in vSphere", "namespace", p.ns.Name, "error", err)
		}
	}
}

// stood tells whether the Kubernetes side was complete as the spec is now:
// what lacks, somebody took away.
func (p *pass) stood() bool {
	c := meta.FindStatusCondition(p.before.Status.Conditions, v1alpha1.ConditionReady)
	return c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == p.ns.Generation
}

// missing tells of an object that is to be there and is not, if somebody deleted
// it; o has its name.
func (p *pass) missing(ctx context.Context, reason, kind string, o client.Object) error {
	if !p.stood() {
		return nil
	}
	err := p.live.Get(ctx, client.ObjectKeyFromObject(o), o.DeepCopyObject().(client.Object)) //nolint:forcetypeassert // a copy of one
	if err == nil {
		return lagging(kind, o.GetName())
	}
	if !apierrors.IsNotFound(err) {
		return err
	}
	_, err = p.tell(ctx, reason, fmt.Sprintf("somebody deleted %s %s/%s: made again", kind, o.GetNamespace(), o.GetName()))
	return err
}

// lagging is a conflict: the cache has not seen yet what the API server has.
func lagging(kind, name string) error {
	return apierrors.NewConflict(schema.GroupResource{Resource: kind}, name, fmt.Errorf("the cache has not seen it yet"))
}
