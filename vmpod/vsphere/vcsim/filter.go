package vcsim

import (
	"reflect"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// A filter is a PropertyFilter with what was last sent of its objects.
type filter struct {
	mo.PropertyFilter

	collector *collector
	sent      map[types.ManagedObjectReference]map[string]types.AnyType
}

func (f *filter) DestroyPropertyFilter(ctx *simulator.Context, r *types.DestroyPropertyFilter) soap.HasFault {
	f.collector.drop(ctx, f)
	return &methods.DestroyPropertyFilterBody{Res: &types.DestroyPropertyFilterResponse{}}
}

// A membership tells which objects an ObjectSpec selects, without walking.
type membership interface {
	contains(s *Server, ref types.ManagedObjectReference) bool
}

type onlyObject types.ManagedObjectReference

func (o onlyObject) contains(_ *Server, ref types.ManagedObjectReference) bool {
	return ref == types.ManagedObjectReference(o)
}

// members returns how to tell what the filter selects; ok is false for
// traversals other than of a view, which have to be walked.
func (f *filter) members(ctx *simulator.Context) (all []membership, ok bool) {
	for _, o := range f.Spec.ObjectSet {
		if o.Skip == nil || !*o.Skip || len(o.SelectSet) == 0 {
			all = append(all, onlyObject(o.Obj))
		}
		for _, sel := range o.SelectSet {
			t, isTraversal := sel.(*types.TraversalSpec)
			view, isView := ctx.Session.Get(o.Obj).(membership)
			if !isTraversal || !isView || t.Path != "view" || len(t.SelectSet) > 0 {
				return nil, false
			}
			all = append(all, view)
		}
	}
	return all, true
}

// delta returns what changed. dirty are the objects to look at; nil: all.
func (f *filter) delta(s *Server, ctx *simulator.Context, dirty map[types.ManagedObjectReference]bool) ([]types.ObjectUpdate, types.BaseMethodFault) {
	views, simple := f.members(ctx)
	if !simple {
		dirty = nil
	}
	spec := f.Spec
	if dirty != nil {
		spec.ObjectSet = nil
		for ref := range dirty {
			for _, v := range views {
				if v.contains(s, ref) && s.exists(ctx, ref) {
					spec.ObjectSet = append(spec.ObjectSet, types.ObjectSpec{Obj: ref})
					break
				}
			}
		}
	}
	now := map[types.ManagedObjectReference]map[string]types.AnyType{}
	if len(spec.ObjectSet) > 0 {
		contents, fault := s.read(ctx, spec)
		if fault != nil {
			return nil, fault
		}
		for _, o := range contents {
			now[o.Obj] = properties(o)
		}
	}
	var updates []types.ObjectUpdate
	for ref, props := range now {
		if u, changed := difference(ref, f.sent[ref], props); changed {
			updates = append(updates, u)
			f.sent[ref] = props
		}
	}
	left := func(ref types.ManagedObjectReference) {
		if _, there := now[ref]; !there {
			delete(f.sent, ref)
			updates = append(updates, types.ObjectUpdate{Kind: types.ObjectUpdateKindLeave, Obj: ref})
		}
	}
	if dirty == nil {
		for ref := range f.sent {
			left(ref)
		}
		return updates, nil
	}
	for ref := range dirty { // and not all that was sent, of which there are thousands
		if _, sent := f.sent[ref]; sent {
			left(ref)
		}
	}
	return updates, nil
}

func properties(o types.ObjectContent) map[string]types.AnyType {
	props := make(map[string]types.AnyType, len(o.PropSet))
	for _, p := range o.PropSet {
		props[p.Name] = p.Val
	}
	return props
}

// difference says what to send of an object; old is nil for a new one.
func difference(ref types.ManagedObjectReference, old, now map[string]types.AnyType) (types.ObjectUpdate, bool) {
	u := types.ObjectUpdate{Kind: types.ObjectUpdateKindModify, Obj: ref}
	if old == nil {
		u.Kind = types.ObjectUpdateKindEnter
	}
	for name, value := range now {
		before, known := old[name]
		if !known || !reflect.DeepEqual(before, value) {
			u.ChangeSet = append(u.ChangeSet, set(name, value))
		}
	}
	for name := range old {
		if _, there := now[name]; !there {
			u.ChangeSet = append(u.ChangeSet, set(name, nil))
		}
	}
	return u, old == nil || len(u.ChangeSet) > 0
}

// exists tells whether an object can be read: in the inventory, or of the
// session.
func (s *Server) exists(ctx *simulator.Context, ref types.ManagedObjectReference) bool {
	return ctx.Session.Get(ref) != nil
}
