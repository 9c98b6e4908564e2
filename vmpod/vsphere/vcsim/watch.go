package vcsim

import (
	"sync"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// The simulator's own WaitForUpdatesEx polls, walks the whole inventory for
// each change, shares one list of changes between sessions, and lets it grow
// while nobody asks. Here the registry's callbacks mark objects, a watch that
// is waiting wakes up, reads the marked objects alone, and sends what differs
// from what it sent before.

// maxDirty is how many marked objects a watch remembers; after more it reads
// everything anew.
const maxDirty = 20_000

// A hub hears of every change in the registry and marks the object in every
// watch. It is called with objects' locks held: it takes none but its own.
type hub struct {
	mu      sync.Mutex
	watches map[*watch]bool
	tasks   []types.ManagedObjectReference // in the order of their making
}

// Reference makes it a simulator.RegisterObject.
func (*hub) Reference() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "AtollHub", Value: "hub"}
}

func (h *hub) PutObject(_ *simulator.Context, o mo.Reference) { h.mark(o.Reference()) }

func (h *hub) UpdateObject(_ *simulator.Context, o mo.Reference, _ []types.PropertyChange) {
	h.mark(o.Reference())
}

func (h *hub) RemoveObject(_ *simulator.Context, ref types.ManagedObjectReference) { h.mark(ref) }

func (h *hub) mark(ref types.ManagedObjectReference) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range h.watches {
		w.mark(ref)
	}
}

func (h *hub) add(w *watch) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watches[w] = true
}

func (h *hub) remove(w *watch) {
	h.mu.Lock()
	delete(h.watches, w)
	h.mu.Unlock()
	w.end()
}

// removeSession ends the watches of a session.
func (h *hub) removeSession(key string) {
	h.mu.Lock()
	var mine []*watch
	for w := range h.watches {
		if w.session == key {
			mine = append(mine, w)
		}
	}
	h.mu.Unlock()
	for _, w := range mine {
		h.remove(w)
	}
}

// A watch is what one property collector knows of changes.
type watch struct {
	session string
	changed chan struct{} // holds one when there is something to look at

	mu        sync.Mutex
	dirty     map[types.ManagedObjectReference]bool
	all       bool // too many to remember
	cancelled chan struct{}
	ended     bool // cancelled stays closed: nobody marks anything any more
}

func newWatch(session string) *watch {
	return &watch{session: session, changed: make(chan struct{}, 1), dirty: map[types.ManagedObjectReference]bool{}, cancelled: make(chan struct{})}
}

func (w *watch) mark(refs ...types.ManagedObjectReference) {
	w.mu.Lock()
	if !w.all {
		for _, ref := range refs {
			w.dirty[ref] = true
		}
		if len(w.dirty) > maxDirty {
			w.all = true
			clear(w.dirty)
		}
	}
	w.mu.Unlock()
	w.wake()
}

func (w *watch) wake() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// take returns the marked objects, and whether there were too many.
func (w *watch) take() (map[types.ManagedObjectReference]bool, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	dirty, all := w.dirty, w.all
	w.dirty, w.all = map[types.ManagedObjectReference]bool{}, false
	return dirty, all
}

// cancel ends the wait that is under way, and only that.
func (w *watch) cancel() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ended {
		return
	}
	close(w.cancelled)
	w.cancelled = make(chan struct{})
}

// end ends the wait that is under way and all that come: those, too, of a call
// that was let in before its session ended.
func (w *watch) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.ended {
		w.ended = true
		close(w.cancelled)
	}
}

func (w *watch) cancellation() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cancelled
}
