package controlplane

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/mo"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// within acts while there is no controller, starts one, kills it while vCenter
// has its calls of all these methods in hand, before they are done, and starts
// it again.
func (k *keeper) within(t *testing.T, act func(), methods ...string) {
	t.Helper()
	k.kill(t)
	act()
	faults := k.n.vc.Faults()
	before := faults.Calls()
	var remove []func()
	for _, m := range methods {
		remove = append(remove, faults.Add(vcsim.Fault{Method: m, User: nsUser, Delay: time.Minute}))
	}
	k.start(t)
	for deadline := time.Now().Add(killedTimeout); ; time.Sleep(5 * time.Millisecond) {
		now := faults.Calls()
		i := slices.IndexFunc(methods, func(m string) bool { return now[m] == before[m] })
		if i < 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s was not called in %s", methods[i], killedTimeout)
		}
	}
	k.kill(t)
	for _, f := range remove {
		f()
	}
	k.start(t)
}

// changeEach changes every field that reaches vSphere, each of a namespace of
// its own, and kills the controller in the middle of all.
func (k *keeper) changeEach(t *testing.T) {
	n := k.n
	changes := []struct {
		name  string
		spec  func(*v1alpha1.SupervisorNamespaceSpec)
		check func(p mo.ResourcePool, f mo.Folder) bool
	}{
		{"cpu-limit", func(s *v1alpha1.SupervisorNamespaceSpec) { s.CPU.Limit = quantity("6") },
			func(p mo.ResourcePool, _ mo.Folder) bool { return *p.Config.CpuAllocation.Limit == 6*nsMHz }},
		{"cpu-reservation", func(s *v1alpha1.SupervisorNamespaceSpec) { s.CPU.Reservation = nil },
			func(p mo.ResourcePool, _ mo.Folder) bool { return *p.Config.CpuAllocation.Reservation == 0 }},
		{"cpu-shares", func(s *v1alpha1.SupervisorNamespaceSpec) { s.CPU.Shares = &v1alpha1.Shares{Level: v1alpha1.SharesLow} },
			func(p mo.ResourcePool, _ mo.Folder) bool { return p.Config.CpuAllocation.Shares.Level == "low" }},
		{"memory", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Memory = nil },
			func(p mo.ResourcePool, _ mo.Folder) bool { return *p.Config.MemoryAllocation.Limit == -1 }},
		{"access-less", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Access = s.Access[:1] },
			func(p mo.ResourcePool, f mo.Folder) bool { return len(p.Permission) == 1 && len(f.Permission) == 1 }},
		{"access-more", func(s *v1alpha1.SupervisorNamespaceSpec) {
			s.Access = append(s.Access, v1alpha1.AccessEntry{Kind: v1alpha1.UserSubject, Name: "ada", Role: v1alpha1.RoleView})
		}, func(p mo.ResourcePool, f mo.Folder) bool { return len(p.Permission) == 3 && len(f.Permission) == 3 }},
		{"description", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Description = "another" }, n.hasField(t, "atoll.description", "another")},
		{"attribute", func(s *v1alpha1.SupervisorNamespaceSpec) { s.Attributes = map[string]string{"costcenter": "4711"} }, n.hasField(t, "costcenter", "4711")},
	}
	for _, c := range changes {
		n.apply(t, shop(c.name))
	}
	for _, c := range changes {
		n.synced(t, c.name)
	}
	k.within(t, func() {
		for _, c := range changes {
			edit(t, n, svns(c.name), func(ns *v1alpha1.SupervisorNamespace) { c.spec(&ns.Spec) })
		}
	}, "UpdateConfig", "SetField", "SetEntityPermissions", "ResetEntityPermissions")
	for _, c := range changes {
		n.synced(t, c.name)
		if p, f := n.one(t, c.name); !c.check(p, f) {
			t.Errorf("%s: the pool is %+v, the folder %+v", c.name, p, f)
		}
	}
}

// hasField checks a custom attribute of a pool.
func (n *namespacesTest) hasField(t *testing.T, name, value string) func(mo.ResourcePool, mo.Folder) bool {
	return func(p mo.ResourcePool, _ mo.Folder) bool {
		got, err := n.field(t, p.Self, name)
		return err == nil && got == value
	}
}

// driftEach has an administrator change everything there is, each of a namespace
// of its own, and kills the controller in the middle of mending all.
func (k *keeper) driftEach(t *testing.T) {
	n := k.n
	name := func(i int) string { return fmt.Sprint("d-", i) }
	kinds := len(n.byHand(t, ""))
	for i := range kinds {
		ns := shop(name(i))
		ns.Spec.DriftPolicy.Limits, ns.Spec.Attributes = v1alpha1.Mend, map[string]string{"costcenter": "4711"}
		n.apply(t, ns)
	}
	for i := range kinds {
		n.synced(t, name(i))
	}
	k.within(t, func() {
		for i := range kinds {
			c := n.byHand(t, name(i))[i]
			if err := c.act(t); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
		}
	}, "UpdateConfig", "MoveIntoResourcePool", "CreateResourcePool", "CreateFolder", "Rename_Task", "MoveIntoFolder_Task", "SetField", "SetEntityPermissions", "ResetEntityPermissions")
	for i := range kinds {
		eventually(t, "mended: "+n.byHand(t, name(i))[i].name, func() error { return n.inStep(t, name(i)) })
		n.synced(t, name(i))
	}
	n.whole(t, name(0), 4)
}

// orphans: what a namespace without an object has in vSphere goes after the
// grace, and nothing that is not ours.
func (n *namespacesTest) orphans(t *testing.T) {
	n.apply(t, shop("forsaken"))
	n.synced(t, "forsaken")
	n.forsake(t, "forsaken")
	if have := n.vsphere(t, "forsaken"); len(have.pools) != 1 || len(have.folders) != 1 {
		t.Errorf("it went at once: %+v", have)
	}
	eventually(t, "pool and folder are gone", func() error {
		have, err := n.look(t.Context(), "forsaken") // fails while one goes
		if err == nil && len(have.pools)+len(have.folders) != 0 {
			err = errors.New("they are there")
		}
		return err
	})
	if err := n.admin.Get(t.Context(), client.ObjectKey{Name: "k-0"}, svns("k-0")); err != nil {
		t.Error(err)
	}
	n.one(t, "k-0")
}
