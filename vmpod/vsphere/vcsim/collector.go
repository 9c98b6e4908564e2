package vcsim

import (
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	// pageSize is a vCenter's own limit of objects in one update.
	pageSize = 100
	// maxFilters of one collector, maxPages that one keeps for
	// ContinueRetrievePropertiesEx.
	maxFilters = 200
	maxPages   = 16
)

// A collector is a PropertyCollector. The simulator makes one of this type for
// each session by reflection, so its zero value is ready.
type collector struct {
	simulator.PropertyCollector

	server *Server // of the one in the registry alone

	mu      sync.Mutex
	watch   *watch
	filters []*filter
	pending []types.PropertyFilterUpdate
	pages   []page
	version int
}

type page struct {
	token   string
	max     int
	objects []types.ObjectContent
}

func serverOf(ctx *simulator.Context) *Server {
	return ctx.Map.Get(ctx.Map.Get(serviceInstance).(*simulator.ServiceInstance).Content.PropertyCollector).(*collector).server
}

func (c *collector) CreatePropertyCollector(ctx *simulator.Context, _ *types.CreatePropertyCollector) soap.HasFault {
	made := &collector{}
	made.Self = types.ManagedObjectReference{Type: "PropertyCollector", Value: "session[" + ctx.Session.Key + "]" + uuid.NewString()}
	return &methods.CreatePropertyCollectorBody{Res: &types.CreatePropertyCollectorResponse{Returnval: ctx.Session.Put(made).Reference()}}
}

func (c *collector) DestroyPropertyCollector(ctx *simulator.Context, r *types.DestroyPropertyCollector) soap.HasFault {
	c.mu.Lock()
	filters, w := c.filters, c.watch
	c.filters, c.watch, c.pending, c.pages = nil, nil, nil, nil
	c.mu.Unlock()
	for _, f := range filters {
		ctx.Session.Remove(ctx, f.Self)
	}
	if w != nil {
		serverOf(ctx).hub.remove(w)
	}
	ctx.Session.Remove(ctx, r.This)
	return &methods.DestroyPropertyCollectorBody{Res: &types.DestroyPropertyCollectorResponse{}}
}

func (c *collector) CreateFilter(ctx *simulator.Context, r *types.CreateFilter) soap.HasFault {
	body := &methods.CreateFilterBody{}
	f := &filter{collector: c, sent: map[types.ManagedObjectReference]map[string]types.AnyType{}}
	f.Spec, f.PartialUpdates = r.Spec, r.PartialUpdates
	f.Self = types.ManagedObjectReference{Type: "PropertyFilter", Value: "session[" + ctx.Session.Key + "]" + uuid.NewString()}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.filters) >= maxFilters {
		body.Fault_ = simulator.Fault("too many filters", &types.InvalidState{})
		return body
	}
	ctx.Session.Put(f)
	c.filters = append(c.filters, f)
	c.Filter = append(c.Filter, f.Self)
	c.wake()
	body.Res = &types.CreateFilterResponse{Returnval: f.Self}
	return body
}

func (c *collector) drop(ctx *simulator.Context, f *filter) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.filters = slices.DeleteFunc(c.filters, func(x *filter) bool { return x == f })
	c.Filter = slices.DeleteFunc(c.Filter, func(r types.ManagedObjectReference) bool { return r == f.Self })
	c.pending = slices.DeleteFunc(c.pending, func(u types.PropertyFilterUpdate) bool { return u.Filter == f.Self })
	ctx.Session.Remove(ctx, f.Self)
}

// wake makes a wait look at filters that it does not know yet. c.mu is held.
func (c *collector) wake() {
	if c.watch != nil {
		c.watch.mu.Lock()
		c.watch.all = true
		c.watch.mu.Unlock()
		c.watch.wake()
	}
}

func (c *collector) CancelWaitForUpdates(*types.CancelWaitForUpdates) soap.HasFault {
	c.mu.Lock()
	w := c.watch
	c.mu.Unlock()
	if w != nil {
		w.cancel()
	}
	return &methods.CancelWaitForUpdatesBody{Res: &types.CancelWaitForUpdatesResponse{}}
}

