package namespaces

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// later counts what is put off.
type later struct {
	workqueue.TypedRateLimitingInterface[reconcile.Request]
	after int
}

func (q *later) AddAfter(reconcile.Request, time.Duration) { q.after++ }

// An object that is new is looked at later, and not at all where it was there at
// the start; one that changed or is gone at once, for whom it was and is.
func TestMade(t *testing.T) {
	labelled := func(name string) *corev1.LimitRange {
		return &corev1.LimitRange{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"of": name}}}
	}
	h := made(func(o client.Object) []reconcile.Request {
		if name := o.GetLabels()["of"]; name != "" {
			return request(name)
		}
		return nil
	})
	for _, c := range []struct {
		name       string
		tell       func(handler.EventHandler, *later)
		now, after int
	}{
		{"new", func(h handler.EventHandler, q *later) {
			h.Create(t.Context(), event.CreateEvent{Object: labelled("shop")}, q)
		}, 0, 1},
		{"there at the start", func(h handler.EventHandler, q *later) {
			h.Create(t.Context(), event.CreateEvent{Object: labelled("shop"), IsInInitialList: true}, q)
		}, 0, 0},
		{"lost its label", func(h handler.EventHandler, q *later) {
			h.Update(t.Context(), event.UpdateEvent{ObjectOld: labelled("shop"), ObjectNew: labelled("")}, q)
		}, 1, 0},
		{"got another", func(h handler.EventHandler, q *later) {
			h.Update(t.Context(), event.UpdateEvent{ObjectOld: labelled("shop"), ObjectNew: labelled("till")}, q)
		}, 2, 0},
		{"gone", func(h handler.EventHandler, q *later) {
			h.Delete(t.Context(), event.DeleteEvent{Object: labelled("shop")}, q)
		}, 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := &later{TypedRateLimitingInterface: workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[reconcile.Request]())}
			defer q.ShutDown()
			c.tell(h, q)
			if q.Len() != c.now || q.after != c.after {
				t.Errorf("%d at once and %d later, want %d and %d", q.Len(), q.after, c.now, c.after)
			}
		})
	}
}
