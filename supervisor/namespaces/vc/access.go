package vc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// formatPermissions is one comparable value for the permissions set on an
// object: a line each, "u" or "g", role, principal, sorted. Principals are in
// lower case: vCenter shows domains in capitals, and minds the case of none.
func formatPermissions(perms []types.Permission) string {
	lines := make([]string, 0, len(perms))
	for _, p := range perms {
		kind := "u"
		if p.Group {
			kind = "g"
		}
		if !p.Propagate {
			kind += "-" // never ours: it does not reach the VMs
		}
		lines = append(lines, fmt.Sprintf("%s\t%d\t%s", kind, p.RoleId, strings.ToLower(p.Principal)))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func parsePermissions(s string) []types.Permission {
	var perms []types.Permission
	for line := range strings.Lines(s) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 3)
		if len(f) != 3 {
			continue
		}
		role, _ := strconv.ParseInt(f[1], 10, 32)
		perms = append(perms, types.Permission{
			Principal: f[2], Group: f[0][0] == 'g', RoleId: int32(role), Propagate: !strings.HasSuffix(f[0], "-"),
		})
	}
	return perms
}

// access is what permissions are in the namespace's words. A role that is none
// of its three keeps vSphere's name.
func (c *Client) access(perms string) []Access {
	var all []Access
	for _, p := range parsePermissions(perms) {
		a := Access{Subject: p.Principal, Group: p.Group, Role: Role(c.roles.name(p.RoleId))}
		for _, r := range []Role{RoleView, RoleEdit, RoleOwner} {
			if string(a.Role) == c.roleName(r) {
				a.Role = r
				break
			}
		}
		if !p.Propagate {
			a.Role += " (not propagated)"
		}
		if domain, subject, ok := strings.Cut(p.Principal, `\`); ok {
			a.Domain, a.Subject = domain, subject
		} else if subject, domain, ok := strings.Cut(p.Principal, "@"); ok {
			a.Domain, a.Subject = domain, subject
		}
		all = append(all, a)
	}
	slices.SortFunc(all, compareAccess)
	return all
}

// ensureAccess sets the permissions of a namespace's objects: one call for each
// that differs.
func (c *Client) ensureAccess(ctx context.Context, ns Namespace) error {
	if ns.Access == nil {
		return nil
	}
	// Not of the credentials, which are a call to the API server away: what is
	// signed in is what can be locked out.
	user := c.session.User()
	want := make([]types.Permission, 0, len(ns.Access))
	var errs []error
	for _, a := range ns.Access {
		if a.Group {
			member, err := c.memberOf(ctx, a, user)
			if err != nil {
				return err
			}
			if member {
				return fmt.Errorf("access of group %s: the account %s with which Atoll signs in is in it, and would have no more than its role: take the account out of the group, or the group off the list: %w", principal(a), user, errdefs.ErrFailedPrecondition)
			}
		}
		if !a.Group && (strings.EqualFold(user, principal(a)) || strings.EqualFold(user, a.Subject+"@"+a.Domain)) {
			// What is set on an object hides what is inherited: Atoll would lose its
			// own rights there.
			return fmt.Errorf("access of %s: that is the account with which Atoll signs in, and would lock it out of the namespace: take it off the list: %w", principal(a), errdefs.ErrInvalidArgument)
		}
		role, err := c.role(ctx, a.Role)
		if err != nil {
			return err
		}
		want = append(want, types.Permission{Principal: principal(a), Group: a.Group, RoleId: role, Propagate: true})
	}
	c.cache.mu.Lock()
	have := map[ref]string{}
	for id := range c.cache.owned[ns.UID] {
		have[id] = c.cache.objects[id].str(propPerms)
	}
	c.cache.mu.Unlock()
	for id, perms := range have {
		if !SameAccess(c.access(perms), ns.Access) {
			errs = append(errs, c.setPermissions(ctx, id, want, parsePermissions(perms), ns.Name))
		}
	}
	return errors.Join(errs...)
}

// ownGroups are those of the account with which this Client signs in.
type ownGroups struct {
	mu    sync.Mutex
	user  string
	at    time.Time
	names []string // in lower case, as vCenter names them
}

// memberOf tells whether our account is directly in a group, as vCenter's user
// directory has it: asked at most once a PolicyInterval. What is set for a group
// on an object hides what its members inherit. A directory that cannot tell says
// no.
func (c *Client) memberOf(ctx context.Context, group Access, account string) (bool, error) {
	g := &c.ownGroups
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.user != account || time.Since(g.at) > c.options.PolicyInterval {
		directory := c.session.Client().ServiceContent.UserDirectory
		if directory == nil {
			return false, nil
		}
		res, err := methods.RetrieveUserGroups(ctx, c.session, &types.RetrieveUserGroups{This: *directory, BelongsToUser: account, FindGroups: true})
		switch vsphere.Fault(err).(type) {
		case *types.NotSupported, *types.InvalidArgument, *types.NotFound:
			res = &types.RetrieveUserGroupsResponse{}
		default:
			if err != nil {
				return false, vsphere.Error(fmt.Sprintf("read the groups of %s, with which Atoll signs in", account), err)
			}
		}
		g.user, g.at, g.names = account, time.Now(), nil
		for _, r := range res.Returnval {
			if r := r.GetUserSearchResult(); r.Group {
				g.names = append(g.names, strings.ToLower(r.Principal))
			}
		}
	}
	subject, domain := strings.ToLower(group.Subject), strings.ToLower(group.Domain)
	return slices.ContainsFunc(g.names, func(name string) bool {
		return name == subject || name == domain+`\`+subject || name == subject+"@"+domain
	}), nil
}

func (c *Client) setPermissions(ctx context.Context, id ref, want, have []types.Permission, name string) error {
	manager := *c.session.Client().ServiceContent.AuthorizationManager
	// Setting merges by principal, resetting replaces: only that takes away.
	gone := slices.ContainsFunc(have, func(h types.Permission) bool {
		return !slices.ContainsFunc(want, func(w types.Permission) bool {
			return w.Group == h.Group && strings.EqualFold(w.Principal, h.Principal)
		})
	})
	props := map[string]any{propPerms: formatPermissions(want)}
	c.cache.expect(id, props)
	var err error
	if gone {
		_, err = methods.ResetEntityPermissions(ctx, c.session, &types.ResetEntityPermissions{This: manager, Entity: id, Permission: want})
	} else {
		_, err = methods.SetEntityPermissions(ctx, c.session, &types.SetEntityPermissions{This: manager, Entity: id, Permission: want})
	}
	if err != nil {
		return c.failed(id, fmt.Sprintf("set permissions of namespace %s on %s %s", name, strings.ToLower(id.Type), id.Value), err)
	}
	c.write(id, props)
	return nil
}

// readPermissions reads all permissions at once, since not every vCenter tells
// a watch of them. What is written meanwhile stands.
func (c *Client) readPermissions(ctx context.Context) error {
	manager := *c.session.Client().ServiceContent.AuthorizationManager
	res, err := methods.RetrieveAllPermissions(ctx, c.session, &types.RetrieveAllPermissions{This: manager})
	if err != nil {
		return vsphere.Error("read permissions of vCenter "+c.session.Address(), err)
	}
	all := map[ref][]types.Permission{}
	for _, p := range res.Returnval {
		if p.Entity != nil {
			all[*p.Entity] = append(all[*p.Entity], p)
		}
	}
	c.cache.permissions(all)
	return nil
}
