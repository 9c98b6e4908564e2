package vcsim

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/mo"
)

// TestMirror shows a pod, moves it, and passes power operations on.
func TestMirror(t *testing.T) {
	var asked []PowerRequest
	answer := errors.New("the pod has a restart policy")
	c := config("")
	c.Power = func(_ context.Context, r PowerRequest) error {
		asked = append(asked, r)
		return answer
	}
	s := start(t, c)
	client := signIn(t, s, admin)
	pool := must[*object.ResourcePool](t)(rootPool(t, client).Create(t.Context(), "team", spec()))
	folder := must[*object.Folder](t)(vmFolder(t, client).CreateFolder(t.Context(), "team"))
	m := Mirror{UUID: podUUID, Name: "web", CPUs: 2, MemoryMiB: 512, On: true, Host: "node-1", Addresses: []string{"198.19.0.7"}, Annotations: map[string]string{"vmware-system-vm-moid": "x"}, Note: "pod team/web"}
	id := must[string](t)(s.Mirror(t.Context(), m))
	m.Pool, m.Folder, m.Host = pool.Reference().Value, folder.Reference().Value, "node-2"
	if again := must[string](t)(s.Mirror(t.Context(), m)); again != id {
		t.Errorf("id %s, was %s", again, id)
	}
	vm := must[*object.VirtualMachine](t)(find.NewFinder(client.Client).VirtualMachine(t.Context(), "/Atoll/vm/team/web"))
	var seen mo.VirtualMachine
	if err := vm.Properties(t.Context(), vm.Reference(), []string{"config", "guest", "runtime", "resourcePool", "summary"}, &seen); err != nil {
		t.Fatal(err)
	}
	if seen.Config.InstanceUuid != podUUID || seen.Config.Hardware.NumCPU != 2 || seen.Config.Hardware.MemoryMB != 512 || seen.Guest.IpAddress != "198.19.0.7" ||
		seen.Runtime.PowerState != "poweredOn" || *seen.Runtime.Host != s.inventory.hosts["node-2"] || *seen.ResourcePool != pool.Reference() || len(seen.Config.ExtraConfig) != 1 {
		t.Errorf("seen %+v %+v", seen.Config, seen.Runtime)
	}
	if found := must[object.Reference](t)(object.NewSearchIndex(client.Client).FindByUuid(t.Context(), s.find(t, client), podUUID, true, newTrue())); found == nil || found.Reference().Value != id {
		t.Errorf("by UUID: %v", found)
	}
	err := finish(t.Context())(vm.PowerOff(t.Context()))
	if err == nil || !strings.Contains(err.Error(), answer.Error()) {
		t.Errorf("power off: %v", err)
	}
	answer = nil
	if err := vm.ShutdownGuest(t.Context()); err != nil {
		t.Error(err)
	}
	if err := finish(t.Context())(vm.Destroy(t.Context())); err != nil {
		t.Error(err)
	}
	want := []PowerRequest{{PowerOff, podUUID, admin}, {GuestShutdown, podUUID, admin}, {Destroy, podUUID, admin}}
	if len(asked) != len(want) || asked[0] != want[0] || asked[1] != want[1] || asked[2] != want[2] {
		t.Errorf("asked %+v", asked)
	}
	if err := finish(t.Context())(folder.Destroy(t.Context())); err == nil {
		t.Error("a folder with a pod's VM was destroyed")
	}
	if err := errors.Join(s.Unmirror(t.Context(), podUUID), s.Unmirror(t.Context(), podUUID)); err != nil || len(s.Mirrors()) != 0 {
		t.Errorf("unmirror: %v, left %v", err, s.Mirrors())
	}
	if err := finish(t.Context())(folder.Destroy(t.Context())); err != nil {
		t.Error(err)
	}
	m.Pool = "resgroup-404"
	if _, err := s.Mirror(t.Context(), m); err == nil {
		t.Error("a mirror in a pool that is not there")
	}
}

func (s *Server) find(t *testing.T, c *govmomi.Client) *object.Datacenter {
	t.Helper()
	return must[*object.Datacenter](t)(find.NewFinder(c.Client).Datacenter(t.Context(), "/Atoll"))
}

func newTrue() *bool { b := true; return &b }
