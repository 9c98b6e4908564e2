package vcsim

import (
	"context"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// privilegeOf is the privilege that a refusal names; empty if err is none.
func privilegeOf(err error) string {
	var f *types.NoPermission
	if _, ok := fault.As(err, &f); !ok {
		return ""
	}
	return f.PrivilegeId
}

// TestPermissions calls each method as a user who has every privilege but the
// one that the method needs, and then as one who has that alone.
func TestPermissions(t *testing.T) {
	s := start(t, config(""))
	root := signIn(t, s, admin)
	pool := must[*object.ResourcePool](t)(rootPool(t, root).Create(t.Context(), "p", spec()))
	other := must[*object.ResourcePool](t)(rootPool(t, root).Create(t.Context(), "other", spec()))
	folder := must[*object.Folder](t)(vmFolder(t, root).CreateFolder(t.Context(), "f"))
	field := must[*types.CustomFieldDef](t)(object.NewCustomFieldsManager(root.Client).Add(t.Context(), "k", "", nil, nil))
	for _, test := range []struct {
		privilege string
		call      func(context.Context, *govmomi.Client) error
	}{
		{"Resource.CreatePool", func(ctx context.Context, c *govmomi.Client) error {
			_, err := object.NewResourcePool(c.Client, pool.Reference()).Create(ctx, "child", spec())
			return err
		}},
		{"Resource.EditPool", func(ctx context.Context, c *govmomi.Client) error {
			limit := spec()
			limit.CpuAllocation.Limit = types.NewInt64(1000)
			return object.NewResourcePool(c.Client, pool.Reference()).UpdateConfig(ctx, "", &limit)
		}},
		{"Resource.RenamePool", func(ctx context.Context, c *govmomi.Client) error {
			return object.NewResourcePool(c.Client, pool.Reference()).UpdateConfig(ctx, "renamed", nil)
		}},
		{"Resource.MovePool", func(ctx context.Context, c *govmomi.Client) error {
			_, err := methods.MoveIntoResourcePool(ctx, c.Client, &types.MoveIntoResourcePool{This: pool.Reference(), List: []types.ManagedObjectReference{other.Reference()}})
			return err
		}},
		{"Folder.Create", func(ctx context.Context, c *govmomi.Client) error {
			_, err := object.NewFolder(c.Client, folder.Reference()).CreateFolder(ctx, "child")
			return err
		}},
		{"Folder.Rename", func(ctx context.Context, c *govmomi.Client) error {
			return finish(ctx)(object.NewFolder(c.Client, folder.Reference()).Rename(ctx, "renamed"))
		}},
		{"Global.SetCustomField", func(ctx context.Context, c *govmomi.Client) error {
			return object.NewCustomFieldsManager(c.Client).Set(ctx, pool.Reference(), field.Key, "v")
		}},
		{"Global.ManageCustomFields", func(ctx context.Context, c *govmomi.Client) error {
			_, err := object.NewCustomFieldsManager(c.Client).Add(ctx, "another", "", nil, nil)
			return err
		}},
		{"Authorization.ModifyPermissions", func(ctx context.Context, c *govmomi.Client) error {
			return object.NewAuthorizationManager(c.Client).SetEntityPermissions(ctx, pool.Reference(), []types.Permission{{Principal: AdminName, RoleId: -2}})
		}},
		{"Authorization.ModifyRoles", func(ctx context.Context, c *govmomi.Client) error {
			_, err := object.NewAuthorizationManager(c.Client).AddRole(ctx, "made", nil)
			return err
		}},
		{"Global.LogEvent", func(ctx context.Context, c *govmomi.Client) error {
			_, err := methods.LogUserEvent(ctx, c.Client, &types.LogUserEvent{This: *c.ServiceContent.EventManager, Entity: pool.Reference(), Msg: "hello"})
			return err
		}},
		{"Resource.DeletePool", func(ctx context.Context, c *govmomi.Client) error {
			return finish(ctx)(object.NewResourcePool(c.Client, pool.Reference()).Destroy(ctx))
		}},
		{"Folder.Delete", func(ctx context.Context, c *govmomi.Client) error {
			return finish(ctx)(object.NewFolder(c.Client, folder.Reference()).Destroy(ctx))
		}},
	} {
		t.Run(test.privilege, func(t *testing.T) {
			as := func(user string, privileges []string) *govmomi.Client {
				if err := s.Users().Set(user, testPassword); err != nil {
					t.Fatal(err)
				}
				if err := s.SetRole(user, privileges); err != nil {
					t.Fatal(err)
				}
				if err := s.Grant(user, user); err != nil {
					t.Fatal(err)
				}
				return signIn(t, s, user)
			}
			var others []string
			for id := range s.access.privileges {
				if id != test.privilege {
					others = append(others, id)
				}
			}
			if err := test.call(t.Context(), as("others", others)); privilegeOf(err) != test.privilege {
				t.Errorf("without it: %v", err)
			}
			if err := test.call(t.Context(), as("ada", []string{test.privilege})); err != nil {
				t.Errorf("with it alone: %v", err)
			}
		})
	}
}

// finish waits for a task.
func finish(ctx context.Context) func(*object.Task, error) error {
	return func(task *object.Task, err error) error {
		if err != nil {
			return err
		}
		return task.Wait(ctx)
	}
}

// TestInheritance follows vSphere's example: what is set nearest counts.
func TestInheritance(t *testing.T) {
	s := start(t, config(""))
	c := signIn(t, s, admin)
	top := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "top", spec()))
	low := must[*object.ResourcePool](t)(top.Create(t.Context(), "low", spec()))
	if err := s.Users().Set("ada", testPassword); err != nil {
		t.Fatal(err)
	}
	for _, g := range []string{"editors", "readers"} {
		if err := s.Users().SetGroup(g, "ada"); err != nil {
			t.Fatal(err)
		}
	}
	auth := object.NewAuthorizationManager(c.Client)
	grant := func(on *object.ResourcePool, principal string, group bool, role int32, propagate bool) {
		t.Helper()
		if err := auth.SetEntityPermissions(t.Context(), on.Reference(), []types.Permission{{Principal: principal, Group: group, RoleId: role, Propagate: propagate}}); err != nil {
			t.Fatal(err)
		}
	}
	ada := signIn(t, s, "ada")
	may := func(on *object.ResourcePool) bool {
		t.Helper()
		// Not HasPrivilegeOnEntity: its list of answers has no false ones, in
		// govmomi's XML.
		res, err := methods.HasPrivilegeOnEntities(t.Context(), ada.Client, &types.HasPrivilegeOnEntities{This: *ada.ServiceContent.AuthorizationManager, Entity: []types.ManagedObjectReference{on.Reference()}, PrivId: []string{"Resource.EditPool"}})
		if err != nil {
			t.Fatal(err)
		}
		return res.Returnval[0].PrivAvailability[0].IsGranted
	}
	check := func(what string, onTop, onLow bool) {
		t.Helper()
		if may(top) != onTop || may(low) != onLow {
			t.Errorf("%s: on top %v, want %v; on low %v, want %v", what, may(top), onTop, may(low), onLow)
		}
	}
	check("nothing granted", false, false)
	grant(top, `VSPHERE.LOCAL\editors`, true, adminRole, false)
	check("granted without propagation", true, false)
	grant(top, "editors@vsphere.local", true, adminRole, true)
	check("propagated", true, true)
	grant(low, "readers", true, -2, true)
	check("another group's read-only nearer", true, false)
	grant(low, "editors", true, adminRole, true)
	check("both groups there", true, true)
	grant(low, "ada", false, -5, true)
	check("the user's own no-access before the groups'", true, false)
	err := auth.SetEntityPermissions(t.Context(), top.Reference(), []types.Permission{{Principal: "nobody", RoleId: -2}})
	if !fault.Is(err, &types.UserNotFound{}) {
		t.Errorf("a permission for nobody: %v", err)
	}
}

