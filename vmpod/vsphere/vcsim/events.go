package vcsim

import (
	"reflect"
	"slices"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// serial is the simulator's own method, for those that walk the inventory
// without objects' locks: nobody changes the tree meanwhile.
func (c *call) serial() soap.HasFault {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	obj := c.ctx.Session.Get(c.this)
	m := reflect.ValueOf(obj).MethodByName(c.name)
	if !m.IsValid() {
		return refuse(&types.MethodNotFound{Receiver: c.this, Method: c.name})
	}
	var res []reflect.Value
	c.ctx.WithLock(obj, func() { res = m.Call([]reflect.Value{reflect.ValueOf(c.ctx), reflect.ValueOf(c.body)}) })
	body, _ := res[0].Interface().(soap.HasFault)
	return body
}

// event posts what a call did, in its user's name, with the sentence that
// clients show. The simulator keeps the last thousand. Call it with s.mu held.
func (s *Server) event(c *call, e types.BaseEvent) {
	if x := e.GetEvent(); x.FullFormattedMessage == "" {
		x.FullFormattedMessage = sentence(e)
	}
	ctx := &simulator.Context{Context: s.svc.Context.Context, Map: s.vim, Session: c.ctx.Session}
	em := s.vim.EventManager()
	ctx.WithLock(em, func() { em.PostEvent(ctx, &types.PostEvent{EventToPost: e}) })
}

func sentence(e types.BaseEvent) string {
	switch x := e.(type) {
	case *types.ResourcePoolCreatedEvent:
		return "Created resource pool " + x.ResourcePool.Name + " in " + x.Parent.Name
	case *types.ResourcePoolReconfiguredEvent:
		return "Changed the configuration of resource pool " + x.ResourcePool.Name
	case *types.ResourcePoolMovedEvent:
		return "Moved resource pool " + x.ResourcePool.Name + " from " + x.OldParent.Name + " to " + x.NewParent.Name
	case *types.ResourcePoolDestroyedEvent:
		return "Removed resource pool " + x.ResourcePool.Name
	case *types.GeneralUserEvent:
		return x.Message
	}
	return ""
}

func (s *Server) poolArgument(p *simulator.ResourcePool) types.ResourcePoolEventArgument {
	return types.ResourcePoolEventArgument{EntityEventArgument: types.EntityEventArgument{Name: s.nameOf(p.Self)}, ResourcePool: p.Self}
}

func (s *Server) poolEvent(p *simulator.ResourcePool) types.ResourcePoolEvent {
	at := s.poolItself(p)
	e := types.ResourcePoolEvent{ResourcePool: s.poolArgument(p)}
	e.ComputeResource = &types.ComputeResourceEventArgument{EntityEventArgument: types.EntityEventArgument{Name: s.nameOf(at.Owner)}, ComputeResource: at.Owner}
	dc := s.inventory.dc.Self
	e.Datacenter = &types.DatacenterEventArgument{EntityEventArgument: types.EntityEventArgument{Name: s.nameOf(dc)}, Datacenter: dc}
	return e
}

// eventNeeds: an event is posted on the object that it is about.
func eventNeeds(c *call) []demand {
	e := c.body.(*types.PostEvent).EventToPost
	if e == nil {
		return []demand{{"Global.LogEvent", c.s.root}}
	}
	on := c.s.root
	if x, ok := e.(*types.EventEx); ok && x.ObjectId != "" {
		on = types.ManagedObjectReference{Type: x.ObjectType, Value: x.ObjectId}
	} else if vm := e.GetEvent().Vm; vm != nil {
		on = vm.Vm
	} else if cr := e.GetEvent().ComputeResource; cr != nil {
		on = cr.ComputeResource
	}
	return []demand{{"Global.LogEvent", on}}
}

func (c *call) postEvent() soap.HasFault {
	r := c.body.(*types.PostEvent)
	if r.EventToPost == nil {
		return refuse(&types.InvalidArgument{InvalidProperty: "eventToPost"})
	}
	if x, ok := r.EventToPost.(*types.EventEx); ok && x.ObjectId != "" {
		ref := types.ManagedObjectReference{Type: x.ObjectType, Value: x.ObjectId}
		if _, there := c.s.vim.Get(ref).(mo.Entity); !there {
			return refuse(&types.ManagedObjectNotFound{Obj: ref})
		}
		x.FullFormattedMessage = x.Message
		c.s.frame(&x.Event, ref)
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.event(c, r.EventToPost)
	return &methods.PostEventBody{Res: &types.PostEventResponse{}}
}

// frame fills in where an event happened, by which collectors select it.
func (s *Server) frame(e *types.Event, ref types.ManagedObjectReference) {
	if p, ok := s.pool(ref); ok && e.ComputeResource == nil {
		e.ComputeResource = s.poolEvent(p).ComputeResource
	}
	if e.Datacenter == nil {
		dc := s.inventory.dc.Self
		e.Datacenter = &types.DatacenterEventArgument{EntityEventArgument: types.EntityEventArgument{Name: s.nameOf(dc)}, Datacenter: dc}
	}
}

func (c *call) logUserEvent() soap.HasFault {
	r := c.body.(*types.LogUserEvent)
	e := &types.GeneralUserEvent{GeneralEvent: types.GeneralEvent{Message: r.Msg}, Entity: &types.ManagedEntityEventArgument{EntityEventArgument: types.EntityEventArgument{Name: c.s.nameOf(r.Entity)}, Entity: r.Entity}}
	c.s.frame(&e.Event, r.Entity)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.event(c, e)
	return &methods.LogUserEventBody{Res: &types.LogUserEventResponse{}}
}

// userGroups searches users and groups; of a user or of a group, if that is
// asked for. Groups hold no groups here.
func (c *call) userGroups() soap.HasFault {
	r := c.body.(*types.RetrieveUserGroups)
	res := &types.RetrieveUserGroupsResponse{}
	users, groups := c.s.users.names()
	among := func(n string, group bool) bool {
		if r.BelongsToUser != "" {
			id, err := c.s.users.Lookup(r.BelongsToUser)
			if !group || err != nil || !slices.Contains(id.Groups, c.s.users.spelled(n, true)) {
				return false
			}
		}
		if r.BelongsToGroup != "" {
			id, err := c.s.users.Lookup(n)
			return !group && err == nil && slices.Contains(id.Groups, c.s.users.spelled(r.BelongsToGroup, true))
		}
		return true
	}
	add := func(names []string, group bool) {
		for _, n := range names {
			if !among(n, group) {
				continue
			}
			if c.s.users.matches(n, r.SearchStr, r.ExactMatch) {
				res.Returnval = append(res.Returnval, &types.UserSearchResult{Principal: n, FullName: n, Group: group})
			}
		}
	}
	if r.FindUsers {
		add(users, false)
	}
	if r.FindGroups {
		add(groups, true)
	}
	return &methods.RetrieveUserGroupsBody{Res: res}
}
