package controlplane

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vmware/govmomi/event"
	"github.com/vmware/govmomi/vim25/types"
	eventsv1 "k8s.io/api/events/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A change is what somebody does on either side, behind the other's back.
type change struct {
	name string
	act  func(t *testing.T) error
	// reason of Synced=False and of the event; text is part of what both sides'
	// events say.
	reason, text string
	// done is nil once it is mended or adopted.
	done func() error
}

// told makes a change to a namespace with one pool, and holds that both sides
// tell of it, that Synced is False until it is mended and True then, and that
// nothing is there twice.
func (n *namespacesTest) told(t *testing.T, name string, c change) {
	t.Helper()
	t.Run(c.name, func(t *testing.T) {
		n.synced(t, name)
		n.one(t, name)
		h := n.follow(t, name)
		events, posts := n.events(t, name, c.reason, c.text), n.posts(t, name, c.text)
		if err := c.act(t); err != nil {
			t.Fatal(err)
		}
		h.saw(t, metav1.ConditionFalse, c.reason, c.text)
		if c.done != nil {
			eventually(t, "it is as it should be", c.done)
		}
		eventually(t, "Synced is True again", func() error { return h.now(metav1.ConditionTrue) })
		eventually(t, "Kubernetes has an event", func() error {
			if n.events(t, name, c.reason, c.text) <= events {
				return fmt.Errorf("none of reason %s with %q", c.reason, c.text)
			}
			return nil
		})
		eventually(t, "the pool has an event", func() error {
			if now := n.posts(t, name, c.text); len(now) <= len(posts) {
				return fmt.Errorf("none with %q: there are %q", c.text, n.posts(t, name, ""))
			}
			return nil
		})
		n.one(t, name)
	})
}

// A history is what Synced of one object was, one after the other.
type history struct {
	mu   sync.Mutex
	seen []metav1.Condition
}

// follow watches a SupervisorNamespace until the test's end, from now on.
func (n *namespacesTest) follow(t *testing.T, name string) *history {
	t.Helper()
	return followed(t, n, name, v1alpha1.ConditionSynced, &v1alpha1.SupervisorNamespaceList{}, func(o any) []metav1.Condition {
		if ns, ok := o.(*v1alpha1.SupervisorNamespace); ok {
			return ns.Status.Conditions
		}
		return nil
	})
}

func followed(t *testing.T, n *namespacesTest, name, kind string, list client.ObjectList, conditions func(any) []metav1.Condition) *history {
	t.Helper()
	c, err := client.NewWithWatch(restFrom(t, n.cfg.Kubeconfig()), client.Options{Scheme: n.admin.Scheme()})
	if err != nil {
		t.Fatal(err)
	}
	w, err := c.Watch(t.Context(), list, client.MatchingFields{"metadata.name": name})
	if err != nil {
		t.Fatal(err)
	}
	h, done := &history{}, make(chan struct{})
	started := make(chan struct{})
	go func() {
		defer close(done)
		first := true
		for e := range w.ResultChan() {
			if e.Type != watch.Added && e.Type != watch.Modified {
				continue
			}
			if c := meta.FindStatusCondition(conditions(e.Object), kind); c != nil {
				h.mu.Lock()
				h.seen = append(h.seen, *c)
				h.mu.Unlock()
			}
			if first {
				first = false
				close(started)
			}
		}
	}()
	<-started
	t.Cleanup(func() { w.Stop(); <-done })
	return h
}

func (h *history) all() []metav1.Condition {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.seen)
}

// saw waits until the condition has had a status.
func (h *history) saw(t *testing.T, status metav1.ConditionStatus, reason, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("the condition is %s %s", status, reason), func() error {
		for _, c := range h.all() {
			if c.Status == status && c.Reason == reason && strings.Contains(c.Message, text) {
				return nil
			}
		}
		return fmt.Errorf("it was %+v", h.all())
	})
}

// now is nil if the last that was seen has the status.
func (h *history) now(status metav1.ConditionStatus) error {
	all := h.all()
	if c := all[len(all)-1]; c.Status != status {
		return fmt.Errorf("it is %+v", c)
	}
	return nil
}

// events counts Kubernetes' events about an object.
func (n *namespacesTest) events(t *testing.T, name, reason, text string) int {
	t.Helper()
	list := &eventsv1.EventList{}
	if err := n.admin.List(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, e := range list.Items {
		if e.Reason != reason || e.Regarding.Name != name || !strings.Contains(e.Note, text) {
			continue
		}
		total++
		if e.Series != nil {
			total += int(e.Series.Count)
		}
	}
	return total
}

// posts are Atoll's events with a text on pools that are, or were, called so.
func (n *namespacesTest) posts(t *testing.T, pool, text string) (found []string) {
	t.Helper()
	all, err := event.NewManager(n.vim.Client).QueryEvents(t.Context(), types.EventFilterSpec{MaxCount: 1000, EventTypeId: []string{"dev.atoll.namespace"}})
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	for _, p := range n.vsphere(t, pool).pools {
		own[p.Self.Value] = true
	}
	for _, e := range all {
		x, ok := e.(*types.EventEx)
		if ok && (own[x.ObjectId] || x.ObjectName == pool) && strings.HasPrefix(x.Message, "Atoll: ") && strings.Contains(x.Message, text) {
			found = append(found, x.ObjectName+": "+x.Message)
		}
	}
	return found
}
