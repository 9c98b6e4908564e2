package cri

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	raceSeed   = flag.Uint64("race-seed", 0, "`seed` of the random tests; 0: by the clock")
	raceRounds = flag.Int("race-rounds", 40, "rounds of the random tests")
)

// seeded returns a source of chance whose seed is in the log.
func seeded(t *testing.T) *rand.Rand {
	seed := *raceSeed
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("the same again: go test ./cri -run '^%s$' -race-seed %d", t.Name(), seed)
	return rand.New(rand.NewPCG(seed, 0))
}

func podOfUID(dir, uid string) *runtimeapi.PodSandboxConfig {
	c := podConfig(dir)
	c.Metadata.Uid, c.Metadata.Name = uid, "pod-"+uid
	return c
}

// Twenty calls for one (uid, attempt) are one machine and one sandbox.
func TestRunTwentyTimesAtOnce(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	var mu sync.Mutex
	ids := map[string]int{}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			ids[r.GetPodSandboxId()]++
			mu.Unlock()
		})
	}
	wg.Wait()
	if len(ids) != 1 || h.launches != 1 {
		t.Errorf("%d sandboxes, %d launches", len(ids), h.launches)
	}
	// Another attempt is another machine, and the first stays.
	c := podConfig(s.dir)
	c.Metadata.Attempt = 1
	r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: c})
	if err != nil || ids[r.PodSandboxId] != 0 || h.launches != 2 {
		t.Errorf("the second attempt: %v, %d launches", err, h.launches)
	}
}

// A pod at which every step hangs holds nobody else up.
func TestPodsRunSideBySide(t *testing.T) {
	for _, step := range []string{"attach", "ephemeral", "launch", "dial", "setup", "create", "start", "stop", "remove", "detach"} {
		t.Run(step, func(t *testing.T) {
			h := newFakeHost()
			s := serve(t, h, t.TempDir())
			other := s.run(t)
			ctr := s.create(t, other, ctrConfig("c"))
			s.start(t, ctr)
			release := h.holdAt(step)
			hung := make(chan struct{})
			go func() {
				defer close(hung)
				s.whole(context.Background(), "hung")
			}()
			time.Sleep(20 * time.Millisecond)
			select {
			case <-hung:
				t.Fatalf("nothing hangs at %s", step)
			default:
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if step != "start" { // the fake's execs hang there, too
				x, err := s.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"echo", "here"}})
				if err != nil || string(x.Stdout) != "here" {
					t.Errorf("exec beside it: %v", err)
				}
			}
			if _, err := s.rt.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{}); err != nil {
				t.Errorf("stats beside it: %v", err)
			}
			if _, err := s.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: ctr, Timeout: 5}); err != nil {
				t.Errorf("stop beside it: %v", err)
			}
			if _, err := s.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: ctr}); err != nil {
				t.Errorf("remove beside it: %v", err)
			}
			release()
			<-hung
			s.remove(t, other)
			if left := h.left(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

// whole leads a pod through its life; errors end it early, and it is removed.
func (s *testServer) whole(ctx context.Context, uid string) {
	r, err := s.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podOfUID(s.dir, uid)})
	if err != nil {
		s.t.Error(err)
		return
	}
	c, err := s.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: ctrConfig("c")})
	if err == nil {
		_, err = s.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})
	}
	if err != nil {
		s.t.Error(err)
	}
	if _, err := s.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		s.t.Error(err)
	}
}

// fair errors are those that say what to do; a race is no server's fault.
func fair(err error) bool {
	switch status.Code(err) {
	case codes.Unknown, codes.Internal, codes.DataLoss, codes.InvalidArgument, codes.Unimplemented:
		return false
	}
	return true
}

// Stop and Remove race with all that can be under way in a pod; afterwards
// nothing of it is left anywhere.
func TestStopRacesWithEverything(t *testing.T) {
	rnd := seeded(t)
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	for round := range *raceRounds {
		uid := fmt.Sprintf("race-%d", round)
		r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podOfUID(s.dir, uid)})
		if err != nil {
			t.Fatal(err)
		}
		sb := r.PodSandboxId
		var wg sync.WaitGroup
		act := func(what string, do func() error) {
			pause := time.Duration(rnd.IntN(3000)) * time.Microsecond
			wg.Go(func() {
				time.Sleep(pause)
				if err := do(); err != nil && !fair(err) {
					t.Errorf("round %d, %s: %v", round, what, err)
				}
			})
		}
		for i := range 3 {
			act("create and start", func() error { return s.createAndUse(t.Context(), sb, fmt.Sprintf("c%d", i)) })
		}
		for range 2 {
			act("stop", func() error {
				_, err := s.rt.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: sb})
				return err
			})
			act("remove", func() error {
				_, err := s.rt.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sb})
				return err
			})
			act("run", func() error {
				_, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podOfUID(s.dir, uid)})
				return err
			})
		}
		wg.Wait()
		s.removeAll(t)
		s.nothingLeft(t, h)
		if t.Failed() {
			return
		}
	}
}