// TestReading shows a user what he was granted, and the way there.
func TestReading(t *testing.T) {
	s := start(t, config(""))
	c := signIn(t, s, admin)
	mine := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "mine", spec()))
	must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "secret", spec()))
	if err := s.Users().Set("ada", testPassword); err != nil {
		t.Fatal(err)
	}
	if err := object.NewAuthorizationManager(c.Client).SetEntityPermissions(t.Context(), mine.Reference(), []types.Permission{{Principal: "ada", RoleId: -2, Propagate: true}}); err != nil {
		t.Fatal(err)
	}
	ada := signIn(t, s, "ada")
	names := poolNames(t, ada)
	if !names["mine"] || names["secret"] || !names["Resources"] {
		t.Errorf("sees %v", names)
	}
	var props []types.ObjectContent
	if err := object.NewCommon(ada.Client, mine.Reference()).Properties(t.Context(), mine.Reference(), []string{"config"}, &props); err != nil || len(props[0].PropSet) != 1 {
		t.Errorf("own pool's config: %v %v", props, err)
	}
	props = nil
	up := rootPool(t, c).Reference()
	if err := object.NewCommon(ada.Client, up).Properties(t.Context(), up, []string{"config"}, &props); err != nil || len(props[0].PropSet) != 0 || len(props[0].MissingSet) != 1 {
		t.Errorf("root pool's config: %v %v", props, err)
	}
}

// TestRefused are ways around the password, and into this host, that the stock
// simulator has.
func TestRefused(t *testing.T) {
	s := start(t, config(""))
	anyone := must[*govmomi.Client](t)(connect(t.Context(), s, admin, testPassword))
	if err := anyone.Logout(t.Context()); err != nil {
		t.Fatal(err)
	}
	manager := *anyone.ServiceContent.SessionManager
	if _, err := methods.LoginByToken(t.Context(), anyone.Client, &types.LoginByToken{This: manager}); err == nil {
		t.Error("any token signs in")
	}
	if _, err := methods.CloneSession(t.Context(), anyone.Client, &types.CloneSession{This: manager}); err == nil {
		t.Error("any ticket signs in")
	}
	c := signIn(t, s, admin)
	if _, err := methods.ImpersonateUser(t.Context(), c.Client, &types.ImpersonateUser{This: manager, UserName: "root"}); err == nil {
		t.Error("sessions can be taken over")
	}
	_, err := methods.DeleteDatastoreFile_Task(t.Context(), c.Client, &types.DeleteDatastoreFile_Task{This: *c.ServiceContent.FileManager, Name: "[atoll] ../x"})
	if !soap.IsSoapFault(err) {
		t.Errorf("files of this host can be reached: %v", err)
	}
}
