package vc

import (
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vapi/rest"
	vapi "github.com/vmware/govmomi/vapi/tags"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// tagging are what tags need, which TestEachPrivilegeIsNeeded leaves out.
var tagging = []string{"InventoryService.Tagging.AttachTag", "InventoryService.Tagging.ObjectAttachable"}

// volumes are what storage/vmdk needs beside: its TestLeastPrivilegeSuffices and
// TestEachPrivilegeIsNeeded prove it, of the role in deploy/.
var volumes = []string{"Cns.Searchable", "Datastore.FileManagement", "VirtualMachine.Config.AddExistingDisk", "VirtualMachine.Config.AddRemoveDevice"}

// TestRole: the role is what is proved to suffice and to be needed, and
// deploy/vsphere-role.sh makes it.
func TestRole(t *testing.T) {
	proved := slices.Sorted(slices.Values(slices.Concat(needed, tagging, volumes)))
	if !slices.Equal(Privileges(), proved) {
		t.Errorf("the role is %v, and proved are %v", Privileges(), proved)
	}
	script, err := os.ReadFile("../../../deploy/vsphere-role.sh")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(script), "role='"+RoleName+"'\n") {
		t.Errorf("deploy/vsphere-role.sh makes no role %q", RoleName)
	}
	_, list, _ := strings.Cut(string(script), "<<'LIST'\n")
	list, _, _ = strings.Cut(list, "LIST\n")
	var want strings.Builder
	for _, p := range role {
		fmt.Fprintf(&want, "%-41s %s\n", p.ID, p.For)
	}
	if list != want.String() {
		t.Errorf("deploy/vsphere-role.sh lists\n%s\nwant\n%s", list, want.String())
	}
}

// TestRoleAndTags attaches tags under the role, and without each of the
// privileges that tags need.
func TestRoleAndTags(t *testing.T) {
	for _, missing := range append([]string{""}, tagging...) {
		t.Run("without "+missing, func(t *testing.T) {
			v := startVCenter(t, vcsim.Config{})
			v.people(t)
			ctx := t.Context()
			admin := rest.NewClient(v.admin.Client())
			if err := admin.Login(ctx, url.UserPassword(adminUser, adminPassword)); err != nil {
				t.Fatal(err)
			}
			m := vapi.NewManager(admin)
			category, err := m.CreateCategory(ctx, &vapi.Category{Name: "cost", Cardinality: "SINGLE"})
			if err != nil {
				t.Fatal(err)
			}
			tag, err := m.CreateTag(ctx, &vapi.Tag{Name: "high", CategoryID: category})
			if err != nil {
				t.Fatal(err)
			}
			h := start(t, v.serve(t, slices.DeleteFunc(Privileges(), func(id string) bool { return id == missing })), true)
			ns := team("team-a")
			ns.Tags = []string{"cost/high"}
			_, err = h.Ensure(ctx, ns)
			if missing != "" {
				mustBe(t, err, errdefs.ErrPermissionDenied, "InventoryService.Tagging.")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			objects, err := m.ListAttachedObjects(ctx, tag)
			if err != nil || len(objects) != 1 || objects[0].Reference() != v.pool(t, "team-a").id {
				t.Errorf("the tag is on %v (%v)", objects, err)
			}
			// One that somebody took away is missed at the next poll.
			told := h.toldOf(ns.Ref)
			if err := m.DetachTag(ctx, tag, v.pool(t, "team-a").id); err != nil {
				t.Fatal(err)
			}
			h.policies.wake()
			h.until(t, "the poll", func() bool { return h.toldOf(ns.Ref) > told })
			h.ensure(t, ns)
			if objects, err = m.ListAttachedObjects(ctx, tag); err != nil || len(objects) != 1 {
				t.Errorf("in the end the tag is on %v (%v)", objects, err)
			}
		})
	}
}
