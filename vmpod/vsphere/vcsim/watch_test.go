package vcsim

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

func poolNames(t *testing.T, c *govmomi.Client) map[string]bool {
	t.Helper()
	v := must[*view.ContainerView](t)(view.NewManager(c.Client).CreateContainerView(t.Context(), c.ServiceContent.RootFolder, []string{"ResourcePool"}, true))
	defer func() { _ = v.Destroy(context.Background()) }()
	var pools []mo.ResourcePool
	if err := v.Retrieve(t.Context(), []string{"ResourcePool"}, []string{"name"}, &pools); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, p := range pools {
		names[p.Name] = true
	}
	return names
}

// watchPools sends what a watch of all pools is told of names and limits, as
// "name=limit", and "gone".
func watchPools(t *testing.T, c *govmomi.Client) <-chan string {
	t.Helper()
	v := must[*view.ContainerView](t)(view.NewManager(c.Client).CreateContainerView(t.Context(), c.ServiceContent.RootFolder, []string{"ResourcePool"}, true))
	told := make(chan string, 10_000)
	filter := new(property.WaitFilter).Add(v.Reference(), "ResourcePool", []string{"name", "config.memoryAllocation.limit"}, v.TraversalSpec())
	names := map[types.ManagedObjectReference]string{}
	go func() {
		defer close(told)
		_ = property.WaitForUpdatesEx(t.Context(), property.DefaultCollector(c.Client), filter, func(updates []types.ObjectUpdate) bool {
			for _, u := range updates {
				if u.Kind == types.ObjectUpdateKindLeave {
					told <- names[u.Obj] + " gone"
					continue
				}
				limit := any("same")
				for _, p := range u.ChangeSet {
					switch p.Name {
					case "name":
						names[u.Obj] = p.Val.(string)
					case "config.memoryAllocation.limit":
						limit = p.Val
					}
				}
				told <- fmt.Sprintf("%s=%v", names[u.Obj], limit)
			}
			return false
		})
	}()
	return told
}

func expect(t *testing.T, told <-chan string, want string) {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		select {
		case got, ok := <-told:
			if !ok {
				t.Fatalf("the watch ended before %q", want)
			}
			if got == want {
				return
			}
		case <-limit:
			t.Fatalf("never told %q", want)
		}
	}
}

// TestWatch changes a pool in every way in one session, and watches in another.
func TestWatch(t *testing.T) {
	s := start(t, config(""))
	c := signIn(t, s, admin)
	told := watchPools(t, signIn(t, s, admin))
	expect(t, told, fmt.Sprintf("Resources=%d", 64<<10))
	p := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "a", spec()))
	expect(t, told, "a=-1")
	change := types.ResourceConfigSpec{MemoryAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(512)}}
	if err := p.UpdateConfig(t.Context(), "", &change); err != nil {
		t.Fatal(err)
	}
	expect(t, told, "a=512")
	if err := p.UpdateConfig(t.Context(), "b", nil); err != nil {
		t.Fatal(err)
	}
	expect(t, told, "b=same")
	if err := finish(t.Context())(p.Destroy(t.Context())); err != nil {
		t.Fatal(err)
	}
	expect(t, told, "b gone")
}

// TestWatchAll loses none of many changes, in pages, and a session that ends
// leaves no watch behind.
func TestWatchAll(t *testing.T) {
	const pools = 300
	s := start(t, config(""))
	c := signIn(t, s, admin)
	root := rootPool(t, c)
	told := watchPools(t, signIn(t, s, admin))
	expect(t, told, fmt.Sprintf("Resources=%d", 64<<10))
	for i := range pools {
		must[*object.ResourcePool](t)(root.Create(t.Context(), fmt.Sprint("p", i), spec()))
	}
	seen := map[string]bool{}
	limit := time.After(time.Minute)
	for len(seen) < pools {
		select {
		case got := <-told:
			if got != "Resources=same" {
				seen[got] = true
			}
		case <-limit:
			t.Fatalf("told of %d of %d pools", len(seen), pools)
		}
	}
	s.EndSessions(admin)
	s.hub.mu.Lock()
	left := len(s.hub.watches)
	s.hub.mu.Unlock()
	if left != 0 {
		t.Errorf("%d watches of sessions that ended", left)
	}
}

// TestClose ends while a watch is open.
func TestClose(t *testing.T) {
	s := start(t, config(""))
	told := watchPools(t, signIn(t, s, admin))
	expect(t, told, fmt.Sprintf("Resources=%d", 64<<10))
	began := time.Now()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for range told { // until the watch has ended
	}
	if took := time.Since(began); took > stopGrace+5*time.Second {
		t.Errorf("Close took %v", took)
	}
}
