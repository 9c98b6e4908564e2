package vcsim

import (
	"slices"
	"sync"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// A viewManager makes views whose contents are worked out when they are asked
// for, so that a change of the inventory costs them nothing.
type viewManager struct {
	simulator.ViewManager
}

// kinds says which types a view of the key shows.
var kinds = map[string][]string{
	"ManagedEntity":                  nil, // all
	"Folder":                         {"Folder", "StoragePod"},
	"Datacenter":                     {"Datacenter"},
	"ComputeResource":                {"ComputeResource", "ClusterComputeResource"},
	"ClusterComputeResource":         {"ClusterComputeResource"},
	"HostSystem":                     {"HostSystem"},
	"ResourcePool":                   {"ResourcePool", "VirtualApp"},
	"VirtualApp":                     {"VirtualApp"},
	"VirtualMachine":                 {"VirtualMachine"},
	"Datastore":                      {"Datastore"},
	"StoragePod":                     {"StoragePod"},
	"Network":                        {"Network", "OpaqueNetwork", "DistributedVirtualPortgroup"},
	"OpaqueNetwork":                  {"OpaqueNetwork"},
	"DistributedVirtualSwitch":       {"DistributedVirtualSwitch", "VmwareDistributedVirtualSwitch"},
	"DistributedVirtualPortgroup":    {"DistributedVirtualPortgroup"},
	"VmwareDistributedVirtualSwitch": {"VmwareDistributedVirtualSwitch"},
}

func (m *viewManager) CreateContainerView(ctx *simulator.Context, r *types.CreateContainerView) soap.HasFault {
	body := &methods.CreateContainerViewBody{}
	s := serverOf(ctx)
	if fault := s.reachable(ctx, r.Container); fault != nil {
		body.Fault_ = simulator.Fault("", fault)
		return body
	}
	v := &containerView{server: s}
	v.Container, v.Recursive, v.Type = r.Container, r.Recursive, r.Type
	for _, t := range r.Type {
		shown, ok := kinds[t]
		if !ok {
			body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "type"})
			return body
		}
		if shown == nil {
			v.types = nil
			break
		}
		v.types = append(v.types, shown...)
	}
	v.Self = types.ManagedObjectReference{Type: "ContainerView", Value: "session[" + ctx.Session.Key + "]" + uuid.NewString()}
	ctx.Session.Put(v)
	body.Res = &types.CreateContainerViewResponse{Returnval: v.Self}
	return body
}

// A containerView shows what is below an entity.
type containerView struct {
	mo.ContainerView

	server *Server
	types  []string // nil: all
}

func (v *containerView) DestroyView(ctx *simulator.Context, r *types.DestroyView) soap.HasFault {
	ctx.Session.Remove(ctx, r.This)
	return &methods.DestroyViewBody{Res: &types.DestroyViewResponse{}}
}

// Get is asked for by the property collector instead of the view itself.
func (v *containerView) Get() mo.Reference {
	shown := v.ContainerView
	shown.View = nil
	for _, e := range v.server.vim.All("") {
		if ref := e.Reference(); v.contains(v.server, ref) {
			shown.View = append(shown.View, ref)
		}
	}
	slices.SortFunc(shown.View, compareRefs)
	return &shown
}

func (v *containerView) contains(s *Server, ref types.ManagedObjectReference) bool {
	if v.types != nil && !slices.Contains(v.types, ref.Type) || ref == v.Container {
		return false
	}
	if _, entity := s.vim.Get(ref).(mo.Entity); !entity {
		return false
	}
	parents := []types.ManagedObjectReference{s.parent(ref)}
	if m, ok := s.mirrorOf(ref); ok {
		parents = append(parents, m.pool, m.host)
	}
	for _, p := range parents {
		for n := 0; p.Value != "" && n < 64; n++ {
			if p == v.Container {
				return true
			}
			if !v.Recursive {
				break
			}
			p = s.parent(p)
		}
	}
	return false
}

func compareRefs(a, b types.ManagedObjectReference) int {
	switch {
	case a.String() < b.String():
		return -1
	case a.String() > b.String():
		return 1
	}
	return 0
}

// maxListed is how many objects a list view holds.
const maxListed = 20_000

func (m *viewManager) CreateListView(ctx *simulator.Context, r *types.CreateListView) soap.HasFault {
	v := &listView{hub: serverOf(ctx).hub, refs: map[types.ManagedObjectReference]bool{}}
	v.Self = types.ManagedObjectReference{Type: "ListView", Value: "session[" + ctx.Session.Key + "]" + uuid.NewString()}
	if missing := v.add(ctx, r.Obj); len(missing) > 0 {
		return &methods.CreateListViewBody{Fault_: simulator.Fault("", &types.ManagedObjectNotFound{Obj: missing[0]})}
	}
	ctx.Session.Put(v)
	return &methods.CreateListViewBody{Res: &types.CreateListViewResponse{Returnval: v.Self}}
}

// A listView shows what its owner puts in.
type listView struct {
	mo.ListView

	hub  *hub
	mu   sync.Mutex
	refs map[types.ManagedObjectReference]bool
}

func (v *listView) Get() mo.Reference {
	v.mu.Lock()
	defer v.mu.Unlock()
	shown := v.ListView
	shown.View = nil
	for ref := range v.refs {
		shown.View = append(shown.View, ref)
	}
	slices.SortFunc(shown.View, compareRefs)
	return &shown
}

func (v *listView) contains(_ *Server, ref types.ManagedObjectReference) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.refs[ref]
}

// add returns the objects that are not there.
func (v *listView) add(ctx *simulator.Context, refs []types.ManagedObjectReference) (missing []types.ManagedObjectReference) {
	for _, ref := range refs {
		v.mu.Lock()
		full := len(v.refs) >= maxListed
		if !full && ctx.Session.Get(ref) != nil {
			v.refs[ref] = true
		} else {
			missing = append(missing, ref)
		}
		v.mu.Unlock()
		v.hub.mark(ref)
	}
	return missing
}

func (v *listView) remove(refs []types.ManagedObjectReference) {
	for _, ref := range refs {
		v.mu.Lock()
		delete(v.refs, ref)
		v.mu.Unlock()
		v.hub.mark(ref)
	}
}

func (v *listView) ModifyListView(ctx *simulator.Context, r *types.ModifyListView) soap.HasFault {
	v.remove(r.Remove)
	return &methods.ModifyListViewBody{Res: &types.ModifyListViewResponse{Returnval: v.add(ctx, r.Add)}}
}

func (v *listView) ResetListView(ctx *simulator.Context, r *types.ResetListView) soap.HasFault {
	v.remove(v.Get().(*mo.ListView).View)
	return &methods.ResetListViewBody{Res: &types.ResetListViewResponse{Returnval: v.add(ctx, r.Obj)}}
}

func (v *listView) DestroyView(ctx *simulator.Context, r *types.DestroyView) soap.HasFault {
	v.remove(v.Get().(*mo.ListView).View)
	ctx.Session.Remove(ctx, r.This)
	return &methods.DestroyViewBody{Res: &types.DestroyViewResponse{}}
}
