package vcsim

import (
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

var serviceInstance = vim25.ServiceInstance

func versionText(n int) string { return strconv.Itoa(n) }

// read returns properties as the session's user may see them.
func (s *Server) read(ctx *simulator.Context, spec ...types.PropertyFilterSpec) ([]types.ObjectContent, types.BaseMethodFault) {
	for i := range spec {
		spec[i].ReportMissingObjectsInResults = types.NewBool(true)
	}
	plain := &simulator.PropertyCollector{}
	res := plain.RetrievePropertiesEx(ctx, &types.RetrievePropertiesEx{SpecSet: spec}).(*methods.RetrievePropertiesExBody)
	if f := res.Fault(); f != nil {
		fault, _ := f.VimFault().(types.BaseMethodFault)
		if fault == nil {
			fault = &types.InvalidRequest{}
		}
		return nil, fault
	}
	contents := res.Res.Returnval.Objects
	if ctx.Session == nil { // what anyone may ask for is empty already
		return contents, nil
	}
	who, err := s.users.Lookup(ctx.Session.UserName)
	if err != nil {
		return nil, &types.NotAuthenticated{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	shown := contents[:0]
	for _, o := range contents {
		view, read := s.sees(who, o.Obj)
		if view && !read {
			mask(&o)
		}
		if view {
			shown = append(shown, o)
		}
	}
	return shown, nil
}

// mask leaves of an object what shows its place in the tree.
func mask(o *types.ObjectContent) {
	shown := o.PropSet[:0:0]
	for _, p := range o.PropSet {
		first, _, _ := strings.Cut(p.Name, ".")
		if slices.Contains(treeProperties, first) {
			shown = append(shown, p)
			continue
		}
		o.MissingSet = append(o.MissingSet, types.MissingProperty{Path: p.Name, Fault: types.LocalizedMethodFault{Fault: noPermission(demand{privRead, o.Obj})}})
	}
	o.PropSet = shown
}

// RetrievePropertiesEx reads in pages.
func (c *collector) RetrievePropertiesEx(ctx *simulator.Context, r *types.RetrievePropertiesEx) soap.HasFault {
	s := serverOf(ctx)
	for _, spec := range r.SpecSet {
		for _, o := range spec.ObjectSet {
			if spec.ReportMissingObjectsInResults != nil && *spec.ReportMissingObjectsInResults {
				continue
			}
			if fault := s.reachable(ctx, o.Obj); fault != nil {
				return &methods.RetrievePropertiesExBody{Fault_: simulator.Fault("", fault)}
			}
		}
	}
	contents, fault := s.read(ctx, r.SpecSet...)
	if fault != nil {
		return &methods.RetrievePropertiesExBody{Fault_: simulator.Fault("", fault)}
	}
	res := &types.RetrievePropertiesExResponse{}
	if len(contents) > 0 || len(r.SpecSet) > 0 {
		res.Returnval = &types.RetrieveResult{}
		res.Returnval.Objects, res.Returnval.Token = c.paged(contents, int(r.Options.MaxObjects))
	}
	return &methods.RetrievePropertiesExBody{Res: res}
}

// reachable is the fault for an object that is not there, or not to be seen.
func (s *Server) reachable(ctx *simulator.Context, ref types.ManagedObjectReference) types.BaseMethodFault {
	if ctx.Session == nil {
		if ctx.Map.Get(ref) == nil {
			return &types.ManagedObjectNotFound{Obj: ref}
		}
		return nil
	}
	if ctx.Session.Get(ref) == nil {
		return &types.ManagedObjectNotFound{Obj: ref}
	}
	who, err := s.users.Lookup(ctx.Session.UserName)
	if err != nil {
		return &types.NotAuthenticated{}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if view, _ := s.sees(who, ref); !view {
		return noPermission(demand{privView, ref})
	}
	return nil
}

// paged keeps what is over the limit for ContinueRetrievePropertiesEx.
func (c *collector) paged(contents []types.ObjectContent, limit int) ([]types.ObjectContent, string) {
	if limit <= 0 || len(contents) <= limit {
		return contents, ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	p := page{token: uuid.NewString(), max: limit, objects: contents[limit:]}
	if len(c.pages) == maxPages {
		c.pages = c.pages[1:] // the oldest; its reader gets InvalidProperty
	}
	c.pages = append(c.pages, p)
	return contents[:limit], p.token
}

// ContinueRetrievePropertiesEx returns the next page.
func (c *collector) ContinueRetrievePropertiesEx(_ *simulator.Context, r *types.ContinueRetrievePropertiesEx) soap.HasFault {
	c.mu.Lock()
	i := slices.IndexFunc(c.pages, func(p page) bool { return p.token == r.Token })
	if i < 0 {
		c.mu.Unlock()
		return &methods.ContinueRetrievePropertiesExBody{Fault_: simulator.Fault("", &types.InvalidProperty{Name: "token"})}
	}
	p := c.pages[i]
	c.pages = slices.Delete(c.pages, i, i+1)
	c.mu.Unlock()
	res := &types.ContinueRetrievePropertiesExResponse{}
	res.Returnval.Objects, res.Returnval.Token = c.paged(p.objects, p.max)
	return &methods.ContinueRetrievePropertiesExBody{Res: res}
}

// CancelRetrievePropertiesEx drops a page.
func (c *collector) CancelRetrievePropertiesEx(_ *simulator.Context, r *types.CancelRetrievePropertiesEx) soap.HasFault {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pages = slices.DeleteFunc(c.pages, func(p page) bool { return p.token == r.Token })
	return &methods.CancelRetrievePropertiesExBody{Res: &types.CancelRetrievePropertiesExResponse{}}
}

// RetrieveProperties is the old form.
func (c *collector) RetrieveProperties(ctx *simulator.Context, r *types.RetrieveProperties) soap.HasFault {
	res := c.RetrievePropertiesEx(ctx, &types.RetrievePropertiesEx{This: r.This, SpecSet: r.SpecSet}).(*methods.RetrievePropertiesExBody)
	body := &methods.RetrievePropertiesBody{Fault_: res.Fault_}
	if res.Res != nil {
		body.Res = &types.RetrievePropertiesResponse{}
		if res.Res.Returnval != nil {
			body.Res.Returnval = res.Res.Returnval.Objects
		}
	}
	return body
}