func (s *testServer) createAndUse(ctx context.Context, sandbox, name string) error {
	c, err := s.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox, Config: ctrConfig(name)})
	if err != nil {
		return err
	}
	if _, err := s.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return err
	}
	if _, err := s.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: c.ContainerId, Cmd: []string{"echo", "x"}, Timeout: 10}); err != nil {
		return err
	}
	if _, err := s.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: c.ContainerId}); err != nil {
		return err
	}
	_, err = s.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ContainerId})
	return err
}

func (s *testServer) removeAll(t *testing.T) {
	t.Helper()
	l, err := s.rt.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, sb := range l.Items {
		s.remove(t, sb.Id)
	}
}

// nothingLeft holds the records, the intents and the host against each other.
func (s *testServer) nothingLeft(t *testing.T, h *fakeHost) {
	t.Helper()
	eventually(t, "what was given up is taken back", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.runs)+len(s.preps)+len(s.pods) == 0
	})
	if left := h.left(); len(left) > 0 {
		t.Errorf("left on the host: %s", strings.Join(left, ", "))
	}
	if in, err := s.store.intents(); err != nil || len(in) > 0 {
		t.Errorf("intents left: %v, %v", in, err)
	}
	if n, m := len(s.store.allSandboxes()), len(s.store.allContainers()); n+m > 0 {
		t.Errorf("%d sandboxes and %d containers are listed", n, m)
	}
}

// slowly makes every step of the host take a random while.
func (h *fakeHost) slowly(t *testing.T, rnd *rand.Rand) (stop func()) {
	steps := []string{"attach", "ephemeral", "image disk", "launch", "dial", "hello", "setup", "plug", "create", "start", "stop", "remove", "detach", "release", "remove disk"}
	done := make(chan struct{})
	var mu sync.Mutex
	pause := func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(rnd.IntN(8000)) * time.Microsecond
	}
	var wg sync.WaitGroup
	for _, step := range steps {
		wg.Go(func() {
			for {
				gate := make(chan struct{})
				h.mu.Lock()
				h.hold[step] = gate
				h.mu.Unlock()
				select {
				case <-time.After(pause()):
					close(gate)
				case <-done:
					h.mu.Lock()
					delete(h.hold, step)
					h.mu.Unlock()
					close(gate)
					return
				}
			}
		})
	}
	return func() { close(done); wg.Wait() }
}

// Callers leave at random instants: whatever was half made then is taken back
// or is whole, and the same call again succeeds.
func TestCallersLeaveAtRandom(t *testing.T) {
	rnd := seeded(t)
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	stop := h.slowly(t, rand.New(rand.NewPCG(rnd.Uint64(), 1)))
	var wg sync.WaitGroup
	for worker := range 4 {
		rnd := rand.New(rand.NewPCG(rnd.Uint64(), 2))
		wg.Go(func() {
			for round := range *raceRounds / 4 {
				s.hastyLife(t, rnd, fmt.Sprintf("hasty-%d-%d", worker, round))
			}
		})
	}
	wg.Wait()
	stop()
	s.removeAll(t)
	s.nothingLeft(t, h)
}

// hastyLife leads a pod through its life with deadlines of up to 200 ms; each
// step is repeated until it succeeds.
func (s *testServer) hastyLife(t *testing.T, rnd *rand.Rand, uid string) {
	insist := func(what string, do func(context.Context) error) bool {
		for try := 0; ; try++ {
			limit := time.Duration(rnd.IntN(200)) * time.Millisecond
			if try > 20 {
				limit = time.Minute // the machine is busy
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			err := do(ctx)
			cancel()
			switch code := status.Code(err); {
			case err == nil:
				return true
			case try > 25 || code != codes.DeadlineExceeded && code != codes.Canceled && code != codes.Unavailable:
				t.Errorf("%s of %s, try %d: %v", what, uid, try, err)
				return false
			}
		}
	}
	var sb, ctr string
	ok := insist("run", func(ctx context.Context) error {
		r, err := s.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podOfUID(s.dir, uid)})
		sb = r.GetPodSandboxId()
		return err
	}) && insist("create", func(ctx context.Context) error {
		r, err := s.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: sb, Config: ctrConfig("c")})
		ctr = r.GetContainerId()
		return err
	}) && insist("start", func(ctx context.Context) error {
		_, err := s.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: ctr})
		return err
	})
	if !ok {
		return
	}
	if n := len(s.store.containersOf(sb)); n != 1 {
		t.Errorf("%d containers of %s, where one was wanted", n, uid)
	}
	eventually(t, "the guest of "+uid+" has one container", func() bool {
		g := s.guestOf(uid)
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.containers) == 1
	})
	for _, step := range []func(context.Context) error{
		func(ctx context.Context) error {
			_, err := s.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: ctr})
			return err
		},
		func(ctx context.Context) error {
			_, err := s.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: ctr})
			return err
		},
		func(ctx context.Context) error {
			_, err := s.rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sb})
			return err
		},
	} {
		if !insist("teardown", step) {
			return
		}
	}
}

func (s *testServer) guestOf(uid string) *fakeGuest {
	return s.config.Driver.(fakeDriver).guest(uid)
}
