package vc

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

func TestBadInput(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	h.ensure(t, team("first"))
	for name, c := range map[string]struct {
		change func(*Namespace)
		class  error
		text   string
		field  Field
	}{
		"no name":         {func(n *Namespace) { n.Name = "" }, errdefs.ErrInvalidArgument, "a name has", ""},
		"slash":           {func(n *Namespace) { n.Name = "a/b" }, errdefs.ErrInvalidArgument, "a name has", ""},
		"our prefix":      {func(n *Namespace) { n.Name = "atoll.x" }, errdefs.ErrInvalidArgument, "taken", ""},
		"no uid":          {func(n *Namespace) { n.UID = "" }, errdefs.ErrInvalidArgument, "uid", ""},
		"no zone":         {func(n *Namespace) { n.Pools = nil }, errdefs.ErrInvalidArgument, "no zone", ""},
		"unknown zone":    {func(n *Namespace) { n.Pools[0].Zone = "mars" }, errdefs.ErrInvalidArgument, `no zone "mars"`, ""},
		"zone twice":      {func(n *Namespace) { n.Pools = append(n.Pools, n.Pools[0]) }, errdefs.ErrInvalidArgument, "twice", ""},
		"limit 0":         {func(n *Namespace) { n.Pools[0].CPU.Limit = 0 }, errdefs.ErrInvalidArgument, "a limit of 0 is none", FieldCPU},
		"below nothing":   {func(n *Namespace) { n.Pools[0].Memory.Reservation = -1 }, errdefs.ErrInvalidArgument, "less than nothing", FieldMemory},
		"over the limit":  {func(n *Namespace) { n.Pools[0].CPU.Reservation = 4001 }, errdefs.ErrInvalidArgument, "more than the limit", FieldCPU},
		"shares":          {func(n *Namespace) { n.Pools[0].CPU.Shares.Level = "much" }, errdefs.ErrInvalidArgument, "shares are low", FieldCPU},
		"role":            {func(n *Namespace) { n.Access[0].Role = "king" }, errdefs.ErrInvalidArgument, "owner, edit or view", FieldAccess},
		"our attribute":   {func(n *Namespace) { n.Attributes = map[string]string{AttributeOwner: "me"} }, errdefs.ErrInvalidArgument, "are Atoll's", ""},
		"unknown user":    {func(n *Namespace) { n.Access[0].Subject = "nobody" }, errdefs.ErrInvalidArgument, "no user or group", FieldAccess},
		"too much memory": {func(n *Namespace) { n.Pools[0].Memory = Allocation{Limit: Unlimited, Reservation: 1 << 30} }, errdefs.ErrFailedPrecondition, "lower the reservation or give the parent more", FieldMemory},
		"too much CPU":    {func(n *Namespace) { n.Pools[0].CPU = Allocation{Limit: Unlimited, Reservation: 1 << 30} }, errdefs.ErrFailedPrecondition, "lower the reservation or give the parent more", FieldCPU},
		"unknown tag":     {func(n *Namespace) { n.Tags = []string{"team/nobody"} }, errdefs.ErrInvalidArgument, "team/nobody", FieldTag},
	} {
		t.Run(name, func(t *testing.T) {
			ns := team("bad")
			ns.UID = "uid-" + strings.ReplaceAll(name, " ", "-")
			c.change(&ns)
			_, err := h.Ensure(t.Context(), ns)
			mustBe(t, err, c.class, c.text)
			var about *PartError
			if errors.As(err, &about); c.field != "" && (about == nil || about.Field != c.field) {
				t.Errorf("the error is about %+v, want %s: %v", about, c.field, err)
			}
			if ns.UID != "" {
				if err := h.Delete(t.Context(), ns.Ref); err != nil {
					t.Error(err)
				}
			}
		})
	}
	h.ensure(t, team("good"))
}

func TestBadOptions(t *testing.T) {
	good := Options{Address: "vc", Supervisor: "s", Zones: []Zone{{Cluster: "c"}}, Credentials: func(context.Context) (Credentials, error) { return Credentials{}, nil }}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"no credentials": func(o *Options) { o.Credentials = nil },
		"no supervisor":  func(o *Options) { o.Supervisor = "" },
		"slash":          func(o *Options) { o.Supervisor = "a/b" },
		"no zones":       func(o *Options) { o.Zones = nil },
		"zone twice":     func(o *Options) { o.Zones = append(o.Zones, o.Zones[0]) },
		"no address":     func(o *Options) { o.Address = "" },
		"role twice":     func(o *Options) { o.Roles = map[Role]string{RoleEdit: "x", RoleView: "x"} },
	} {
		o := good
		change(&o)
		if _, err := New(o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want ErrInvalidArgument", name, err)
		}
	}
}

