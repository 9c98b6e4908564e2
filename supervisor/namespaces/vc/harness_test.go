package vc

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const (
	adminUser     = "administrator@vsphere.local"
	adminPassword = "correct horse"
)

// A vcenter is Atoll's simulator and an administrator's own connection to it.
type vcenter struct {
	*vcsim.Server
	config vcsim.Config
	admin  *vsphere.Session
}

func startVCenter(t *testing.T, c vcsim.Config) *vcenter {
	t.Helper()
	c.AdminPassword, c.PasswordRounds = adminPassword, 1000
	c.Logger = slog.New(slog.NewTextHandler(io.Discard, nil))
	if c.Clusters == nil {
		c.Clusters = []vcsim.Cluster{{Name: "c1", Hosts: []vcsim.Host{{Name: "h1", CPUs: 8, MHz: 2000, Memory: 32 << 30}}}}
	}
	v := &vcenter{config: c}
	v.boot(t)
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Error(err)
		}
	})
	v.signIn(t)
	return v
}

func (v *vcenter) boot(t *testing.T) {
	t.Helper()
	s, err := vcsim.New(v.config)
	if err != nil {
		t.Fatal(err)
	}
	v.Server = s
}

func (v *vcenter) signIn(t *testing.T) {
	t.Helper()
	admin, err := vsphere.NewSession(vsphere.Config{Address: v.URL().Host, CA: v.CA(), Credentials: func(context.Context) (string, string, error) {
		return adminUser, adminPassword, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := admin.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.admin = admin
	t.Cleanup(func() { admin.Client().CloseIdleConnections() })
}

// restart stops the vCenter and starts it with what it kept, at the same
// address.
func (v *vcenter) restart(t *testing.T) {
	t.Helper()
	v.config.Listen = mustAddr(t, v.URL().Host)
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v.boot(t)
	v.signIn(t)
}

func mustAddr(t *testing.T, s string) netip.AddrPort {
	t.Helper()
	at, err := netip.ParseAddrPort(s)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// A named is a pool or folder as the administrator sees it.
type named struct {
	id     ref
	parent string
	config types.ResourceConfigSpec
	perms  int
}

// inventory is every pool and folder, by name; more than one of a name fails.
func (v *vcenter) inventory(t *testing.T, kind string) map[string]named {
	t.Helper()
	content := v.admin.Client().ServiceContent
	view, err := methods.CreateContainerView(t.Context(), v.admin, &types.CreateContainerView{
		This: *content.ViewManager, Container: content.RootFolder, Recursive: true, Type: []string{kind},
	})
	if err != nil {
		t.Fatal(err)
	}
	found, err := v.admin.Retrieve(t.Context(), map[ref][]string{view.Returnval: {"view"}})
	if err != nil {
		t.Fatal(err)
	}
	list, _ := found[view.Returnval]["view"].(types.ArrayOfManagedObjectReference)
	want := map[ref][]string{}
	for _, id := range list.ManagedObjectReference {
		want[id] = []string{"name", "parent", "permission"}
		if kind == "ResourcePool" {
			want[id] = append(want[id], "config")
		}
	}
	if found, err = v.admin.Retrieve(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	all := map[string]named{}
	for id, props := range found {
		name, _ := props["name"].(string)
		if _, twice := all[name]; twice && name != "Resources" && name != DefaultParent {
			t.Errorf("two of type %s are called %q", kind, name)
		}
		n := named{id: id}
		if parent, ok := props["parent"].(ref); ok {
			n.parent = parent.Value
		}
		n.config, _ = props["config"].(types.ResourceConfigSpec)
		perms, _ := props["permission"].(types.ArrayOfPermission)
		n.perms = len(perms.Permission)
		all[name] = n
	}
	return all
}

func (v *vcenter) pool(t *testing.T, name string) named {
	t.Helper()
	n, ok := v.inventory(t, "ResourcePool")[name]
	if !ok {
		t.Fatalf("vCenter has no pool %q", name)
	}
	return n
}

// createPool is an administrator's, under another pool.
func (v *vcenter) createPool(t *testing.T, parent, name string) ref {
	t.Helper()
	free := Allocation{Limit: Unlimited}
	res, err := methods.CreateResourcePool(t.Context(), v.admin, &types.CreateResourcePool{
		This: v.pool(t, parent).id, Name: name, Spec: poolSpec(Pool{CPU: free, Memory: free}),
	})
	if err != nil {
		t.Fatal(err)
	}
	return res.Returnval
}

// A harness is a Client that runs, and what it told.
type harness struct {
	*Client
	mu     sync.Mutex
	calls  map[string]int
	told   map[Ref]int
	policy int
	change chan struct{}
	stop   func()
}

func (v *vcenter) options() Options {
	return Options{
		Address: v.URL().Host, CA: v.CA(), Supervisor: "11111111-2222-3333-4444-555555555555",
		Zones:       []Zone{{Cluster: v.config.Clusters[0].Name}},
		Credentials: func(context.Context) (Credentials, error) { return Credentials{adminUser, adminPassword}, nil },
	}
}

// start runs a client; with wait, until it has made all calls of a start.
func start(t *testing.T, o Options, wait bool) *harness {
	t.Helper()
	h := start0(t, o)
	h.until(t, "the connection", func() bool {
		_, _, err := h.Policies() // the last that is read at the start
		return h.Health().Connected && (err == nil || !wait)
	})
	return h
}

// start0 runs a client and waits for nothing.
func start0(t *testing.T, o Options) *harness {
	t.Helper()
	h := &harness{calls: map[string]int{}, told: map[Ref]int{}, change: make(chan struct{}, 1)}
	poke := func() {
		select {
		case h.change <- struct{}{}:
		default:
		}
	}
	o.Observe = func(method string, _ time.Duration, _ error) {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.calls[method]++
	}
	o.Notify = Notify{
		Namespace: func(r Ref) { h.mu.Lock(); h.told[r]++; h.mu.Unlock(); poke() },
		Policies:  func() { h.mu.Lock(); h.policy++; h.mu.Unlock(); poke() },
		Health:    poke,
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	h.Client = c
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	var once sync.Once
	h.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run ended with %v", err)
			}
		})
	}
	t.Cleanup(h.stop)
	return h
}

// until waits for something that the watch brings.
func (h *harness) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	for !ok() {
		select {
		case <-h.change:
		case <-time.After(50 * time.Millisecond): // what is not told of
		case <-late:
			t.Fatalf("%s has not come; health %+v", what, h.Health())
		}
	}
}

// count runs f and returns the calls it made, waits of the watch apart.
func (h *harness) count(f func()) (int, map[string]int) {
	h.mu.Lock()
	before := maps.Clone(h.calls)
	h.mu.Unlock()
	f()
	h.mu.Lock()
	defer h.mu.Unlock()
	total, made := 0, map[string]int{}
	for m, n := range h.calls {
		if d := n - before[m]; d > 0 && m != "WaitForUpdatesEx" {
			made[m] = d
			total += d
		}
	}
	return total, made
}

func (h *harness) toldOf(r Ref) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.told[r]
}

