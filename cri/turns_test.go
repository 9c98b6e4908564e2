package cri

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

// waiters note who has had a turn, and give it back.
type waiters struct {
	mu   sync.Mutex
	got  []string
	done map[string]func()
}

// take takes a turn behind the test's back.
func (w *waiters) take(ctx context.Context, turns *turns, name string, ahead bool) {
	go func() {
		give, err := turns.take(ctx, nil, ahead)
		w.mu.Lock()
		defer w.mu.Unlock()
		if err != nil {
			w.got = append(w.got, name+": "+err.Error())
			return
		}
		w.got, w.done[name] = append(w.got, name), give
	}()
	synctest.Wait()
}

func (w *waiters) give(name string) {
	w.mu.Lock()
	give := w.done[name]
	w.mu.Unlock()
	give()
}

// have fails unless these have had their turns, in this order.
func (w *waiters) have(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !slices.Equal(w.got, want) {
		t.Fatalf("turns of %q, want %q", w.got, want)
	}
}

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns, clock := newTurns(2, 5*time.Second), newStartClock()
		ctx, cancel := context.WithCancelCause(t.Context())
		w := &waiters{done: map[string]func(){}}
		w.take(t.Context(), turns, "a", false)
		w.take(t.Context(), turns, "b", true)
		w.take(t.Context(), turns, "c", false)
		w.take(ctx, turns, "d", false)
		w.take(t.Context(), turns, "e", false)
		w.take(t.Context(), turns, "f", true)
		w.have(t, "a", "b")
		w.give("a") // f goes before those that begin
		w.give("a") // gives nothing more
		w.have(t, "a", "b", "f")
		cancel(errors.New("gone"))
		w.have(t, "a", "b", "f", "d: gone")
		w.give("f")
		w.have(t, "a", "b", "f", "d: gone", "c")
		time.Sleep(5 * time.Second) // b's and c's turns are over
		w.have(t, "a", "b", "f", "d: gone", "c", "e")
		w.give("b") // too late, and gives nothing
		w.give("c")
		if _, err := turns.take(t.Context(), clock, false); err != nil { // e has the other
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := turns.take(t.Context(), clock, false); err != nil || time.Since(start) != 5*time.Second {
			t.Fatalf("a turn that is not free: after %s, %v", time.Since(start), err)
		}
		if s, _ := clock.finish(time.Time{}, time.Now()); s.Total(vmpod.PhaseQueue) != 5*time.Second {
			t.Errorf("the clock has %s of waiting", s.Total(vmpod.PhaseQueue))
		}
		time.Sleep(5 * time.Second) // no timer outlives the test
	})
	give, err := newTurns(0, time.Second).take(t.Context(), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	give()
}

// Each step of a start that works in the guest waits for its turn, and is as if
// it had not been asked for when its caller leaves first.
func TestStartsTakeTurns(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir(), func(c *Config) { c.StartsAtOnce = 1 })
	s.turns.limit = time.Hour
	waits := func(what string, call func(ctx context.Context) error) {
		t.Helper()
		give, err := s.turns.take(t.Context(), nil, true)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := call(ctx); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s, not its turn: %v", what, err)
		}
		give()
	}
	waits("run", func(ctx context.Context) error {
		_, err := s.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
		return err
	})
	if h.mu.Lock(); h.launches != 0 {
		t.Errorf("%d machines were launched out of turn", h.launches)
	}
	h.mu.Unlock()
	sandbox := s.run(t)
	waits("create", func(ctx context.Context) error {
		_, err := s.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox, Config: ctrConfig("web"), SandboxConfig: podConfig(s.dir)})
		return err
	})
	if list := s.store.containersOf(sandbox); len(list) != 0 {
		t.Errorf("%d containers were made out of turn", len(list))
	}
	id := s.create(t, sandbox, ctrConfig("web"))
	waits("start", func(ctx context.Context) error {
		_, err := s.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		return err
	})
	if got := s.status(t, id).State; got != runtimeapi.ContainerState_CONTAINER_CREATED {
		t.Errorf("out of turn the container is %s", got)
	}
	s.start(t, id)
	s.turns.mu.Lock()
	defer s.turns.mu.Unlock()
	if s.turns.free != 1 {
		t.Errorf("%d turns are free in the end, want 1", s.turns.free)
	}
}
