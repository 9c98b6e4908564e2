package cri

import (
	"errors"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

func hintOf(uid string) vmpod.Hint {
	return vmpod.Hint{Owner: vmpod.Owner{PodUID: uid, Namespace: "default", Name: "web"}, CPUs: 1, Memory: 256 * mib, EphemeralBytes: 1 << 30}
}

// What cannot be taken back now is tried again without another start.
func TestReclaimIsTriedAgain(t *testing.T) {
	for _, step := range []string{"remove", "detach"} {
		t.Run(step, func(t *testing.T) {
			h := newFakeHost()
			s := serve(t, h, t.TempDir())
			if err := s.Prepare(t.Context(), hintOf(podUID)); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the pod is prepared", func() bool { return h.guest(podUID) != nil })
			h.set(step, errors.New("not now"))
			if err := s.Forget(t.Context(), podUID); err != nil {
				t.Fatal(err)
			}
			vm := vmpod.ID{PodUID: podUID}
			eventually(t, "taking it back has failed", func() bool {
				s.mu.Lock()
				defer s.mu.Unlock()
				return s.owed[vm]
			})
			if owed, err := s.store.hasIntent(vm); err != nil || !owed {
				t.Errorf("intent %v, %v: must stay until all is taken back", owed, err)
			}
			h.set(step, nil)
			eventually(t, "all is taken back", func() bool { return len(h.left()) == 0 })
			eventually(t, "nothing is owed", func() bool {
				owed, err := s.store.hasIntent(vm)
				return err == nil && !owed
			})
		})
	}
}

// servePrepared serves on a host on which an earlier server ended when it had
// prepared the pod. What takes that back waits at a step of the host until letGo.
func servePrepared(t *testing.T, step string) (h *fakeHost, dir string, s *testServer, letGo func()) {
	t.Helper()
	h, dir = newFakeHost(), t.TempDir()
	s = serve(t, h, dir)
	if err := s.Prepare(t.Context(), hintOf(podUID)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod is prepared", func() bool { return h.guest(podUID) != nil })
	s.stop()
	release := h.holdAt(step)
	return h, dir, serve(t, h, dir), func() {
		h.mu.Lock()
		h.hold = map[string]chan struct{}{}
		h.mu.Unlock()
		release()
	}
}

// A sandbox never gets what is left of an earlier one, its disk above all.
func TestSandboxWaitsForWhatIsLeft(t *testing.T) {
	h, dir, s, letGo := servePrepared(t, "detach")
	// At once: the start has only begun to take the preparation back.
	ran := make(chan error, 1)
	go func() {
		_, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(dir)})
		ran <- err
	}()
	select {
	case err := <-ran:
		t.Errorf("RunPodSandbox did not wait: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	letGo()
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.launches != 2 || len(h.disks) != 1 {
		t.Errorf("%d launches, disks %v; want a second VM with a disk of its own", h.launches, h.disks)
	}
}

// A hint that comes while the last start's preparation is being taken back is
// worked on after that.
func TestPrepareAfterTakingBack(t *testing.T) {
	h, _, s, letGo := servePrepared(t, "remove")
	if err := s.Prepare(t.Context(), hintOf(podUID)); err != nil {
		t.Fatal(err)
	}
	letGo()
	eventually(t, "the pod is prepared anew", func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.launches == 2
	})
	if err := s.Forget(t.Context(), podUID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all is taken back", func() bool { return len(h.left()) == 0 })
}

// Stopping a sandbox whose VM has ended by itself keeps the reason, also when
// another process heard of the end.
func TestStopKeepsTheReason(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	id := s.run(t)
	h.mu.Lock()
	m := h.machines[vmpod.ID{PodUID: podUID}]
	h.mu.Unlock()
	m.die(vmpod.Exit{Reason: vmpod.ExitGuestPanic, Message: "panicked"})
	dead := func() bool {
		sb, ok := s.store.sandbox(id)
		return ok && sb.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	eventually(t, "the end is recorded", dead)
	s.stop()
	s = serve(t, h, dir)
	if _, err := s.rt.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Fatal(err)
	}
	if sb, _ := s.store.sandbox(id); sb.Reason != string(vmpod.ExitGuestPanic) || !sb.Released {
		t.Errorf("reason %q, released %v; want %q and released", sb.Reason, sb.Released, vmpod.ExitGuestPanic)
	}
}