// WaitForUpdatesEx returns at once if something changed since the version, or
// when something does.
func (c *collector) WaitForUpdatesEx(ctx *simulator.Context, r *types.WaitForUpdatesEx) soap.HasFault {
	body := &methods.WaitForUpdatesExBody{Res: &types.WaitForUpdatesExResponse{}}
	s := serverOf(ctx)
	limit, deadline, once := pageSize, (<-chan time.Time)(nil), false
	if o := r.Options; o != nil {
		if o.MaxWaitSeconds != nil {
			once = *o.MaxWaitSeconds == 0
			t := time.NewTimer(time.Duration(*o.MaxWaitSeconds) * time.Second)
			defer t.Stop()
			deadline = t.C
		}
		if o.MaxObjectUpdates > 0 {
			limit = min(limit, int(o.MaxObjectUpdates))
		}
	}
	w := c.begin(s, ctx.Session.Key, r.Version)
	cancelled := w.cancellation()
	for {
		set, fault := c.step(s, ctx, w, limit, r.Version == "")
		if fault != nil {
			return &methods.WaitForUpdatesExBody{Fault_: simulator.Fault("", fault)}
		}
		if set != nil || once {
			body.Res.Returnval = set
			return body
		}
		select {
		case <-w.changed:
		case <-deadline:
			return body
		case <-cancelled:
			return &methods.WaitForUpdatesExBody{Fault_: simulator.Fault("", &types.RequestCanceled{})}
		case <-s.stopping:
			return &methods.WaitForUpdatesExBody{Fault_: simulator.Fault("", &types.RequestCanceled{})}
		case <-requestOf(ctx).Context().Done():
			return body
		}
	}
}

// begin starts the watch, or starts it over for an empty version.
func (c *collector) begin(s *Server, session, version string) *watch {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.watch == nil {
		c.watch = newWatch(session)
		s.hub.add(c.watch)
		if !s.sessions.has(session) { // ended since this call was let in
			s.hub.remove(c.watch)
		}
	}
	if version == "" {
		c.pending = nil
		for _, f := range c.filters {
			clear(f.sent)
		}
		c.watch.mu.Lock()
		c.watch.all = true
		c.watch.mu.Unlock()
	}
	return c.watch
}

// step returns what there is to send now; nil: nothing. The first answer is
// never nil.
func (c *collector) step(s *Server, ctx *simulator.Context, w *watch, limit int, first bool) (*types.UpdateSet, types.BaseMethodFault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pending) == 0 {
		dirty, all := w.take()
		if all {
			dirty = nil
		} else if len(dirty) == 0 && !first {
			return nil, nil
		}
		for _, f := range c.filters {
			updates, fault := f.delta(s, ctx, dirty)
			if fault != nil {
				return nil, fault
			}
			if len(updates) > 0 {
				c.pending = append(c.pending, types.PropertyFilterUpdate{Filter: f.Self, ObjectSet: updates})
			}
		}
	}
	if len(c.pending) == 0 && !first {
		return nil, nil
	}
	return c.next(limit), nil
}

// next takes one page from what is pending.
func (c *collector) next(limit int) *types.UpdateSet {
	c.version++
	set := &types.UpdateSet{Version: versionText(c.version)}
	for limit > 0 && len(c.pending) > 0 {
		p := &c.pending[0]
		n := min(limit, len(p.ObjectSet))
		set.FilterSet = append(set.FilterSet, types.PropertyFilterUpdate{Filter: p.Filter, ObjectSet: p.ObjectSet[:n:n]})
		p.ObjectSet = p.ObjectSet[n:]
		limit -= n
		if len(p.ObjectSet) == 0 {
			c.pending = c.pending[1:]
		}
	}
	if len(c.pending) > 0 {
		set.Truncated = types.NewBool(true)
	}
	return set
}

// WaitForUpdates and CheckForUpdates are the old forms.
func (c *collector) WaitForUpdates(ctx *simulator.Context, r *types.WaitForUpdates) soap.HasFault {
	res := c.WaitForUpdatesEx(ctx, &types.WaitForUpdatesEx{This: r.This, Version: r.Version}).(*methods.WaitForUpdatesExBody)
	body := &methods.WaitForUpdatesBody{Fault_: res.Fault_}
	if res.Res != nil && res.Res.Returnval != nil {
		body.Res = &types.WaitForUpdatesResponse{Returnval: *res.Res.Returnval}
	}
	return body
}

func (c *collector) CheckForUpdates(ctx *simulator.Context, r *types.CheckForUpdates) soap.HasFault {
	res := c.WaitForUpdatesEx(ctx, &types.WaitForUpdatesEx{This: r.This, Version: r.Version, Options: &types.WaitOptions{MaxWaitSeconds: types.NewInt32(0)}}).(*methods.WaitForUpdatesExBody)
	body := &methods.CheckForUpdatesBody{Fault_: res.Fault_}
	if res.Res != nil {
		body.Res = &types.CheckForUpdatesResponse{Returnval: res.Res.Returnval}
	}
	return body
}

// PutObject, UpdateObject and RemoveObject keep the simulator's own way of
// remembering changes, which has no end, out of use.
func (*collector) PutObject(*simulator.Context, mo.Reference) {}

// UpdateObject does nothing.
func (*collector) UpdateObject(*simulator.Context, mo.Reference, []types.PropertyChange) {}

// RemoveObject does nothing.
func (*collector) RemoveObject(*simulator.Context, types.ManagedObjectReference) {}
