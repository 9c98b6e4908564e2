package vcsim

import (
	"slices"
	"strings"

	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// The privileges that the code names itself.
const (
	privView = "System.View"
	privRead = "System.Read"
)

const adminRole int32 = -1

// firstRole is the id of the first role that a user makes, as in a vCenter.
const firstRole int32 = 101

// systemRoles are those that every vCenter has and nobody changes.
func systemRoles() []types.AuthorizationRole {
	roles := make([]types.AuthorizationRole, 0, len(esx.RoleList))
	for _, r := range esx.RoleList {
		r.Privilege = slices.Clone(r.Privilege)
		roles = append(roles, r)
	}
	return roles
}

// A demand is one privilege that a call needs, on one object.
type demand struct {
	privilege string
	on        types.ManagedObjectReference
}

// An access knows who may do what: all permissions and roles. The server's mu
// guards it.
type access struct {
	roles       []types.AuthorizationRole
	permissions map[types.ManagedObjectReference][]types.Permission
	privileges  map[string]bool // all that there are
}

func newAccess() access {
	a := access{roles: systemRoles(), permissions: map[types.ManagedObjectReference][]types.Permission{}, privileges: map[string]bool{}}
	for _, p := range a.role(adminRole).Privilege {
		a.privileges[p] = true
	}
	return a
}

func (a *access) role(id int32) *types.AuthorizationRole {
	for i := range a.roles {
		if a.roles[i].RoleId == id {
			return &a.roles[i]
		}
	}
	return nil
}

func (a *access) roleNamed(name string) *types.AuthorizationRole {
	for i := range a.roles {
		if a.roles[i].Name == name {
			return &a.roles[i]
		}
	}
	return nil
}

// principal is how permissions name a user or group: VSPHERE.LOCAL\name.
func (s *Server) principal(identity string) string {
	local, domain, _ := strings.Cut(identity, "@")
	return strings.ToUpper(domain) + `\` + local
}

// has tells whether who has a privilege on an object. vSphere's rule
// ("Hierarchical Inheritance of Permissions"): what is set nearest to the
// object counts alone; there, what is set for the user before what is set for
// the groups, of which all count together. A VM inherits from its folder and
// from its pool, and has what either gives. Call it with s.mu held.
func (s *Server) has(who Identity, privilege string, on types.ManagedObjectReference) bool {
	return slices.ContainsFunc(s.rolesOn(who, on), func(id int32) bool {
		r := s.access.role(id)
		return r != nil && slices.Contains(r.Privilege, privilege)
	})
}

func (s *Server) rolesOn(who Identity, on types.ManagedObjectReference) []int32 {
	var roles []int32
	for _, line := range s.lines(on) {
		for i, ref := range line {
			if found := s.rolesAt(who, ref, i > 0); found != nil {
				roles = append(roles, found...)
				break
			}
		}
	}
	return roles
}

// rolesAt are the roles that an object's own permissions give; nil: none are
// about who. inherited says that it is an ancestor of what was asked about.
func (s *Server) rolesAt(who Identity, ref types.ManagedObjectReference, inherited bool) []int32 {
	var user, groups []int32
	for _, p := range s.access.permissions[ref] {
		switch {
		case inherited && !p.Propagate:
		case !p.Group && strings.EqualFold(p.Principal, s.principal(who.Name)):
			user = append(user, p.RoleId)
		case p.Group && slices.ContainsFunc(who.Groups, func(g string) bool { return strings.EqualFold(p.Principal, s.principal(g)) }):
			groups = append(groups, p.RoleId)
		}
	}
	if user != nil {
		return user
	}
	return groups
}

// lines are the ways from an object up to the root folder, itself first. What
// is no entity (a manager) is looked up at the root.
func (s *Server) lines(ref types.ManagedObjectReference) [][]types.ManagedObjectReference {
	root := s.vim.Get(s.root).(mo.Entity).Entity().Self
	var parents []types.ManagedObjectReference
	if vm, ok := s.mirrorOf(ref); ok {
		parents = []types.ManagedObjectReference{vm.folder, vm.pool}
	} else {
		parents = []types.ManagedObjectReference{s.parent(ref)}
	}
	var lines [][]types.ManagedObjectReference
	for _, p := range parents {
		line := []types.ManagedObjectReference{ref}
		for at := p; at.Value != "" && len(line) < 64; at = s.parent(at) {
			line = append(line, at)
		}
		if line[len(line)-1] != root {
			line = append(line, root)
		}
		lines = append(lines, line)
	}
	return lines
}

// parent of an entity; zero for the root and for what is no entity.
func (s *Server) parent(ref types.ManagedObjectReference) types.ManagedObjectReference {
	e, ok := s.vim.Get(ref).(mo.Entity)
	if !ok {
		return types.ManagedObjectReference{}
	}
	var parent *types.ManagedObjectReference
	s.locked(e, func() { parent = e.Entity().Parent })
	if parent == nil {
		return types.ManagedObjectReference{}
	}
	return *parent
}

// missing returns the first demand that who does not meet.
func (s *Server) missing(who Identity, demands []demand) (demand, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range demands {
		if !s.has(who, d.privilege, d.on) {
			return d, true
		}
	}
	return demand{}, false
}

func noPermission(d demand) types.BaseMethodFault {
	on := d.on
	return &types.NoPermission{
		SecurityError: types.SecurityError{RuntimeFault: reason("Permission to perform this operation was denied: privilege " + d.privilege + " is missing on " + on.String())},
		Object:        &on, PrivilegeId: d.privilege,
		MissingPrivileges: []types.NoPermissionEntityPrivileges{{Entity: on, PrivilegeIds: []string{d.privilege}}},
	}
}

// sees tells whether who may know of an object: it, or something below it, was
// granted. Call it with s.mu held.
func (s *Server) sees(who Identity, ref types.ManagedObjectReference) (view, read bool) {
	if _, entity := s.vim.Get(ref).(mo.Entity); !entity {
		return true, true
	}
	if s.has(who, privRead, ref) {
		return true, true
	}
	return s.has(who, privView, ref) || s.leadsTo(who, ref), false
}

// leadsTo tells whether an object is on the way to something that was granted
// to who: such an object's place in the tree is shown, and nothing else of it.
func (s *Server) leadsTo(who Identity, ref types.ManagedObjectReference) bool {
	for at := range s.access.permissions {
		if len(s.rolesAt(who, at, false)) == 0 {
			continue
		}
		for _, line := range s.lines(at) {
			if slices.Contains(line, ref) {
				return true
			}
		}
	}
	return false
}

// treeProperties are shown of objects that only lead to others.
var treeProperties = []string{"name", "parent", "childEntity", "vmFolder", "hostFolder", "datastoreFolder", "networkFolder", "resourcePool", "childType", "owner"}