func TestUnknownClusterIsNamed(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	o := v.options()
	o.Zones = []Zone{{Name: "z", Cluster: "mars"}}
	h := start(t, o, true)
	ns := team("team-a")
	ns.Pools[0].Zone = "z"
	_, err := h.Ensure(t.Context(), ns)
	mustBe(t, err, errdefs.ErrInvalidArgument, `shows no cluster "mars"`)
	_, err = h.Zones()
	mustBe(t, err, errdefs.ErrInvalidArgument, `shows no cluster "mars"`)
}

// Nothing is concluded while vCenter is away, and nothing is made twice when it
// is back.
func TestVCenterGoesAndComes(t *testing.T) {
	v := startVCenter(t, vcsim.Config{Dir: t.TempDir()})
	v.people(t)
	h := start(t, v.options(), true)
	ns := team("team-a")
	before := h.ensure(t, ns)

	t.Run("session dropped", func(t *testing.T) {
		remove := v.Faults().Add(vcsim.Fault{Method: "*", User: adminUser, Logout: true, Times: 1})
		defer remove()
		ns.Pools[0].CPU.Limit++
		if _, err := h.Ensure(t.Context(), ns); err != nil {
			t.Errorf("a dropped session was not renewed: %v", err)
		}
		h.until(t, "the watch", func() bool { return h.Health().Connected })
	})
	t.Run("restart", func(t *testing.T) {
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		h.until(t, "the loss", func() bool { return !h.Health().Connected })
		_, err := h.Ensure(t.Context(), ns)
		mustBe(t, err, errdefs.ErrUnavailable, v.URL().Host)
		_, err = h.State(ns.Ref)
		mustBe(t, err, errdefs.ErrUnavailable, v.URL().Host)
		mustBe(t, h.Delete(t.Context(), ns.Ref), errdefs.ErrUnavailable, v.URL().Host)
		told := h.toldOf(ns.Ref)
		v.restart(t)
		h.until(t, "the connection", func() bool { return h.Health().Connected })
		if n, made := h.count(func() {
			if after := h.ensure(t, ns); after.Pools[0].ID != before.Pools[0].ID || after.Folder.ID != before.Folder.ID {
				t.Errorf("after the restart it is %+v, before %+v", after, before)
			}
		}); n != 0 {
			t.Errorf("%d calls although nothing changed: %v", n, made)
		}
		if h.toldOf(ns.Ref) != told {
			t.Error("told of a change that was none")
		}
	})
	t.Run("changed meanwhile", func(t *testing.T) {
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		h.until(t, "the loss", func() bool { return !h.Health().Connected })
		// Boot without the client noticing, change, and let it connect.
		v.config.Listen = mustAddr(t, v.URL().Host)
		v.boot(t)
		remove := v.Faults().Add(vcsim.Fault{Method: "CreateContainerView", User: adminUser, Times: 1, Fault: &types.RequestCanceled{}})
		defer remove()
		v.signIn(t)
		if _, err := methods.UpdateConfig(t.Context(), v.admin, &types.UpdateConfig{This: poolRef(before.Pools[0].ID), Name: "renamed"}); err != nil {
			t.Fatal(err)
		}
		h.until(t, "the new name", func() bool {
			s, err := h.State(ns.Ref)
			return err == nil && len(s.Pools) == 1 && s.Pools[0].Name == "renamed"
		})
		h.ensure(t, ns)
	})
}

func TestTasksThatFail(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	h.ensure(t, team("first"))
	ns := team("team-a")

	remove := v.Faults().Add(vcsim.Fault{Method: "Rename_Task", Task: true, Fault: &types.SystemError{Reason: "the disk is full"}})
	_, err := h.Ensure(t.Context(), ns)
	mustBe(t, err, errdefs.ErrUnknown, `rename VM folder`)
	remove()
	s, err := h.State(ns.Ref)
	if err != nil || len(s.Pools) != 1 || s.Pools[0].Name != "team-a" {
		t.Errorf("the pool suffered from the folder: %+v, %v", s, err)
	}
	h.ensure(t, ns)

	remove = v.Faults().Add(vcsim.Fault{Method: "Destroy_Task", Stuck: true})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err = h.Delete(ctx, ns.Ref)
	mustBe(t, err, errdefs.ErrUnavailable, "has not ended in time, and may still")
	remove()
	v.pool(t, "team-a")
	if err := h.Delete(t.Context(), ns.Ref); err != nil {
		t.Fatal(err)
	}
	if _, ok := v.inventory(t, "ResourcePool")["team-a"]; ok {
		t.Error("the pool is still there")
	}
}

// A call that vCenter is slow with leaves the other namespaces alone.
func TestSlowCallsDoNotBlockOthers(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	h := start(t, v.options(), true)
	h.ensure(t, team("first"))
	slow := h.ensure(t, team("slow"))
	remove := v.Faults().Add(vcsim.Fault{Method: "UpdateConfig", Object: slow.Pools[0].ID, Delay: time.Minute})
	defer remove()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		ns := team("slow")
		ns.Pools[0].CPU.Limit++
		if _, err := h.Ensure(ctx, ns); !errors.Is(err, context.Canceled) {
			t.Errorf("the slow call ended with %v", err)
		}
	})
	h.ensure(t, team("quick"))
	cancel()
	wg.Wait()
}

