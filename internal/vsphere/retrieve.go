package vsphere

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// Exists asks for one object: false if vCenter says that it is not there. One
// that may not be seen is an error, NoPermission's.
func (s *Session) Exists(ctx context.Context, object types.ManagedObjectReference) (bool, error) {
	found, err := s.retrieve(ctx, map[types.ManagedObjectReference][]string{object: {"name"}}, false)
	if IsNotFound(err) {
		return false, nil
	}
	_, there := found[object]
	if err == nil && !there {
		err = fmt.Errorf("vCenter %s says nothing of %s %s: %w", s.Address(), object.Type, object.Value, errdefs.ErrUnavailable)
	}
	return there, err
}

// Retrieve reads properties of objects now, past any watch, in one call. What
// is not there, or may not be seen, is not in the answer; Exists tells these
// apart. A property that is unset or may not be read is not in its object's.
func (s *Session) Retrieve(ctx context.Context, want map[types.ManagedObjectReference][]string) (map[types.ManagedObjectReference]map[string]types.AnyType, error) {
	return s.retrieve(ctx, want, true)
}

func (s *Session) retrieve(ctx context.Context, want map[types.ManagedObjectReference][]string, missing bool) (map[types.ManagedObjectReference]map[string]types.AnyType, error) {
	if err := s.Login(ctx); err != nil {
		return nil, err
	}
	req := &types.RetrievePropertiesEx{This: s.client.ServiceContent.PropertyCollector}
	for object, props := range want {
		req.SpecSet = append(req.SpecSet, types.PropertyFilterSpec{
			PropSet:                       []types.PropertySpec{{Type: object.Type, PathSet: props}},
			ObjectSet:                     []types.ObjectSpec{{Obj: object}},
			ReportMissingObjectsInResults: &missing,
		})
	}
	login := s.Logins()
	res, err := methods.RetrievePropertiesEx(ctx, s, req)
	if err == nil && withoutSession(res.Returnval) {
		s.dropped(login)
		if err := s.Login(ctx); err != nil {
			return nil, err
		}
		if res, err = methods.RetrievePropertiesEx(ctx, s, req); err == nil && withoutSession(res.Returnval) {
			err = fmt.Errorf("vCenter %s drops each session at once: %w", s.Address(), errdefs.ErrUnavailable)
		}
	}
	if err != nil {
		return nil, err
	}
	found := make(map[types.ManagedObjectReference]map[string]types.AnyType, len(want))
	for page := res.Returnval; page != nil; {
		for _, o := range page.Objects {
			props := found[o.Obj]
			if props == nil {
				props = map[string]types.AnyType{}
				found[o.Obj] = props
			}
			for _, p := range o.PropSet {
				props[p.Name] = p.Val
			}
		}
		if page.Token == "" {
			break
		}
		next, err := methods.ContinueRetrievePropertiesEx(ctx, s, &types.ContinueRetrievePropertiesEx{This: req.This, Token: page.Token})
		if err != nil {
			return nil, err
		}
		page = &next.Returnval
	}
	return found, nil
}

// withoutSession tells whether an answer came without a session: vCenter fails
// no such call, but says of each property that it may not be read.
func withoutSession(page *types.RetrieveResult) bool {
	if page == nil {
		return false
	}
	for _, o := range page.Objects {
		for _, m := range o.MissingSet {
			if _, ok := asFault(m.Fault.Fault).(*types.NotAuthenticated); ok {
				return true
			}
		}
	}
	return false
}
