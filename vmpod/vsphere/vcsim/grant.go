package vcsim

import (
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/types"
)

// SetRole makes a role, or gives it other privileges. System roles are
// ErrPermissionDenied, a privilege that there is not is ErrInvalidArgument.
func (s *Server) SetRole(name string, privileges []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	ids, fault := s.checkPrivileges(privileges)
	if fault != nil {
		return fmt.Errorf("vcsim: role %q: %s: %w", name, messageOf(fault), errdefs.ErrInvalidArgument)
	}
	role := s.access.roleNamed(name)
	switch {
	case role == nil:
		s.lastRole = max(firstRole, s.lastRole+1)
		s.access.roles = append(s.access.roles, types.AuthorizationRole{RoleId: s.lastRole, Name: name, Info: &types.Description{Label: name, Summary: name}})
		role = &s.access.roles[len(s.access.roles)-1]
	case role.System:
		return fmt.Errorf("vcsim: role %q is the system's: %w", name, errdefs.ErrPermissionDenied)
	case slices.Equal(role.Privilege, ids):
		return nil
	}
	role.Privilege = ids
	return s.rolesChanged(role.RoleId)
}

// Grant gives a user a role ("Admin" is the administrator's) on everything.
// An unknown user or role is ErrNotFound.
func (s *Server) Grant(user, roleName string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	role := s.access.roleNamed(roleName)
	if role == nil {
		return fmt.Errorf("vcsim: grant: role %q: %w", roleName, errdefs.ErrNotFound)
	}
	if fault := s.grant(s.root, s.access.permissions[s.root], []types.Permission{{Principal: user, RoleId: role.RoleId, Propagate: true}}); fault != nil {
		return fmt.Errorf("vcsim: grant role %q to %s: %s: %w", roleName, user, messageOf(fault), errdefs.ErrNotFound)
	}
	return nil
}
