package vcsim

import (
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// Admission of reservations (vSphere Resource Management, "Expandable
// Reservations"): a pool's children may reserve what the pool reserves, and
// beyond that, if its reservation is expandable, what its parent has free.

const mib = 1 << 20

// The resources of a pool: CPU in MHz, memory in MiB.
const (
	cpu = iota
	memory
	resources
)

var resourceNames = [resources]string{"cpu", "memory"}

// A share is a pool in the tree of reservations.
type share struct {
	parent *share
	have   [resources]allocation
	given  [resources]int64 // what the children need together
}

type allocation struct {
	reservation, limit int64
	expandable         bool
}

func allocations(c types.ResourceConfigSpec) (a [resources]allocation) {
	for k, info := range []types.ResourceAllocationInfo{c.CpuAllocation, c.MemoryAllocation} {
		a[k] = allocation{*info.Reservation, *info.Limit, info.ExpandableReservation != nil && *info.ExpandableReservation}
	}
	return a
}

// need is what a pool takes from its parent.
func (n *share) need(k int) int64 { return max(n.have[k].reservation, n.given[k]) }

func (n *share) give(k int, more int64) {
	before := n.need(k)
	n.given[k] += more
	if n.parent != nil {
		n.parent.give(k, n.need(k)-before)
	}
}

func (n *share) set(have [resources]allocation) {
	for k := range resources {
		before := n.need(k)
		n.have[k] = have[k]
		if n.parent != nil {
			n.parent.give(k, n.need(k)-before)
		}
	}
}

// move puts a pool below another; nil takes it out.
func (n *share) move(to *share) {
	for k := range resources {
		if n.parent != nil {
			n.parent.give(k, -n.need(k))
		}
		if to != nil {
			to.give(k, n.need(k))
		}
	}
	n.parent = to
}

// room is how much more the children may reserve, if less of what they need
// now were not needed.
func (n *share) room(k int, less int64) int64 {
	a, given := n.have[k], n.given[k]-less
	own := a.reservation - given
	if !a.expandable || n.parent == nil {
		return own
	}
	free := n.parent.room(k, n.need(k)) - max(a.reservation, given)
	room := max(own, 0) + max(free, 0)
	if a.limit != unlimited {
		room = min(room, a.limit-given)
	}
	return room
}

// most is what a pool can use: the smallest limit of it and of those above.
func (n *share) most(k int) int64 {
	limit := n.have[k].limit
	if n.parent == nil {
		return max(limit, 0)
	}
	if above := n.parent.most(k); limit == unlimited || above < limit {
		return above
	}
	return limit
}

// fits checks that a child with config may be in the pool; child is its share
// if it is there already or moves.
func (s *Server) fits(parent *simulator.ResourcePool, child *share, config types.ResourceConfigSpec) types.BaseMethodFault {
	in := s.shares[parent.Self]
	if in == nil {
		return &types.ManagedObjectNotFound{Obj: parent.Self}
	}
	for k, a := range allocations(config) {
		want, less := a.reservation, int64(0)
		if child != nil {
			want = max(want, child.given[k])
			if child.parent == in {
				less = child.need(k)
			}
		}
		room := in.room(k, less)
		if want == 0 || want <= room {
			continue
		}
		why := types.InsufficientResourcesFault{VimFault: vimReason("the " + resourceNames[k] + " reservation is larger than what resource pool " + s.nameOf(parent.Self) + " has left")}
		if k == cpu {
			return &types.InsufficientCpuResourcesFault{InsufficientResourcesFault: why, Unreserved: max(room, 0), Requested: want}
		}
		return &types.InsufficientMemoryResourcesFault{InsufficientResourcesFault: why, Unreserved: max(room, 0) * mib, Requested: want * mib}
	}
	return nil
}

// holds checks that a pool with config still holds what its children reserve.
func (n *share) holds(config types.ResourceConfigSpec) types.BaseMethodFault {
	for k, a := range allocations(config) {
		given := n.given[k]
		if given > 0 && (!a.expandable && given > a.reservation || a.limit != unlimited && given > a.limit) {
			return &types.InvalidArgument{RuntimeFault: reason("its children reserve more " + resourceNames[k] + " than that"), InvalidProperty: "spec." + resourceNames[k] + "Allocation"}
		}
	}
	return nil
}

// refresh brings the runtime figures of a pool and of those above it up to
// date.
func (s *Server) refresh(p *simulator.ResourcePool) {
	for ok := true; ok; {
		s.refreshRuntime(p)
		p, ok = s.pool(s.parent(p.Self))
	}
}

func (s *Server) refreshRuntime(p *simulator.ResourcePool) {
	n := s.shares[p.Self]
	usage := func(k int, unit int64) types.ResourcePoolResourceUsage {
		room := max(n.room(k, 0), 0) * unit
		return types.ResourcePoolResourceUsage{
			ReservationUsed:   n.given[k] * unit,
			UnreservedForPool: room, UnreservedForVm: room,
			MaxUsage: n.most(k) * unit,
		}
	}
	at := s.poolItself(p)
	runtime := types.ResourcePoolRuntimeInfo{Cpu: usage(cpu, 1), Memory: usage(memory, mib), OverallStatus: types.ManagedEntityStatusGreen}
	if runtime.Cpu != at.Runtime.Cpu || runtime.Memory != at.Runtime.Memory {
		s.update(p, set("runtime", runtime), set("summary", poolSummary(at.Name, at.Config, runtime)))
	}
}

func poolSummary(name string, config types.ResourceConfigSpec, runtime types.ResourcePoolRuntimeInfo) types.BaseResourcePoolSummary {
	return &types.ResourcePoolSummary{Name: name, Config: config, Runtime: runtime}
}
