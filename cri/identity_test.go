package cri

import (
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// What the guest is told is the VM's own, and a guest that cannot be trusted to
// use it before anything else is refused, with nothing left.
func TestIdentity(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	id := s.run(t)
	g := h.guest(podUID)
	vm := vmpod.ID{PodUID: podUID}
	if r := g.setup; r.VmUuid != vm.UUID().String() || len(r.MachineId) != 32 || len(r.Entropy) < 64 || r.Hostname == "" || r.PodUid != podUID || len(r.Interfaces) != 1 {
		t.Errorf("the guest was told %v", r)
	}
	if d := time.Since(time.Unix(0, g.setup.ClockNs)); d < 0 || d > time.Minute {
		t.Errorf("the guest's clock is %v old", d)
	}
	s.remove(t, id)
	seen := g.bootID

	for _, tc := range []struct {
		name, says string
		change     func(*fakeGuest)
	}{
		{"a guest without a protocol", "make guest", func(g *fakeGuest) { g.protocol = 0 }},
		{"a guest of before", "make guest", func(g *fakeGuest) { g.protocol = agentapi.ProtocolIdentity - 1 }},
		{"a guest without a boot id", "boot id", func(g *fakeGuest) { g.bootID = "" }},
		{"a VM's twin, the VM being gone", "random numbers", func(g *fakeGuest) { g.bootID = seen }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			config := podConfig(s.dir)
			config.Metadata.Uid = uuid.NewString()
			h.newGuest = tc.change
			_, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
			h.newGuest = nil
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("got %v", err)
			}
			if left := h.left(); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestBootIDs(t *testing.T) {
	var b bootIDs
	one, two := vmpod.ID{PodUID: "one"}, vmpod.ID{PodUID: "two"}
	id := uuid.NewString()
	for range 2 { // its own again: the host has lost the answer
		if err := b.claim(id, one); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.claim(strings.ToUpper(id), two); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("twice the same: %v", err)
	}
	for range maxBoots {
		if err := b.claim(uuid.NewString(), two); err != nil {
			t.Fatal(err)
		}
	}
	if len(b.of) != maxBoots || len(b.order) != maxBoots {
		t.Errorf("%d and %d are remembered", len(b.of), len(b.order))
	}
}

func TestClockError(t *testing.T) {
	const sent, took = 1_000_000, 500
	for read, want := range map[int64]time.Duration{
		sent: 0, sent + took: 0, sent + 7: 0,
		sent - 1: 1, 0: sent,
		sent + took + 3: -3, 9 * sent: -8*sent + took,
	} {
		if got := clockError(sent, took, read); got != want {
			t.Errorf("read %d between %d and %d: %d, want %d", read, sent, sent+took, got, want)
		}
	}
}

// A guest's clock that goes wrong is set right at the next look, and one that
// is right is left alone.
func TestClockIsKept(t *testing.T) {
	for _, off := range []time.Duration{-3 * time.Hour, -time.Second, 0, 2 * clockTolerance, time.Hour} {
		t.Run(off.String(), func(t *testing.T) {
			h := newFakeHost()
			s := serve(t, h, t.TempDir(), withPace)
			s.run(t)
			g := h.guest(podUID)
			g.mu.Lock()
			g.clock = off
			g.mu.Unlock()
			eventually(t, "the clock is right", func() bool {
				g.mu.Lock()
				defer g.mu.Unlock()
				return g.clock.Abs() <= clockTolerance
			})
			if off != 0 {
				return
			}
			time.Sleep(5 * fastPace.look)
			g.mu.Lock()
			defer g.mu.Unlock()
			if g.told != 0 {
				t.Errorf("a clock that is right was corrected %d times", g.told)
			}
		})
	}
}
