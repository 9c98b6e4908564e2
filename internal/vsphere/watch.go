package vsphere

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	// waitSeconds is how long one WaitForUpdatesEx stays at vCenter when nothing
	// changes: a call every two minutes keeps the session, which vCenter ends
	// after 30 idle ones, and finds a connection that died unseen.
	waitSeconds = 120
	// waitGrace is what an answer may take longer than that.
	waitGrace = 30 * time.Second
	backOff   = time.Second // before the watch is set up anew, doubled up to
	maxBack   = time.Minute
	// gather is how long changes are let gather while they come one upon the
	// other: each answer costs vCenter and us a call, however little is in it.
	gather = 50 * time.Millisecond
	// gatherTasks is that while somebody waits for a task: the next one may not
	// begin before. Their few changes bound the calls.
	gatherTasks = 5 * time.Millisecond
	// maxEnded tasks are remembered: one that leaves the view and comes back at
	// once is no change that vCenter would tell.
	maxEnded = 256
)

// An Update is what changed of one object since the last one: all watched
// properties that it has when it came, those that changed later. A property
// that is nil was unset, or may not be read.
type Update struct {
	Object types.ManagedObjectReference
	Gone   bool
	Hidden bool // some of its properties may not be read
	Props  map[string]types.AnyType
}

// A Viewer keeps what a Watch sees. Its methods are called one at a time.
type Viewer interface {
	// Replace gives all objects that there are: at first, and each time the
	// watch was set up anew.
	Replace(all []Update)
	// Apply gives what changed since.
	Apply(changes []Update)
	// Lost says that changes go unseen from now on, until the next Replace.
	Lost(err error)
}

// WatchConfig says what is watched.
type WatchConfig struct {
	Types map[string][]string // managed object type → properties
	// Setup runs before each Replace, in the new session. Optional.
	Setup func(context.Context) error
}

// A Watch sees every change of the objects of some types, wherever they are in
// the inventory, through one PropertyCollector: nothing is polled. It also
// hears how tasks end.
type Watch struct {
	session *Session
	config  WatchConfig
	viewer  Viewer

	mu      sync.Mutex
	tasks   map[types.ManagedObjectReference]*waiting // until they end, whoever still waits
	ended   map[types.ManagedObjectReference]*waiting // the last maxEnded
	order   []types.ManagedObjectReference            // of ended
	list    *types.ManagedObjectReference             // the view of tasks; nil: not connected
	add     []types.ManagedObjectReference
	remove  []types.ManagedObjectReference
	sending bool
	awaited chan struct{}           // closed when somebody begins to wait for a task; nil: no pause heeds it
	abort   context.CancelCauseFunc // of the connection that list is of
	heard   time.Time
}

// NewWatch makes no call; Run does.
func NewWatch(s *Session, c WatchConfig, v Viewer) *Watch {
	return &Watch{session: s, config: c, viewer: v, tasks: map[types.ManagedObjectReference]*waiting{},
		ended: map[types.ManagedObjectReference]*waiting{}}
}

// Heard is when vCenter last answered the watch; within 150 s of now while all
// is well.
func (w *Watch) Heard() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.heard
}

// Run watches until ctx is done, and returns nil then. What is lost meanwhile
// is set up anew with back-off.
func (w *Watch) Run(ctx context.Context) error {
	delay := backOff
	for {
		synced, err := w.once(ctx)
		w.disconnected()
		if ctx.Err() != nil {
			return nil
		}
		w.viewer.Lost(err)
		if synced {
			delay = backOff
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay/2 + rand.N(delay)):
		}
		delay = min(2*delay, maxBack)
	}
}

// once watches in one session until that breaks. synced tells whether it got as
// far as a Replace.
func (w *Watch) once(ctx context.Context) (synced bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := w.session.Login(ctx); err != nil {
		return false, err
	}
	if w.config.Setup != nil {
		if err := w.config.Setup(ctx); err != nil {
			return false, err
		}
	}
	made, err := methods.CreatePropertyCollector(ctx, w.session, &types.CreatePropertyCollector{This: w.session.client.ServiceContent.PropertyCollector})
	if err != nil {
		return false, Error("watch vCenter "+w.session.Address(), err)
	}
	pc := made.Returnval
	// A wait in a session that another call has found gone may never be answered.
	// The calls before were made in a new one where the old one was gone.
	defer context.AfterFunc(w.session.current(), func() { cancel(errSessionReplaced) })()
	views, err := w.create(ctx, pc)
	if err != nil {
		return false, Error("watch vCenter "+w.session.Address(), err)
	}
	defer w.destroy(context.WithoutCancel(ctx), pc, views)
	login := w.session.Logins()

	var first []Update
	var pace pacer
	version := ""
	for {
		set, err := w.wait(ctx, pc, version)
		if err != nil {
			if NotAuthenticated(err) {
				w.session.dropped(login)
			}
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return synced, Error("watch vCenter "+w.session.Address(), err)
		}
		w.mu.Lock()
		w.heard = time.Now()
		w.mu.Unlock()
		if set == nil {
			continue
		}
		version = set.Version
		updates := w.split(set)
		if synced {
			w.viewer.Apply(updates)
			w.pause(ctx, pace.next(time.Now()))
			continue
		}
		first = append(first, updates...)
		if set.Truncated == nil || !*set.Truncated {
			w.viewer.Replace(first)
			first, synced = nil, true
			w.connected(ctx, views[1], cancel)
		}
	}
}

