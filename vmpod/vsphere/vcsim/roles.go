package vcsim

import (
	"slices"
	"strings"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// grants are all permissions of an object, as they are shown.
func (a *access) grants(ref types.ManagedObjectReference) []types.Permission {
	all := slices.Clone(a.permissions[ref])
	for i := range all {
		all[i].Entity = &ref
	}
	return all
}

func (c *call) entityPermissions() soap.HasFault {
	r := c.body.(*types.RetrieveEntityPermissions)
	if fault := c.s.reachable(c.ctx, r.Entity); fault != nil {
		return refuse(fault)
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	res := &types.RetrieveEntityPermissionsResponse{Returnval: c.s.access.grants(r.Entity)}
	if r.Inherited {
		for at := c.s.parent(r.Entity); at.Value != ""; at = c.s.parent(at) {
			for _, p := range c.s.access.grants(at) {
				if p.Propagate {
					res.Returnval = append(res.Returnval, p)
				}
			}
		}
	}
	return &methods.RetrieveEntityPermissionsBody{Res: res}
}

func (c *call) permissionsOf(role *int32) (all []types.Permission) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for ref := range c.s.access.permissions {
		for _, p := range c.s.access.grants(ref) {
			if role == nil || *role == p.RoleId {
				all = append(all, p)
			}
		}
	}
	return all
}

func (c *call) allPermissions() soap.HasFault {
	return &methods.RetrieveAllPermissionsBody{Res: &types.RetrieveAllPermissionsResponse{Returnval: c.permissionsOf(nil)}}
}

func (c *call) rolePermissions() soap.HasFault {
	r := c.body.(*types.RetrieveRolePermissions)
	return &methods.RetrieveRolePermissionsBody{Res: &types.RetrieveRolePermissionsResponse{Returnval: c.permissionsOf(&r.RoleId)}}
}

func (c *call) setPermissions() soap.HasFault {
	r := c.body.(*types.SetEntityPermissions)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if fault := c.s.grant(r.Entity, c.s.access.permissions[r.Entity], r.Permission); fault != nil {
		return refuse(fault)
	}
	return &methods.SetEntityPermissionsBody{Res: &types.SetEntityPermissionsResponse{}}
}

func (c *call) resetPermissions() soap.HasFault {
	r := c.body.(*types.ResetEntityPermissions)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if fault := c.s.grant(r.Entity, nil, r.Permission); fault != nil {
		return refuse(fault)
	}
	return &methods.ResetEntityPermissionsBody{Res: &types.ResetEntityPermissionsResponse{}}
}

func (c *call) removePermission() soap.HasFault {
	r := c.body.(*types.RemoveEntityPermission)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	have := c.s.access.permissions[r.Entity]
	rest := slices.DeleteFunc(slices.Clone(have), func(p types.Permission) bool {
		return p.Group == r.IsGroup && c.s.sameUser(p.Principal, r.User)
	})
	if len(rest) == len(have) {
		return refuse(&types.NotFound{VimFault: vimReason(r.User + " has no permission there")})
	}
	if fault := c.s.grant(r.Entity, rest, nil); fault != nil {
		return refuse(fault)
	}
	return &methods.RemoveEntityPermissionBody{Res: &types.RemoveEntityPermissionResponse{}}
}

func (s *Server) sameUser(a, b string) bool {
	pa, pb := s.users.principal(a), s.users.principal(b)
	return pa != "" && pa == pb
}

// grant makes an object's permissions those of have, with those of more added
// or changed.
func (s *Server) grant(ref types.ManagedObjectReference, have, more []types.Permission) types.BaseMethodFault {
	e, ok := s.vim.Get(ref).(mo.Entity)
	if !ok {
		return &types.ManagedObjectNotFound{Obj: ref}
	}
	all := slices.Clone(have)
	for _, p := range more {
		if !s.users.exists(p.Principal, p.Group) {
			return &types.UserNotFound{VimFault: vimReason("there is no such user or group: " + p.Principal), Principal: p.Principal, Unresolved: true}
		}
		role := s.access.role(p.RoleId)
		if role == nil || role.Name == "Anonymous" || role.Name == "View" {
			return &types.NotFound{VimFault: vimReason("there is no such role to grant")}
		}
		local, _, _ := strings.Cut(s.users.spelled(p.Principal, p.Group), "@")
		p.Entity, p.Principal = nil, strings.ToUpper(s.users.domain)+`\`+local
		all = slices.DeleteFunc(all, func(q types.Permission) bool {
			return q.Group == p.Group && strings.EqualFold(q.Principal, p.Principal)
		})
		all = append(all, p)
	}
	if ref == s.root && !s.adminLeft(all) {
		return &types.AuthMinimumAdminPermission{VimFault: vimReason("somebody has to stay an administrator")}
	}
	if len(all) == 0 {
		delete(s.access.permissions, ref)
	} else {
		s.access.permissions[ref] = all
	}
	s.update(e, set("permission", s.access.grants(ref)))
	if err := s.save(ref); err != nil {
		return brokenFault(err)
	}
	return nil
}

func (s *Server) adminLeft(all []types.Permission) bool {
	return slices.ContainsFunc(all, func(p types.Permission) bool { return p.RoleId == adminRole && p.Propagate })
}

// checkPrivileges returns ids with those that every role has.
func (s *Server) checkPrivileges(ids []string) ([]string, types.BaseMethodFault) {
	all := []string{"System.Anonymous", privRead, privView}
	for _, id := range ids {
		if !s.access.privileges[id] {
			return nil, &types.InvalidArgument{RuntimeFault: reason("there is no privilege " + id), InvalidProperty: "privIds"}
		}
		all = append(all, id)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func (c *call) addRole() soap.HasFault {
	r := c.body.(*types.AddAuthorizationRole)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if r.Name == "" {
		return refuse(&types.InvalidName{Name: r.Name})
	}
	if c.s.access.roleNamed(r.Name) != nil {
		return refuse(&types.AlreadyExists{VimFault: vimReason("there is a role of that name"), Name: r.Name})
	}
	ids, fault := c.s.checkPrivileges(r.PrivIds)
	if fault != nil {
		return refuse(fault)
	}
	id := max(firstRole, c.s.lastRole+1)
	c.s.lastRole = id
	c.s.access.roles = append(c.s.access.roles, types.AuthorizationRole{RoleId: id, Name: r.Name, Info: &types.Description{Label: r.Name, Summary: r.Name}, Privilege: ids})
	if err := c.s.rolesChanged(id); err != nil {
		return c.broken(err)
	}
	return &methods.AddAuthorizationRoleBody{Res: &types.AddAuthorizationRoleResponse{Returnval: id}}
}

func (c *call) updateRole() soap.HasFault {
	r := c.body.(*types.UpdateAuthorizationRole)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	role := c.s.access.role(r.RoleId)
	switch other := c.s.access.roleNamed(r.NewName); {
	case role == nil:
		return refuse(&types.NotFound{})
	case role.System:
		return refuse(&types.InvalidArgument{RuntimeFault: reason("system roles cannot be changed"), InvalidProperty: "roleId"})
	case other != nil && other.RoleId != r.RoleId:
		return refuse(&types.AlreadyExists{Name: r.NewName})
	}
	ids, fault := c.s.checkPrivileges(r.PrivIds)
	if fault != nil {
		return refuse(fault)
	}
	role.Privilege = ids
	if r.NewName != "" {
		role.Name, role.Info = r.NewName, &types.Description{Label: r.NewName, Summary: r.NewName}
	}
	if err := c.s.rolesChanged(r.RoleId); err != nil {
		return c.broken(err)
	}
	return &methods.UpdateAuthorizationRoleBody{Res: &types.UpdateAuthorizationRoleResponse{}}
}

func (c *call) removeRole() soap.HasFault {
	r := c.body.(*types.RemoveAuthorizationRole)
	used := c.permissionsOf(&r.RoleId)
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	role := c.s.access.role(r.RoleId)
	switch {
	case role == nil:
		return refuse(&types.NotFound{})
	case role.System:
		return refuse(&types.InvalidArgument{RuntimeFault: reason("system roles cannot be removed"), InvalidProperty: "roleId"})
	case r.FailIfUsed && len(used) > 0:
		return refuse(&types.RemoveFailed{VimFault: vimReason("permissions use the role")})
	}
	c.s.access.roles = slices.DeleteFunc(c.s.access.roles, func(x types.AuthorizationRole) bool { return x.RoleId == r.RoleId })
	for _, p := range used {
		rest := slices.DeleteFunc(slices.Clone(c.s.access.permissions[*p.Entity]), func(q types.Permission) bool { return q.RoleId == r.RoleId })
		if fault := c.s.grant(*p.Entity, rest, nil); fault != nil {
			return refuse(fault)
		}
	}
	if err := c.s.rolesChanged(r.RoleId); err != nil {
		return c.broken(err)
	}
	return &methods.RemoveAuthorizationRoleBody{Res: &types.RemoveAuthorizationRoleResponse{}}
}

// rolesChanged shows the roles and keeps the one that changed.
func (s *Server) rolesChanged(id int32) error {
	s.update(s.vim.Get(s.authorizationManager), set("roleList", slices.Clone(s.access.roles)))
	return s.saveRole(id)
}

// availability answers the questions about privileges.
func (c *call) availability(who Identity, refs []types.ManagedObjectReference, ids []string) (all []types.EntityPrivilege) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for _, ref := range refs {
		e := types.EntityPrivilege{Entity: ref}
		for _, id := range ids {
			e.PrivAvailability = append(e.PrivAvailability, types.PrivilegeAvailability{PrivId: id, IsGranted: c.s.has(who, id, ref)})
		}
		all = append(all, e)
	}
	return all
}

// ofSession is who a session belongs to: one's own, unless one may look at
// others'.
func (c *call) ofSession(id string) (Identity, types.BaseMethodFault) {
	if id == "" || id == c.ctx.Session.Key {
		return c.who, nil
	}
	return Identity{}, noPermission(demand{"Authorization.ModifyPermissions", c.s.root})
}

func (c *call) hasPrivilege() soap.HasFault {
	r := c.body.(*types.HasPrivilegeOnEntity)
	who, fault := c.ofSession(r.SessionId)
	if fault != nil {
		return refuse(fault)
	}
	res := &types.HasPrivilegeOnEntityResponse{}
	for _, p := range c.availability(who, []types.ManagedObjectReference{r.Entity}, r.PrivId)[0].PrivAvailability {
		res.Returnval = append(res.Returnval, p.IsGranted)
	}
	return &methods.HasPrivilegeOnEntityBody{Res: res}
}

func (c *call) hasPrivileges() soap.HasFault {
	r := c.body.(*types.HasPrivilegeOnEntities)
	who, fault := c.ofSession(r.SessionId)
	if fault != nil {
		return refuse(fault)
	}
	return &methods.HasPrivilegeOnEntitiesBody{Res: &types.HasPrivilegeOnEntitiesResponse{Returnval: c.availability(who, r.Entity, r.PrivId)}}
}

// named is who a question names: oneself, or anyone for who may set
// permissions.
func (c *call) named(name string) (Identity, types.BaseMethodFault) {
	if c.s.sameUser(name, c.who.Name) {
		return c.who, nil
	}
	if d, missing := c.s.missing(c.who, []demand{{"Authorization.ModifyPermissions", c.s.root}}); missing {
		return Identity{}, noPermission(d)
	}
	who, err := c.s.users.Lookup(name)
	if err != nil {
		return who, &types.UserNotFound{Principal: name}
	}
	return who, nil
}

func (c *call) hasUserPrivileges() soap.HasFault {
	r := c.body.(*types.HasUserPrivilegeOnEntities)
	who, fault := c.named(r.UserName)
	if fault != nil {
		return refuse(fault)
	}
	return &methods.HasUserPrivilegeOnEntitiesBody{Res: &types.HasUserPrivilegeOnEntitiesResponse{Returnval: c.availability(who, r.Entities, r.PrivId)}}
}

func (c *call) fetchPrivileges() soap.HasFault {
	r := c.body.(*types.FetchUserPrivilegeOnEntities)
	who, fault := c.named(r.UserName)
	if fault != nil {
		return refuse(fault)
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	res := &types.FetchUserPrivilegeOnEntitiesResponse{}
	for _, ref := range r.Entities {
		granted := types.UserPrivilegeResult{Entity: ref}
		for _, id := range c.s.rolesOn(who, ref) {
			if role := c.s.access.role(id); role != nil {
				granted.Privileges = append(granted.Privileges, role.Privilege...)
			}
		}
		slices.Sort(granted.Privileges)
		granted.Privileges = slices.Compact(granted.Privileges)
		res.Returnval = append(res.Returnval, granted)
	}
	return &methods.FetchUserPrivilegeOnEntitiesBody{Res: res}
}
