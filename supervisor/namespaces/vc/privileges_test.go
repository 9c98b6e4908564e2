package vc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const (
	serviceUser     = "atoll@vsphere.local"
	servicePassword = "battery staple"
)

// needed is all that a Client uses, but for the tags of vAPI.
var needed = []string{
	"Authorization.ModifyPermissions",
	"Authorization.ModifyRoles",
	"Folder.Create",
	"Folder.Delete",
	"Folder.Move",
	"Folder.Rename",
	"Global.LogEvent",
	"Global.ManageCustomFields",
	"Global.SetCustomField",
	"Resource.CreatePool",
	"Resource.DeletePool",
	"Resource.EditPool",
	"Resource.MovePool",
	"Resource.RenamePool",
	"StorageProfile.View",
}

// serve gives the service user a role with some privileges, everywhere.
func (v *vcenter) serve(t *testing.T, privileges []string) Options {
	t.Helper()
	if err := v.Users().Set(serviceUser, servicePassword); err != nil {
		t.Fatal(err)
	}
	content := v.admin.Client().ServiceContent
	role, err := methods.AddAuthorizationRole(t.Context(), v.admin, &types.AddAuthorizationRole{This: *content.AuthorizationManager, Name: "atoll", PrivIds: privileges})
	if err != nil {
		t.Fatal(err)
	}
	_, err = methods.SetEntityPermissions(t.Context(), v.admin, &types.SetEntityPermissions{
		This: *content.AuthorizationManager, Entity: content.RootFolder,
		Permission: []types.Permission{{Principal: serviceUser, RoleId: role.Returnval, Propagate: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	o := v.options()
	o.Credentials = func(context.Context) (Credentials, error) { return Credentials{serviceUser, servicePassword}, nil }
	return o
}

// life does everything that a Client can do with a namespace.
func (v *vcenter) life(t *testing.T, h *harness) error {
	t.Helper()
	ns := team("team-a")
	if _, err := h.State(ns.Ref); err != nil {
		return err
	}
	s, err := h.Ensure(t.Context(), ns)
	if err != nil {
		return err
	}
	elsewhere := v.createPool(t, "Resources", "elsewhere")
	if _, err := methods.MoveIntoResourcePool(t.Context(), v.admin, &types.MoveIntoResourcePool{This: elsewhere, List: []ref{poolRef(s.Pools[0].ID)}}); err != nil {
		t.Fatal(err)
	}
	other := v.inventory(t, "Folder")["vm"].id
	if _, err := methods.MoveIntoFolder_Task(t.Context(), v.admin, &types.MoveIntoFolder_Task{This: other, List: []ref{folderRef(s.Folder.ID)}}); err != nil {
		t.Fatal(err)
	}
	h.until(t, "both moves", func() bool {
		s, err := h.State(ns.Ref)
		return err == nil && len(Diff(ns, s)) == 2
	})
	ns.Pools[0].CPU.Limit++
	_, changed := h.Ensure(t.Context(), ns)
	_, _, policies := h.Policies()
	if errdefs.IsUnavailable(policies) {
		h.until(t, "the policies", func() bool { _, _, policies = h.Policies(); return !errdefs.IsUnavailable(policies) })
	}
	return errors.Join(changed, h.Post(t.Context(), ns.Ref, Event{EventInfo, "hello"}), policies, h.Delete(t.Context(), ns.Ref))
}

func TestLeastPrivilegeSuffices(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.serve(t, needed), true)
	if err := v.life(t, h); err != nil {
		t.Fatal(err)
	}
	if err := h.Health().PermissionsErr; err != nil {
		t.Error(err)
	}
	ns := team("team-a")
	ns.Access[0].Subject = "atoll"
	_, err := h.Ensure(t.Context(), ns)
	mustBe(t, err, errdefs.ErrInvalidArgument, "would lock it out")
}

// Each privilege is needed, and an error names the one that is missing.
func TestEachPrivilegeIsNeeded(t *testing.T) {
	for i, missing := range needed {
		t.Run(missing, func(t *testing.T) {
			v := startVCenter(t, vcsim.Config{})
			v.people(t)
			o := v.serve(t, slices.Delete(slices.Clone(needed), i, i+1))
			h := start0(t, o)
			h.until(t, "an answer", func() bool { err := h.Health().Err; return err == nil || !errdefs.IsUnavailable(err) })
			err := v.life(t, h)
			mustBe(t, err, errdefs.ErrPermissionDenied, fmt.Sprintf("lacks the privilege %s on ", missing))
			if strings.Contains(fmt.Sprint(err), servicePassword) {
				t.Error("the error holds a password")
			}
		})
	}
}

// A permission that is withdrawn is named, and what was made is still there.
func TestPermissionWithdrawn(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.serve(t, needed), true)
	ns := team("team-a")
	h.ensure(t, ns)
	content := v.admin.Client().ServiceContent
	_, err := methods.RemoveEntityPermission(t.Context(), v.admin, &types.RemoveEntityPermission{This: *content.AuthorizationManager, Entity: content.RootFolder, User: serviceUser})
	if err != nil {
		t.Fatal(err)
	}
	ns.Pools[0].CPU.Limit++
	_, err = h.Ensure(t.Context(), ns)
	if !errdefs.IsPermissionDenied(err) && !errdefs.IsUnavailable(err) {
		t.Errorf("Ensure without any permission: %v", err)
	}
	if err := h.Delete(t.Context(), ns.Ref); !errdefs.IsPermissionDenied(err) {
		t.Errorf("Delete without any permission: %v", err)
	}
	h.session.Logout(t.Context()) // the next session sees nothing
	h.until(t, "blindness", func() bool { _, err := h.State(ns.Ref); return errdefs.IsPermissionDenied(err) })
	if err := h.Delete(t.Context(), ns.Ref); !errdefs.IsPermissionDenied(err) && !errdefs.IsUnavailable(err) {
		t.Errorf("Delete without any permission: %v", err)
	}
	v.pool(t, "team-a")
}

// A pool that is hidden from Atoll is not gone.
func TestHiddenPoolIsNotGone(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.serve(t, needed), true)
	ns := team("team-a")
	ns.Access = nil
	s := h.ensure(t, ns)
	pool := poolRef(s.Pools[0].ID)
	const noAccess = -5
	_, err := methods.SetEntityPermissions(t.Context(), v.admin, &types.SetEntityPermissions{
		This: *v.admin.Client().ServiceContent.AuthorizationManager, Entity: pool,
		Permission: []types.Permission{{Principal: serviceUser, RoleId: noAccess, Propagate: true}},
	})
	if err != nil {
		t.Fatal(err)
	}
	h.again(t) // the next session sees less
	h.until(t, "the pool's leave", func() bool { s, err := h.State(ns.Ref); return err == nil && len(s.Pools) == 0 })
	_, err = h.Ensure(t.Context(), ns)
	mustBe(t, err, errdefs.ErrPermissionDenied, pool.Value)
	mustBe(t, h.Delete(t.Context(), ns.Ref), errdefs.ErrPermissionDenied, pool.Value)
	if n := len(v.inventory(t, "ResourcePool")); n != 3 {
		t.Errorf("%d pools, want Resources, Namespaces and team-a", n)
	}
}

// again ends the session and waits for what the next one brings.
func (h *harness) again(t *testing.T) {
	t.Helper()
	before := h.session.Logins()
	h.session.Logout(t.Context())
	h.until(t, "a new session", func() bool { return h.session.Logins() > before && h.Health().Connected })
}