// errSessionReplaced is why a watch begins anew.
var errSessionReplaced = fmt.Errorf("vCenter dropped the session, and there is another: %w", errdefs.ErrUnavailable)

// A pacer knows when the last answer came.
type pacer struct{ last time.Time }

// next is how long to pause after the answer that came now: not at all after a
// lone one.
func (p *pacer) next(now time.Time) time.Duration {
	since := now.Sub(p.last)
	p.last = now
	if since < 2*gather {
		return gather
	}
	return 0
}

// pause lasts d, or gatherTasks from when somebody waits for a task. It returns
// early when ctx ends.
func (w *Watch) pause(ctx context.Context, d time.Duration) {
	if d == 0 {
		return
	}
	w.mu.Lock()
	awaited := make(chan struct{})
	if len(w.tasks) > 0 {
		close(awaited)
	} else {
		w.awaited = awaited
	}
	w.mu.Unlock()
	end := time.After(d)
	select {
	case <-ctx.Done():
		return
	case <-end:
		return
	case <-awaited:
	}
	select {
	case <-ctx.Done():
	case <-end:
	case <-time.After(gatherTasks):
	}
}

// create makes the collector's two views, of the inventory and of tasks.
func (w *Watch) create(ctx context.Context, pc types.ManagedObjectReference) (views []types.ManagedObjectReference, err error) {
	content := w.session.client.ServiceContent
	inventory, err := methods.CreateContainerView(ctx, w.session, &types.CreateContainerView{
		This: *content.ViewManager, Container: content.RootFolder, Recursive: true,
		Type: slices.Sorted(maps.Keys(w.config.Types)),
	})
	if err != nil {
		return nil, err
	}
	views = append(views, inventory.Returnval)
	tasks, err := methods.CreateListView(ctx, w.session, &types.CreateListView{This: *content.ViewManager})
	if err != nil {
		return views, err
	}
	views = append(views, tasks.Returnval)
	for _, spec := range []types.PropertyFilterSpec{
		filter(views[0], "ContainerView", w.config.Types),
		filter(views[1], "ListView", map[string][]string{"Task": {"info.state", "info.error", "info.result"}}),
	} {
		if _, err := methods.CreateFilter(ctx, w.session, &types.CreateFilter{This: pc, Spec: spec}); err != nil {
			return views, err
		}
	}
	return views, nil
}

// filter reads the properties of what a view holds, and nothing of the view.
func filter(view types.ManagedObjectReference, kind string, props map[string][]string) types.PropertyFilterSpec {
	skip := true
	spec := types.PropertyFilterSpec{ObjectSet: []types.ObjectSpec{{
		Obj:  view,
		Skip: &skip,
		SelectSet: []types.BaseSelectionSpec{&types.TraversalSpec{
			Type: kind,
			Path: "view",
		}},
	}}}
	for _, t := range slices.Sorted(maps.Keys(props)) {
		spec.PropSet = append(spec.PropSet, types.PropertySpec{Type: t, PathSet: props[t]})
	}
	return spec
}

func (w *Watch) destroy(ctx context.Context, pc types.ManagedObjectReference, views []types.ManagedObjectReference) {
	// They die with the session; an error here changes nothing.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if _, err := methods.DestroyPropertyCollector(ctx, direct{w.session}, &types.DestroyPropertyCollector{This: pc}); err != nil {
		return
	}
	for _, v := range views {
		if _, err := methods.DestroyView(ctx, direct{w.session}, &types.DestroyView{This: v}); err != nil {
			return
		}
	}
}

// wait is one WaitForUpdatesEx. It is nil when nothing changed. It does not log
// in again: the collector is gone with its session.
func (w *Watch) wait(ctx context.Context, pc types.ManagedObjectReference, version string) (*types.UpdateSet, error) {
	ctx, cancel := context.WithTimeout(ctx, waitSeconds*time.Second+waitGrace)
	seconds := int32(waitSeconds)
	defer cancel()
	res, err := methods.WaitForUpdatesEx(ctx, direct{w.session}, &types.WaitForUpdatesEx{
		This: pc, Version: version, Options: &types.WaitOptions{MaxWaitSeconds: &seconds},
	})
	if err != nil {
		return nil, err
	}
	return res.Returnval, nil
}

