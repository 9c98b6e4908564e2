package vcsim

import (
	"slices"
	"strconv"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// unlimited is no limit, in an allocation.
const unlimited = -1

func updateConfigNeeds(c *call) (demands []demand) {
	r := c.body.(*types.UpdateConfig)
	if r.Name != "" && r.Name != c.s.nameOf(c.this) {
		demands = append(demands, demand{"Resource.RenamePool", c.this})
	}
	if r.Config != nil || len(demands) == 0 {
		demands = append(demands, demand{"Resource.EditPool", c.this})
	}
	return demands
}

func movePoolNeeds(c *call) []demand {
	r := c.body.(*types.MoveIntoResourcePool)
	demands := []demand{{"Resource.MovePool", c.this}}
	for _, ref := range r.List {
		if ref.Type == "VirtualMachine" {
			demands = append(demands, demand{"Resource.AssignVMToPool", c.this})
			continue
		}
		demands = append(demands, demand{"Resource.MovePool", ref})
	}
	return demands
}

func (s *Server) pool(ref types.ManagedObjectReference) (*simulator.ResourcePool, bool) {
	p, ok := s.vim.Get(ref).(*simulator.ResourcePool)
	return p, ok
}

// poolState is what a pool looks like now, safe to read.
func (s *Server) poolState(p *simulator.ResourcePool) (state mo.ResourcePool) {
	s.locked(p, func() {
		state = p.ResourcePool
		state.ResourcePool = slices.Clone(p.ResourcePool.ResourcePool)
		state.Vm = slices.Clone(p.Vm)
	})
	return state
}

// poolItself is poolState without the pools and VMs in it, which may be thousands.
func (s *Server) poolItself(p *simulator.ResourcePool) (state mo.ResourcePool) {
	s.locked(p, func() { state = p.ResourcePool })
	state.ResourcePool, state.Vm = nil, nil
	return state
}

// adopt adds one to a list of children. Whoever has read the list keeps what was
// read: what is in it is never changed in place.
func (s *Server) adopt(parent mo.Reference, property string, children *[]types.ManagedObjectReference, child types.ManagedObjectReference) {
	var all []types.ManagedObjectReference
	s.locked(parent, func() { all = append(*children, child) })
	s.update(parent, set(property, all))
}

func (c *call) createPool() soap.HasFault {
	r := c.body.(*types.CreateResourcePool)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	parent, ok := c.s.pool(c.this)
	if !ok {
		return refuse(&types.NotSupported{})
	}
	name, fault := c.s.freeName(r.Name, parent.Self, types.ManagedObjectReference{})
	if fault != nil {
		return refuse(fault)
	}
	config := types.ResourceConfigSpec{ChangeVersion: "1", CpuAllocation: r.Spec.CpuAllocation, MemoryAllocation: r.Spec.MemoryAllocation}
	for _, a := range []struct {
		kind string
		info *types.ResourceAllocationInfo
	}{{"cpu", &config.CpuAllocation}, {"memory", &config.MemoryAllocation}} {
		if i := a.info; i.Reservation == nil || i.Limit == nil || i.ExpandableReservation == nil || i.Shares == nil {
			return refuse(&types.InvalidArgument{RuntimeFault: reason("a new resource pool needs reservation, limit, expandableReservation and shares"), InvalidProperty: "spec." + a.kind + "Allocation"})
		}
		if fault := settle(a.kind, a.info); fault != nil {
			return refuse(fault)
		}
	}
	if fault := c.s.fits(parent, nil, config); fault != nil {
		return refuse(fault)
	}
	p := c.s.putPool(parent, types.ManagedObjectReference{Type: "ResourcePool"}, name, config)
	c.s.refresh(parent)
	c.s.event(c, &types.ResourcePoolCreatedEvent{ResourcePoolEvent: c.s.poolEvent(p), Parent: c.s.poolArgument(parent)})
	if err := c.s.save(p.Self); err != nil {
		return c.broken(err)
	}
	return &methods.CreateResourcePoolBody{Res: &types.CreateResourcePoolResponse{Returnval: p.Self}}
}

// putPool makes a pool; self may hold the id it had before.
func (s *Server) putPool(parent *simulator.ResourcePool, self types.ManagedObjectReference, name string, config types.ResourceConfigSpec) *simulator.ResourcePool {
	p := &simulator.ResourcePool{}
	at := s.poolItself(parent)
	p.Self, p.Name, p.Owner = self, name, at.Owner
	p.Parent = &at.Self
	if config.LastModified == nil {
		now := time.Now()
		config.LastModified = &now
	}
	p.Summary = poolSummary(name, config, types.ResourcePoolRuntimeInfo{})
	p.Config = config
	n := &share{have: allocations(config)}
	n.move(s.shares[at.Self])
	p.AvailableField = s.availableFields("ResourcePool")
	s.vim.PutEntity(parent, p)
	s.shares[p.Self] = n
	s.update(p, set("config.entity", &p.Self))
	s.names.rename(p.Self, "", name)
	s.adopt(parent, "resourcePool", &parent.ResourcePool.ResourcePool, p.Self)
	s.refreshRuntime(p)
	return p
}

func (c *call) updatePool() soap.HasFault {
	r := c.body.(*types.UpdateConfig)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	p, ok := c.s.pool(c.this)
	if !ok {
		return refuse(&types.NotSupported{})
	}
	at := c.s.poolItself(p)
	was := at.Name
	var changes []types.PropertyChange
	if r.Name != "" && r.Name != at.Name {
		name, fault := c.s.freeName(r.Name, c.s.parent(at.Self), at.Self)
		if fault != nil {
			return refuse(fault)
		}
		at.Name = name
		changes = append(changes, set("name", name))
	}
	if r.Config != nil {
		config, fault := c.s.changed(p, at, *r.Config)
		if fault != nil {
			return refuse(fault)
		}
		at.Config = config
		c.s.shares[p.Self].set(allocations(config))
		changes = append(changes, set("config", config))
	}
	if len(changes) > 0 {
		c.s.update(p, append(changes, set("summary", poolSummary(at.Name, at.Config, at.Runtime)))...)
		c.s.names.rename(p.Self, was, at.Name)
		c.s.refresh(p)
		c.s.event(c, &types.ResourcePoolReconfiguredEvent{ResourcePoolEvent: c.s.poolEvent(p)})
		if err := c.s.save(p.Self); err != nil {
			return c.broken(err)
		}
	}
	return &methods.UpdateConfigBody{Res: &types.UpdateConfigResponse{}}
}

// changed joins what is configured and what is asked for, and checks it.
func (s *Server) changed(p *simulator.ResourcePool, at mo.ResourcePool, want types.ResourceConfigSpec) (types.ResourceConfigSpec, types.BaseMethodFault) {
	config := at.Config
	if want.ChangeVersion != "" && want.ChangeVersion != config.ChangeVersion {
		return config, &types.ConcurrentAccess{VimFault: vimReason("the resource pool was changed meanwhile; read it again")}
	}
	if at.Parent == nil || at.Parent.Type != "ResourcePool" {
		return config, &types.InvalidArgument{RuntimeFault: reason("a cluster's root pool has what its hosts have; it cannot be set"), InvalidProperty: "this"}
	}
	n, _ := strconv.Atoi(config.ChangeVersion)
	now := time.Now()
	config.ChangeVersion, config.LastModified = strconv.Itoa(n+1), &now
	config.CpuAllocation = joined(config.CpuAllocation, want.CpuAllocation)
	config.MemoryAllocation = joined(config.MemoryAllocation, want.MemoryAllocation)
	if fault := settle("cpu", &config.CpuAllocation); fault != nil {
		return config, fault
	}
	if fault := settle("memory", &config.MemoryAllocation); fault != nil {
		return config, fault
	}
	parent, ok := s.pool(*at.Parent)
	if !ok {
		return config, &types.ManagedObjectNotFound{Obj: *at.Parent}
	}
	return config, firstFault(s.shares[p.Self].holds(config), s.fits(parent, s.shares[p.Self], config))
}

func firstFault(faults ...types.BaseMethodFault) types.BaseMethodFault {
	for _, f := range faults {
		if f != nil {
			return f
		}
	}
	return nil
}

func joined(have, want types.ResourceAllocationInfo) types.ResourceAllocationInfo {
	if want.Reservation != nil {
		have.Reservation = want.Reservation
	}
	if want.Limit != nil {
		have.Limit = want.Limit
	}
	if want.ExpandableReservation != nil {
		have.ExpandableReservation = want.ExpandableReservation
	}
	if want.Shares != nil {
		have.Shares = want.Shares
	}
	return have
}

// Shares of a pool at each level (vSphere Resource Management, "Resource
// Allocation Shares": those of a VM of 4 vCPUs and 16 GiB).
var poolShares = map[string]map[types.SharesLevel]int32{
	"cpu":    {types.SharesLevelLow: 2000, types.SharesLevelNormal: 4000, types.SharesLevelHigh: 8000},
	"memory": {types.SharesLevelLow: 81920, types.SharesLevelNormal: 163840, types.SharesLevelHigh: 327680},
}

// settle checks one allocation by itself and fills in the number of shares.
func settle(kind string, a *types.ResourceAllocationInfo) types.BaseMethodFault {
	wrong := func(what, why string) types.BaseMethodFault {
		return &types.InvalidArgument{RuntimeFault: reason(why), InvalidProperty: "spec." + kind + "Allocation." + what}
	}
	switch {
	case *a.Reservation < 0:
		return wrong("reservation", "a reservation is 0 or more")
	case *a.Limit < unlimited:
		return wrong("limit", "a limit is 0 or more, or -1 for none")
	case *a.Limit != unlimited && *a.Reservation > *a.Limit:
		return wrong("reservation", "the "+kind+" reservation is larger than the limit")
	case a.OverheadLimit != nil:
		return wrong("overheadLimit", "pools have no overhead limit")
	}
	shares := *a.Shares
	a.Shares = &shares
	if shares.Level == types.SharesLevelCustom {
		if shares.Shares < 0 || shares.Shares > 4_000_000 {
			return wrong("shares", "custom shares are 0 to 4000000")
		}
		return nil
	}
	n, ok := poolShares[kind][shares.Level]
	if !ok {
		return wrong("shares", "the level of shares is low, normal, high or custom")
	}
	a.Shares.Shares = n
	return nil
}

func (c *call) movePools() soap.HasFault {
	r := c.body.(*types.MoveIntoResourcePool)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	to, ok := c.s.pool(c.this)
	if !ok {
		return refuse(&types.NotSupported{})
	}
	for _, ref := range r.List {
		if ref.Type == "VirtualMachine" {
			return refuse(&types.NotSupported{RuntimeFault: reason(mirrorIsPods)})
		}
		if fault := c.s.movePool(c, ref, to); fault != nil {
			return refuse(fault)
		}
	}
	return &methods.MoveIntoResourcePoolBody{Res: &types.MoveIntoResourcePoolResponse{}}
}

func (s *Server) movePool(c *call, ref types.ManagedObjectReference, to *simulator.ResourcePool) types.BaseMethodFault {
	p, ok := s.pool(ref)
	if !ok {
		return &types.ManagedObjectNotFound{Obj: ref}
	}
	at, target := s.poolState(p), s.poolState(to)
	if at.Parent == nil || at.Parent.Type != "ResourcePool" || at.Owner != target.Owner {
		return &types.InvalidArgument{RuntimeFault: reason("a pool moves below another pool of its own cluster"), InvalidProperty: "list"}
	}
	for up := to.Self; up.Value != ""; up = s.parent(up) {
		if up == ref {
			return &types.InvalidArgument{RuntimeFault: reason("a pool cannot be moved below itself"), InvalidProperty: "list"}
		}
	}
	if *at.Parent == to.Self {
		return nil
	}
	if _, fault := s.freeName(at.Name, to.Self, ref); fault != nil {
		return fault
	}
	if fault := s.fits(to, s.shares[ref], at.Config); fault != nil {
		return fault
	}
	s.shares[ref].move(s.shares[to.Self])
	from, _ := s.pool(*at.Parent)
	s.update(from, set("resourcePool", without(s.poolState(from).ResourcePool, ref)))
	s.update(p, set("parent", &target.Self))
	s.update(to, set("resourcePool", append(target.ResourcePool, ref)))
	s.refresh(from)
	s.refresh(p)
	s.event(c, &types.ResourcePoolMovedEvent{ResourcePoolEvent: s.poolEvent(p), OldParent: s.poolArgument(from), NewParent: s.poolArgument(to)})
	if err := s.save(ref); err != nil {
		return brokenFault(err)
	}
	return nil
}

func without(refs []types.ManagedObjectReference, ref types.ManagedObjectReference) []types.ManagedObjectReference {
	return slices.DeleteFunc(slices.Clone(refs), func(r types.ManagedObjectReference) bool { return r == ref })
}

// destroyPool removes a pool; what is in it moves to its parent, as vSphere
// does it.
func (s *Server) destroyPool(c *call, p *simulator.ResourcePool) types.BaseMethodFault {
	at := s.poolState(p)
	if at.Parent == nil || at.Parent.Type != "ResourcePool" {
		return &types.InvalidArgument{RuntimeFault: reason("a cluster's root pool goes with its cluster"), InvalidProperty: "this"}
	}
	parent, _ := s.pool(*at.Parent)
	up := s.poolState(parent)
	for _, child := range at.ResourcePool {
		if _, fault := s.freeName(s.nameOf(child), up.Self, child); fault != nil {
			return fault
		}
	}
	event := &types.ResourcePoolDestroyedEvent{ResourcePoolEvent: s.poolEvent(p)}
	changed := []types.ManagedObjectReference{at.Self}
	for _, child := range at.ResourcePool {
		s.update(s.vim.Get(child), set("parent", &up.Self))
		s.shares[child].move(s.shares[up.Self])
		changed = append(changed, child)
	}
	for _, vm := range at.Vm {
		s.rehome(vm, up.Self)
		changed = append(changed, vm)
	}
	s.update(parent, set("resourcePool", append(without(up.ResourcePool, at.Self), at.ResourcePool...)), set("vm", append(up.Vm, at.Vm...)))
	s.shares[at.Self].move(nil)
	delete(s.shares, at.Self)
	s.forget(at.Self)
	s.refresh(parent)
	s.event(c, event)
	if err := s.save(changed...); err != nil {
		return brokenFault(err)
	}
	return nil
}

func (c *call) destroyChildren() soap.HasFault {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	p, ok := c.s.pool(c.this)
	if !ok {
		return refuse(&types.NotSupported{})
	}
	for _, ref := range c.s.poolState(p).ResourcePool {
		child, _ := c.s.pool(ref)
		if fault := c.s.destroyPool(c, child); fault != nil {
			return refuse(fault)
		}
	}
	return &methods.DestroyChildrenBody{Res: &types.DestroyChildrenResponse{}}
}
