package vmpodtest

import (
	"context"
	"strconv"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

// testGrow gives a running machine more memory and CPUs, through a restart of
// the driver. Drivers whose machines do not grow are not judged.
func testGrow(t *testing.T, h *Harness) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*bootPatience)
	defer cancel()
	s := spec("grow-51c7")
	m := launch(t, h, s)
	g, ok := m.(vmpod.Grower)
	if !ok {
		t.Skip("this driver's machines do not grow")
	}
	k := Dial(t, m)
	before := extent(t, g)
	if before.CPUs != s.CPUs || before.Memory != s.Memory || before.MaxCPUs <= s.CPUs || before.MaxMemory < s.Memory+512<<20 {
		t.Fatalf("extent after the launch: %+v, launched with %d CPUs and %d bytes", before, s.CPUs, s.Memory)
	}
	total := memory(t, k)
	refuseGrowth(t, g, before)

	const more = 200 << 20
	for range 2 { // the second finds it done
		if err := g.Grow(ctx, 0, s.Memory+more); err != nil {
			t.Fatalf("Grow of memory: %v", err)
		}
	}
	if e := extent(t, g); e.CPUs != 1 || e.Memory != s.Memory+more {
		t.Errorf("extent after 200 MiB more: %+v", e)
	}
	grown := func(by int64) func(string) bool {
		return func(string) bool { k.Ask("online"); return memory(t, k) >= total+by-8<<20 }
	}
	k.AskUntil("boot", grown(more))
	if a := k.Ask("fill 200"); a != "ok" {
		t.Errorf("200 MiB of the memory cannot be used: %s", a)
	}

	if err := g.Grow(ctx, 2, s.Memory+2*more); err != nil {
		t.Fatalf("Grow of both: %v", err)
	}
	k.AskUntil("boot", grown(2*more))
	k.AskUntil("cpus", func(a string) bool { k.Ask("online"); return a == "2" })

	// Who comes next finds it as it is, and a Launch of the same Spec finds it.
	h.Driver = h.Restart(t, nil)
	again, err := h.Driver.Launch(ctx, s)
	if err != nil {
		t.Fatalf("Launch of what has grown: %v", err)
	}
	g = again.(vmpod.Grower)
	want := vmpod.Extent{CPUs: 2, Memory: s.Memory + 2*more, MaxCPUs: before.MaxCPUs, MaxMemory: before.MaxMemory}
	if e := extent(t, g); e != want {
		t.Errorf("extent after a restart of the driver: %+v, want %+v", e, want)
	}
	if got := again.Spec(); got.CPUs != want.CPUs || got.Memory != want.Memory {
		t.Errorf("Spec after a restart of the driver: %d CPUs, %d bytes, want %+v", got.CPUs, got.Memory, want)
	}
	if err := g.Grow(ctx, 1, s.Memory); err != nil {
		t.Errorf("Grow to less: %v", err)
	}
	if e := extent(t, g); e != want {
		t.Errorf("extent after Grow to less: %+v, want %+v", e, want)
	}
	if err := again.Stop(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if err := g.Grow(ctx, 3, 0); !errdefs.IsUnavailable(err) {
		t.Errorf("Grow of what is off: %v, want Unavailable", err)
	}
}

func refuseGrowth(t *testing.T, g vmpod.Grower, before vmpod.Extent) {
	t.Helper()
	for name, c := range map[string]struct {
		cpus   int
		memory int64
		is     func(error) bool
	}{
		"negative CPUs":   {-1, 0, errdefs.IsInvalidArgument},
		"negative memory": {0, -1, errdefs.IsInvalidArgument},
		"too many CPUs":   {before.MaxCPUs + 1, before.Memory + 64<<20, errdefs.IsResourceExhausted},
		"too much memory": {before.CPUs + 1, before.MaxMemory + 1, errdefs.IsResourceExhausted},
	} {
		if err := g.Grow(context.Background(), c.cpus, c.memory); !c.is(err) {
			t.Errorf("Grow, %s: %v", name, err)
		}
	}
	if e := extent(t, g); e != before {
		t.Errorf("extent after refusals: %+v, want %+v", e, before)
	}
}

func extent(t *testing.T, g vmpod.Grower) vmpod.Extent {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	e, err := g.Extent(ctx)
	if err != nil {
		t.Fatalf("Extent: %v", err)
	}
	return e
}

// memory is the guest's MemTotal in bytes.
func memory(t *testing.T, k *Talk) int64 {
	t.Helper()
	kib, err := strconv.ParseInt(k.Ask("memory"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}
