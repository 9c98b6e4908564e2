package vmdk

import (
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// TestPolicyNames are DNS labels, and no two are the same.
func TestPolicyNames(t *testing.T) {
	d := &Disks{}
	taken := map[string]bool{}
	for _, c := range []struct{ id, name, want string }{
		{"aa-1", "vSAN Default Storage Policy", "vsan-default-storage-policy"},
		{"bb-2", "vsan  default storage policy!", "vsan-default-storage-policy-bb-2"},
		{"cc-3", "日本", "cc-3"},
		{"dddddddddddd", strings.Repeat("x", 80), strings.Repeat("x", 63)},
		{"eeeeeeeeeeee", strings.Repeat("x", 80), strings.Repeat("x", 54) + "-eeeeeeee"},
	} {
		if got := d.policyName(c.id, c.name, taken); got != c.want {
			t.Errorf("%q is %q, want %q", c.name, got, c.want)
		}
	}
	d.options.PolicyName = func(id, _ string) string { return "as-" + id }
	if got := d.policyName("aa-1", "x", map[string]bool{}); got != "as-aa-1" {
		t.Errorf("a name that is given is %q", got)
	}
}

// TestStoresOutOfReach take no new volumes, and do again when they are back.
func TestStoresOutOfReach(t *testing.T) {
	var s stores
	s.init()
	id := ref{Type: "Datastore", Value: "datastore-1"}
	host := ref{Type: "HostSystem", Value: "host-1"}
	s.Replace([]vsphere.Update{
		{Object: id, Props: map[string]types.AnyType{
			"name": "ds", "summary.url": "ds:///1/", "summary.capacity": int64(10), "summary.freeSpace": int64(4), "summary.accessible": true,
			"summary.maintenanceMode": "normal", "host": types.ArrayOfDatastoreHostMount{DatastoreHostMount: []types.DatastoreHostMount{{Key: host}}},
		}},
		{Object: host, Props: map[string]types.AnyType{"name": "esx-1"}},
	})
	for i, c := range []struct {
		change map[string]types.AnyType
		usable bool
	}{
		{nil, true},
		{map[string]types.AnyType{"summary.accessible": false}, false},
		{map[string]types.AnyType{"summary.accessible": true, "summary.maintenanceMode": "inMaintenance"}, false},
		{map[string]types.AnyType{"summary.maintenanceMode": "normal"}, true},
	} {
		s.Apply([]vsphere.Update{{Object: id, Props: c.change}})
		all, err := s.list(t.Context())
		if err != nil || len(all) != 1 || all[0].capacity != 10 || all[0].free != 4 || s.topology(all[0]).Host != "esx-1" {
			t.Fatalf("%+v, %v", all, err)
		}
		if got := !all[0].lost && !all[0].resting; got != c.usable {
			t.Errorf("%d: usable %v, want %v", i, got, c.usable)
		}
	}
}
