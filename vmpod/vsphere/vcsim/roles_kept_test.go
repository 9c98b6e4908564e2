package vcsim

import (
	"testing"

	"github.com/vmware/govmomi/object"
)

// TestRolesAreKept: a role that somebody made is there after a restart.
func TestRolesAreKept(t *testing.T) {
	dir := t.TempDir()
	s := start(t, Config{Dir: dir, AdminPassword: testPassword})
	c := signIn(t, s, AdminName)
	id, err := object.NewAuthorizationManager(c.Client).AddRole(t.Context(), "keepers", []string{"System.View"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = start(t, Config{Dir: dir})
	c = signIn(t, s, AdminName)
	roles, err := object.NewAuthorizationManager(c.Client).RoleList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := roles.ByName("keepers")
	if r == nil || r.RoleId != id || r.Info == nil || r.Info.GetDescription().Label != "keepers" {
		t.Errorf("after a restart: %+v", r)
	}
}