func (h *harness) ensure(t *testing.T, ns Namespace) State {
	t.Helper()
	s, err := h.Ensure(t.Context(), ns)
	if err != nil {
		t.Fatal(err)
	}
	if d := Diff(ns, s); len(d) > 0 {
		t.Fatalf("after Ensure there is still drift: %+v", d)
	}
	return s
}

func team(name string) Namespace {
	return Namespace{
		Ref:         Ref{Name: name, UID: "uid-of-" + name},
		Description: "the team called " + name,
		Pools: []Pool{{
			CPU:    Allocation{Limit: 4000, Reservation: 500},
			Memory: Allocation{Limit: 4096, Reservation: 1024, Shares: Shares{Level: SharesHigh}},
		}},
		Access: []Access{{Subject: "dev", Domain: "vsphere.local", Role: RoleEdit}, {Subject: "ops", Domain: "vsphere.local", Group: true, Role: RoleOwner}},
	}
}

// people makes the users that team's access list names.
func (v *vcenter) people(t *testing.T) {
	t.Helper()
	err := errors.Join(v.Users().Set("dev", "password-1"), v.Users().Set("eve", "password-2"), v.Users().SetGroup("ops", "eve"))
	if err != nil {
		t.Fatal(err)
	}
}

func fieldsOf(drift []Drift) string {
	var fields []string
	for _, d := range drift {
		fields = append(fields, string(d.Field))
	}
	slices.Sort(fields)
	return strings.Join(slices.Compact(fields), " ")
}

func mustBe(t *testing.T, err, class error, text string) {
	t.Helper()
	if !errors.Is(err, class) || !strings.Contains(err.Error(), text) {
		t.Errorf("the error is %v, want %v with %q", err, class, text)
	}
	if err != nil && strings.Contains(err.Error(), adminPassword) {
		t.Error("the error holds a password")
	}
}