// split takes out what is of tasks.
func (w *Watch) split(set *types.UpdateSet) []Update {
	var updates []Update
	for _, f := range set.FilterSet {
		for _, o := range f.ObjectSet {
			u := Update{Object: o.Obj, Gone: o.Kind == types.ObjectUpdateKindLeave, Props: make(map[string]types.AnyType, len(o.ChangeSet))}
			for _, m := range o.MissingSet {
				if f, ok := asFault(m.Fault.Fault).(types.BaseNoPermission); ok && f != nil {
					u.Hidden = true
				}
			}
			for _, c := range o.ChangeSet {
				u.Props[c.Name] = c.Val
			}
			if o.Obj.Type == "Task" {
				w.taskChanged(u)
				continue
			}
			updates = append(updates, u)
		}
	}
	return updates
}

// direct sends in the session that there is, logged in or not.
type direct struct{ *Session }

func (d direct) RoundTrip(ctx context.Context, req, res soapBody) error { return d.send(ctx, req, res) }

// A waiting is whoever waits for one task.
type waiting struct {
	done    chan struct{}
	state   types.TaskInfoState
	failure *types.LocalizedMethodFault
	result  types.AnyType
	unknown error // vCenter no longer knows the task
}

// task starts to listen for the end of a task. Several may.
func (w *Watch) task(ctx context.Context, ref types.ManagedObjectReference) *waiting {
	w.mu.Lock()
	t := w.ended[ref]
	if t == nil {
		t = w.tasks[ref]
	}
	if t == nil {
		t = &waiting{done: make(chan struct{})}
		w.tasks[ref] = t
		w.add = append(w.add, ref)
		if w.awaited != nil {
			close(w.awaited)
			w.awaited = nil
		}
	}
	w.mu.Unlock()
	w.flush(context.WithoutCancel(ctx))
	return t
}

// flush tells vCenter which tasks to watch: one call for all that came while
// the last one was under way.
func (w *Watch) flush(ctx context.Context) {
	for {
		w.mu.Lock()
		if w.sending || w.list == nil || len(w.add) == 0 {
			w.mu.Unlock()
			return
		}
		list, add, remove := *w.list, w.add, w.remove
		w.add, w.remove, w.sending = nil, nil, true
		w.mu.Unlock()
		res, err := methods.ModifyListView(ctx, direct{w.session}, &types.ModifyListView{This: list, Add: add, Remove: remove})
		w.mu.Lock()
		w.sending = false
		if err != nil {
			// Begin anew: connected adds all tasks that somebody waits for.
			if w.list != nil && *w.list == list {
				w.list = nil
				w.abort(err)
			}
			w.mu.Unlock()
			return
		}
		for _, ref := range res.Returnval {
			if t := w.tasks[ref]; t != nil {
				t.unknown = fmt.Errorf("vCenter no longer knows task %s: how it ended is unknown: %w", ref.Value, errdefs.ErrUnavailable)
				w.finish(ref, t)
			}
		}
		w.mu.Unlock()
	}
}

// finish ends a wait, with w.mu held.
func (w *Watch) finish(ref types.ManagedObjectReference, t *waiting) {
	close(t.done)
	delete(w.tasks, ref)
	w.remove = append(w.remove, ref) // goes with the next addition
	if t.unknown != nil {
		return
	}
	w.ended[ref] = t
	w.order = append(w.order, ref)
	if len(w.order) > maxEnded {
		delete(w.ended, w.order[0])
		w.order = w.order[1:]
	}
}

func (w *Watch) taskChanged(u Update) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := w.tasks[u.Object]
	if t == nil || u.Gone {
		return
	}
	if s, ok := u.Props["info.state"].(types.TaskInfoState); ok {
		t.state = s
	}
	if v, ok := u.Props["info.error"].(types.LocalizedMethodFault); ok {
		t.failure = &v
	}
	if v, ok := u.Props["info.result"]; ok {
		t.result = v
	}
	if t.state == types.TaskInfoStateSuccess || t.state == types.TaskInfoStateError {
		w.finish(u.Object, t)
	}
}

// connected has the tasks that somebody waits for watched in the new view.
func (w *Watch) connected(ctx context.Context, list types.ManagedObjectReference, abort context.CancelCauseFunc) {
	w.mu.Lock()
	w.list, w.abort, w.remove = &list, abort, nil
	w.add = slices.Collect(maps.Keys(w.tasks))
	w.mu.Unlock()
	w.flush(ctx)
}

func (w *Watch) disconnected() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.list = nil
}
