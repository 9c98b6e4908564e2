package vcsim

import (
	"strings"
	"testing"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/types"
)

// sized is a pool of so much memory.
func sized(reservation, limit int64, expandable bool) types.ResourceConfigSpec {
	s := spec()
	s.MemoryAllocation.Reservation, s.MemoryAllocation.Limit, s.MemoryAllocation.ExpandableReservation = &reservation, &limit, &expandable
	return s
}

// TestReservations in a cluster of 65536 MiB.
func TestReservations(t *testing.T) {
	for _, test := range []struct {
		name   string
		parent types.ResourceConfigSpec
		fits   []types.ResourceConfigSpec // children, made one after another
		last   types.ResourceConfigSpec
		ok     bool
	}{
		{"within a fixed parent", sized(1000, unlimited, false), []types.ResourceConfigSpec{sized(600, unlimited, true)}, sized(400, unlimited, true), true},
		{"beyond a fixed parent", sized(1000, unlimited, false), []types.ResourceConfigSpec{sized(600, unlimited, true)}, sized(401, unlimited, true), false},
		{"beyond an expandable parent, within the cluster", sized(1000, unlimited, true), []types.ResourceConfigSpec{sized(600, unlimited, true)}, sized(64936, unlimited, true), true},
		{"beyond the cluster", sized(1000, unlimited, true), []types.ResourceConfigSpec{sized(600, unlimited, true)}, sized(64937, unlimited, true), false},
		{"beyond the limit of an expandable parent", sized(0, 500, true), nil, sized(501, unlimited, true), false},
		{"larger than its own limit", sized(0, unlimited, true), nil, sized(100, 50, true), false},
		{"negative", sized(0, unlimited, true), nil, sized(-1, unlimited, true), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := start(t, config(""))
			c := signIn(t, s, admin)
			parent := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "parent", test.parent))
			for i, f := range test.fits {
				must[*object.ResourcePool](t)(parent.Create(t.Context(), string(rune('a'+i)), f))
			}
			last, err := parent.Create(t.Context(), "last", sized(0, unlimited, true))
			if err != nil {
				t.Fatal(err)
			}
			_, made := parent.Create(t.Context(), "made", test.last)
			if (made == nil) != test.ok {
				t.Errorf("made: %v", made)
			}
			if made == nil {
				return
			}
			if err := last.UpdateConfig(t.Context(), "", &test.last); err == nil {
				t.Error("refused for a new pool, and not for one that grows")
			}
			if strings.Contains(test.name, "beyond") && !fault.Is(made, &types.InsufficientMemoryResourcesFault{}) {
				t.Errorf("refused with %v", made)
			}
		})
	}
}

// TestNames are unique among siblings, whatever case, and free elsewhere.
func TestNames(t *testing.T) {
	s := start(t, config(""))
	c := signIn(t, s, admin)
	a := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "a", spec()))
	b := must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "b", spec()))
	must[*object.ResourcePool](t)(a.Create(t.Context(), "b", spec()))
	f := must[*object.Folder](t)(vmFolder(t, c).CreateFolder(t.Context(), "f"))
	if _, err := s.Mirror(t.Context(), Mirror{UUID: "00000000-0000-0000-0000-000000000001", Name: "vm", Host: "node-1"}); err != nil {
		t.Fatal(err)
	}
	taken := func(what string, err error) {
		t.Helper()
		if !fault.Is(err, &types.DuplicateName{}) {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := rootPool(t, c).Create(t.Context(), "A", spec())
	taken("a pool", err)
	taken("a renamed pool", b.UpdateConfig(t.Context(), "a", nil))
	_, err = vmFolder(t, c).CreateFolder(t.Context(), "f")
	taken("a folder", err)
	_, err = vmFolder(t, c).CreateFolder(t.Context(), "VM")
	taken("a folder named as a VM", err)
	_, err = s.Mirror(t.Context(), Mirror{UUID: "00000000-0000-0000-0000-000000000002", Name: "f", Host: "node-1"})
	if err == nil {
		t.Error("a VM named as a folder")
	}
	if _, err := f.CreateFolder(t.Context(), "f"); err != nil {
		t.Error(err)
	}
	// A name is free again when its owner has another, is elsewhere, or is gone.
	for _, err := range []error{
		b.UpdateConfig(t.Context(), "c", nil),
		finish(t.Context())(f.Rename(t.Context(), "g")),
		a.UpdateConfig(t.Context(), "b", nil),
		finish(t.Context())(b.Destroy(t.Context())),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	taken("a pool that was renamed to it", func() error { _, err := rootPool(t, c).Create(t.Context(), "B", spec()); return err }())
	must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "A", spec()))
	must[*object.ResourcePool](t)(rootPool(t, c).Create(t.Context(), "c", spec()))
	must[*object.Folder](t)(vmFolder(t, c).CreateFolder(t.Context(), "F"))
	stale := types.ResourceConfigSpec{ChangeVersion: "0", CpuAllocation: types.ResourceAllocationInfo{Limit: types.NewInt64(5)}}
	if err := a.UpdateConfig(t.Context(), "", &stale); !fault.Is(err, &types.ConcurrentAccess{}) {
		t.Errorf("a stale change: %v", err)
	}
}
