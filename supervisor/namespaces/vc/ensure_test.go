package vc

import (
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

func TestEnsureMakesWhatIsAskedAndNoCallMore(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	h.ensure(t, team("first")) // parents, attributes and roles are made with it

	ns := team("team-a")
	n, made := h.count(func() { h.ensure(t, ns) })
	if n > 10 {
		t.Errorf("%d calls to make a namespace, want at most 10: %v", n, made)
	}
	p := v.pool(t, "team-a")
	if parent := v.pool(t, DefaultParent); p.parent != parent.id.Value {
		t.Errorf("the pool's parent is %s, want %s", p.parent, parent.id.Value)
	}
	cpu, mem := p.config.CpuAllocation, p.config.MemoryAllocation
	if *cpu.Limit != 4000 || *cpu.Reservation != 500 || !*cpu.ExpandableReservation || cpu.Shares.Level != types.SharesLevelNormal ||
		*mem.Limit != 4096 || *mem.Reservation != 1024 || mem.Shares.Level != types.SharesLevelHigh || p.perms != 2 {
		t.Errorf("the pool is %+v, %+v with %d permissions", cpu, mem, p.perms)
	}
	if f := v.inventory(t, "Folder")["team-a"]; f.parent != v.inventory(t, "Folder")[DefaultParent].id.Value || f.perms != 2 {
		t.Errorf("the folder is %+v", f)
	}

	same := func(what string) {
		t.Helper()
		if n, made := h.count(func() { h.ensure(t, ns) }); n != 0 {
			t.Errorf("%d calls %s, want none: %v", n, what, made)
		}
	}
	same("with nothing to change")
	for _, c := range []struct {
		what   string
		change func()
	}{
		{"another limit", func() { ns.Pools[0].CPU.Limit = 5000 }},
		{"all allocations", func() { ns.Pools[0].CPU.Reservation, ns.Pools[0].Memory.Limit = 600, Unlimited }},
		{"a fixed reservation", func() { ns.Pools[0].CPU.Fixed = true }},
		{"custom shares", func() { ns.Pools[0].Memory.Shares = Shares{SharesCustom, 1234} }},
		{"another description", func() { ns.Description = "new" }},
		{"no description", func() { ns.Description = "" }},
		{"one more in", func() { ns.Access = append(ns.Access, Access{Subject: "eve", Domain: "vsphere.local", Role: RoleView}) }},
		{"another role", func() { ns.Access[0].Role = RoleView }},
		{"one less in", func() { ns.Access = ns.Access[1:] }},
		{"nobody in", func() { ns.Access = []Access{} }},
	} {
		c.change()
		n, made := h.count(func() { h.ensure(t, ns) })
		if n == 0 || n > 3 {
			t.Errorf("%s: %d calls, want 1 to 3: %v", c.what, n, made)
		}
		same("after " + c.what)
	}
	if got := v.pool(t, "team-a"); got.perms != 0 || *got.config.CpuAllocation.ExpandableReservation || got.config.MemoryAllocation.Shares.Shares != 1234 {
		t.Errorf("in the end the pool is %+v", got)
	}
	if h.toldOf(ns.Ref) != 0 {
		t.Errorf("told %d times of what this client made itself", h.toldOf(ns.Ref))
	}
}

// Whatever call is the last before a crash, with or without its effect, the
// next Ensure finds it: one pool, one folder.
func TestCrashAtEveryCall(t *testing.T) {
	methods := []string{"CreateResourcePool", "CreateFolder", "SetField", "UpdateConfig", "Rename_Task", "SetEntityPermissions", "ModifyListView"}
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	o := v.options()
	crashing := start(t, o, true)
	crashing.ensure(t, team("first"))
	uid := 0
	for _, method := range methods {
		for skip := range 2 {
			for _, late := range []bool{false, true} {
				name := fmt.Sprintf("%s-%d-%v", method, skip, late)
				t.Run(name, func(t *testing.T) {
					ns := team("ns-" + name)
					ns.UID = fmt.Sprintf("uid-%d", uid)
					uid++
					remove := v.Faults().Add(vcsim.Fault{Method: method, Skip: skip, Times: 1, Drop: true, Late: late})
					_, err := crashing.Ensure(t.Context(), ns)
					if err != nil && !errdefs.IsUnavailable(err) {
						t.Errorf("the answer was lost: %v, want ErrUnavailable", err)
					}
					remove()
					h := start(t, o, false) // it knows what vCenter knows, as after kill -9
					h.ensure(t, ns)
					v.pool(t, ns.Name)
					for pool := range v.inventory(t, "ResourcePool") {
						if pool == h.cache.unfinished(ns.UID) {
							t.Errorf("pool %s is left behind", pool)
						}
					}
					if _, ok := v.inventory(t, "Folder")[h.cache.unfinished(ns.UID)]; ok {
						t.Error("an unfinished folder is left behind")
					}
					h.stop()
				})
			}
		}
	}
}

func TestNameThatIsNotOurs(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	h.ensure(t, team("first"))
	foreign := v.createPool(t, DefaultParent, "team-a")
	h.until(t, "the administrator's pool", func() bool { return h.seen(foreign) })

	ns := team("team-a")
	_, err := h.Ensure(t.Context(), ns)
	mustBe(t, err, errdefs.ErrAlreadyExists, `resource pool "Namespaces/team-a" (`+foreign.Value+`) is there and is not this namespace's: it bears no mark of Atoll`)
	var about *PartError
	if !errors.As(err, &about) || about.Field != FieldName {
		t.Errorf("the error is about %+v, want the name", about)
	}
	if err := h.Delete(t.Context(), ns.Ref); err != nil {
		t.Fatal(err)
	}
	if got := v.pool(t, "team-a"); got.id != foreign {
		t.Errorf("the administrator's pool is now %+v", got)
	}

	other := v.options()
	other.Supervisor = "another"
	h2 := start(t, other, true)
	_, err = h2.Ensure(t.Context(), team("first"))
	mustBe(t, err, errdefs.ErrAlreadyExists, "it belongs to another supervisor")
	if all, err := h2.List(); err != nil || len(all) != 0 {
		t.Errorf("the other supervisor lists %+v, %v", all, err)
	}
	twin := team("first")
	twin.UID = "uid-of-a-namespace-made-anew"
	_, err = h.Ensure(t.Context(), twin)
	mustBe(t, err, errdefs.ErrAlreadyExists, "it belongs to namespace first with uid uid-of-first, which has to go first")
}

func (h *harness) seen(id ref) bool {
	h.cache.mu.Lock()
	defer h.cache.mu.Unlock()
	return h.cache.objects[id] != nil
}

func TestDriftIsToldAndMended(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	ns := team("team-a")
	h.ensure(t, ns)
	elsewhere := v.createPool(t, "Resources", "elsewhere")
	pool := v.pool(t, "team-a").id
	manager := *v.admin.Client().ServiceContent.AuthorizationManager

	for _, c := range []struct {
		want   string
		change func() error
		calls  int
	}{
		{"cpu", func() error {
			spec := poolSpec(Pool{CPU: Allocation{Limit: 7000, Reservation: 500}, Memory: ns.Pools[0].Memory})
			_, err := methods.UpdateConfig(t.Context(), v.admin, &types.UpdateConfig{This: pool, Config: &spec})
			return err
		}, 1},
		{"name", func() error {
			_, err := methods.UpdateConfig(t.Context(), v.admin, &types.UpdateConfig{This: pool, Name: "renamed"})
			return err
		}, 1},
		{"parent", func() error {
			_, err := methods.MoveIntoResourcePool(t.Context(), v.admin, &types.MoveIntoResourcePool{This: elsewhere, List: []ref{pool}})
			return err
		}, 1},
		{"access", func() error {
			_, err := methods.ResetEntityPermissions(t.Context(), v.admin, &types.ResetEntityPermissions{This: manager, Entity: pool})
			return err
		}, 1},
		{"missing", func() error {
			_, err := methods.Destroy_Task(t.Context(), v.admin, &types.Destroy_Task{This: pool})
			return err
		}, 6},
		{"missing", func() error {
			_, err := methods.Destroy_Task(t.Context(), v.admin, &types.Destroy_Task{This: v.inventory(t, "Folder")["team-a"].id})
			return err
		}, 6},
		{"name", func() error {
			_, err := methods.Rename_Task(t.Context(), v.admin, &types.Rename_Task{This: v.inventory(t, "Folder")["team-a"].id, NewName: "other"})
			return err
		}, 2},
	} {
		before := h.toldOf(ns.Ref)
		if err := c.change(); err != nil {
			t.Fatalf("%s: %v", c.want, err)
		}
		var drift []Drift
		h.until(t, "drift of "+c.want, func() bool {
			s, err := h.State(ns.Ref)
			drift = Diff(ns, s)
			return err == nil && len(drift) > 0 && h.toldOf(ns.Ref) > before
		})
		if got := fieldsOf(drift); got != c.want {
			t.Errorf("drift of %q, want %q: %+v", got, c.want, drift)
		}
		if n, made := h.count(func() { h.ensure(t, ns) }); n > c.calls {
			t.Errorf("%s: %d calls to mend it, want at most %d: %v", c.want, n, c.calls, made)
		}
		pool = v.pool(t, "team-a").id
	}
	lag := h.Health().Lag
	if lag <= 0 || lag > echoWait {
		t.Errorf("the watch's lag is %v", lag)
	}
}

func TestDelete(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	keep, ns := team("keep"), team("team-a")
	h.ensure(t, keep)
	h.ensure(t, ns)
	child := v.createPool(t, "team-a", "somebody's")

	err := h.Delete(t.Context(), ns.Ref)
	mustBe(t, err, errdefs.ErrFailedPrecondition, `"team-a"`)
	mustBe(t, err, errdefs.ErrFailedPrecondition, "still holds 1 objects, as ResourcePool "+child.Value)
	v.pool(t, "team-a")
	if _, ok := v.inventory(t, "Folder")["team-a"]; !ok {
		t.Error("the folder went although the pool could not")
	}
	if _, err := methods.Destroy_Task(t.Context(), v.admin, &types.Destroy_Task{This: child}); err != nil {
		t.Fatal(err)
	}
	wrong := ns.Ref
	wrong.UID = "another"
	for _, r := range []Ref{wrong, ns.Ref, ns.Ref} {
		if err := h.Delete(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		if _, ok := v.inventory(t, "ResourcePool")["team-a"]; ok != (r == wrong) {
			t.Errorf("after Delete(%+v) the pool is there: %v", r, ok)
		}
	}
	if _, ok := v.inventory(t, "Folder")["team-a"]; ok {
		t.Error("the folder is still there")
	}
	v.pool(t, "keep")
	if all, err := h.List(); err != nil || len(all) != 1 || all[0] != keep.Ref {
		t.Errorf("the list is %+v, %v", all, err)
	}
	// A mark that somebody took away protects the object.
	s := h.ensure(t, ns)
	key, _ := h.fields.key(AttributeOwner)
	fields := *v.admin.Client().ServiceContent.CustomFieldsManager
	if _, err := methods.SetField(t.Context(), v.admin, &types.SetField{This: fields, Entity: poolRef(s.Pools[0].ID), Key: key, Value: "mine"}); err != nil {
		t.Fatal(err)
	}
	if err := h.removePool(t.Context(), ns.Ref, poolRef(s.Pools[0].ID)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("deleting a pool whose mark is gone: %v", err)
	}
	v.pool(t, "team-a")
}

// A mark that somebody copied onto something else makes that nobody's: it is no
// pool of the namespace's, and stays when the namespace goes.
func TestCopiedMark(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	ns := team("team-a")
	h.ensure(t, ns)
	pool := v.createPool(t, DefaultParent, "theirs")
	folder, err := methods.CreateFolder(t.Context(), v.admin, &types.CreateFolder{This: v.inventory(t, "Folder")[DefaultParent].id, Name: "theirs"})
	if err != nil {
		t.Fatal(err)
	}
	key, _ := h.fields.key(AttributeOwner)
	own := h.cache.mark(ns.Ref, v.pool(t, "team-a").id)
	fields := *v.admin.Client().ServiceContent.CustomFieldsManager
	for _, id := range []ref{pool, folder.Returnval} {
		if _, err := methods.SetField(t.Context(), v.admin, &types.SetField{This: fields, Entity: id, Key: key, Value: own}); err != nil {
			t.Fatal(err)
		}
		h.until(t, "the copy", func() bool {
			h.cache.mu.Lock()
			defer h.cache.mu.Unlock()
			o := h.cache.objects[id]
			return o != nil && o.str(h.cache.ownerProp()) == own
		})
	}
	if n, made := h.count(func() { h.ensure(t, ns) }); n != 0 {
		t.Errorf("%d calls, want none: %v", n, made)
	}
	theirs := team("theirs")
	_, err = h.Ensure(t.Context(), theirs)
	mustBe(t, err, errdefs.ErrAlreadyExists, "that of another object")
	if err := h.Delete(t.Context(), ns.Ref); err != nil {
		t.Fatal(err)
	}
	if _, ok := v.inventory(t, "ResourcePool")["team-a"]; ok {
		t.Error("the namespace's own pool is there")
	}
	v.pool(t, "theirs")
	if _, ok := v.inventory(t, "Folder")["theirs"]; !ok {
		t.Error("the folder with the copy is gone")
	}
	if all, err := h.List(); err != nil || len(all) != 0 {
		t.Errorf("the list is %+v, %v", all, err)
	}
}