func TestPoliciesEventsAndZones(t *testing.T) {
	v := startVCenter(t, vcsim.Config{
		Clusters: []vcsim.Cluster{
			{Name: "c1", Hosts: []vcsim.Host{{Name: "h1", CPUs: 8, MHz: 2000, Memory: 32 << 30}}},
			{Name: "c2", Hosts: []vcsim.Host{{Name: "h2", CPUs: 4, MHz: 3000, Memory: 16 << 30}}},
		},
		Datastores: []vcsim.Datastore{{Name: "fast", Capacity: 100 << 30, Free: 40 << 30}, {Name: "slow", Capacity: 1 << 40, Free: 1 << 39}},
		Policies:   []vcsim.Policy{{Name: "Gold", Description: "fast ones", Datastores: []string{"fast"}}, {Name: "Any"}},
	})
	v.people(t)
	o := v.options()
	o.Zones = []Zone{{Name: "a", Cluster: "c1"}, {Name: "b", Cluster: "/Atoll/host/c2"}}
	h := start(t, o, true)
	list, at, err := h.Policies()
	if err != nil || time.Since(at) > time.Minute || len(list) != 2 || list[0].Name != "Any" || list[1].Name != "Gold" {
		t.Fatalf("the policies are %+v of %v, %v", list, at, err)
	}
	if g := list[1]; g.Capacity != 100<<30 || g.Free != 40<<30 || len(g.Datastores) != 1 || g.Datastores[0].Name != "fast" || g.ID == "" {
		t.Errorf("Gold is %+v", g)
	}
	if len(list[0].Datastores) != 2 {
		t.Errorf("Any is %+v", list[0])
	}

	zones, err := h.Zones()
	if err != nil || len(zones) != 2 {
		t.Fatalf("the zones are %+v, %v", zones, err)
	}
	if z := zones[1]; z.Path != "/Atoll/host/c2" || z.Datacenter != "Atoll" || z.Hosts != 1 || z.MHzPerCore <= 0 || z.Memory != 16<<10 {
		t.Errorf("zone b is %+v", z)
	}
	ns := team("team-a")
	parts := Split(ns.Pools[0].CPU, 2)
	ns.Pools = []Pool{{Zone: "a", CPU: parts[0], Memory: ns.Pools[0].Memory}, {Zone: "b", CPU: parts[1], Memory: ns.Pools[0].Memory}}
	ns.Attributes = map[string]string{"costcenter": "4711"}
	s := h.ensure(t, ns)
	if len(s.Pools) != 2 || s.Pools[0].Zone != "a" || s.Pools[1].Zone != "b" || s.Pools[0].Attributes["costcenter"] != "4711" {
		t.Fatalf("the pools are %+v", s.Pools)
	}
	if err := h.Post(t.Context(), ns.Ref, Event{EventWarning, "limits were changed"}); err != nil {
		t.Fatal(err)
	}
	events, err := methods.QueryEvents(t.Context(), v.admin, &types.QueryEvents{This: *v.admin.Client().ServiceContent.EventManager})
	if err != nil {
		t.Fatal(err)
	}
	var on []string
	for _, e := range events.Returnval {
		if x, ok := e.(*types.EventEx); ok && x.EventTypeId == EventType && x.Message == "limits were changed" && x.Severity == "warning" {
			on = append(on, x.ObjectId)
		}
	}
	if len(on) != 2 {
		t.Errorf("the event is on %v, want both pools", on)
	}
	ns.Pools = ns.Pools[:1]
	if s = h.ensure(t, ns); len(s.Pools) != 1 {
		t.Errorf("zone b is still there: %+v", s.Pools)
	}
}

// A group that our own account is in would take away what it inherits.
func TestOwnGroup(t *testing.T) {
	v := startVCenter(t, vcsim.Config{})
	v.people(t)
	if err := v.Users().SetGroup("Admins-of-Teams", "eve", "administrator"); err != nil {
		t.Fatal(err)
	}
	h := start(t, v.options(), true)
	ns := team("team-a")
	ns.Access = append(ns.Access, Access{Subject: "admins-of-teams", Domain: "vsphere.local", Group: true, Role: RoleView})
	_, err := h.Ensure(t.Context(), ns)
	mustBe(t, err, errdefs.ErrFailedPrecondition, `group vsphere.local\admins-of-teams: the account `+adminUser)
	var about *PartError
	if !errors.As(err, &about) || about.Field != FieldAccess {
		t.Errorf("the error is about %+v, want access", about)
	}
	if p := v.pool(t, "team-a"); p.perms != 0 {
		t.Errorf("the pool has %d permissions", p.perms)
	}
	ns.Access = ns.Access[:2]
	h.ensure(t, ns)
}
