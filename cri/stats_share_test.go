package cri

import (
	"context"
	"errors"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Those who ask side by side share one reading, and one that failed holds
// nobody up.
func TestLastReadingIsShared(t *testing.T) {
	l := newLastReading()
	ctx := t.Context()
	if r, err := l.take(ctx); r != nil || err != nil {
		t.Fatalf("the first caller got %v, %v", r, err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := l.take(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller whose time is over: %v", err)
	}
	got := make(chan *reading)
	go func() {
		r, err := l.take(ctx)
		if err != nil {
			t.Error(err)
		}
		got <- r
	}()
	made := &reading{at: time.Now()}
	l.give(made, nil)
	if r := <-got; r == nil || !r.at.Equal(made.at) || r == made {
		t.Errorf("the second caller got %v, want a copy of the first one's", r)
	}
	l.last.at = l.last.at.Add(-statsFresh)
	if r, err := l.take(ctx); r != nil || err != nil {
		t.Fatalf("an old reading was shared: %v, %v", r, err)
	}
	l.give(nil, nil) // it failed
	if r, err := l.take(ctx); r != nil || err != nil {
		t.Fatalf("after a failure: %v, %v", r, err)
	}
	l.give(nil, nil)
}

// Lists let a guest sleep that has hardly run, and tell of it as of now; all
// else asks it.
func TestIdleGuestIsLetSleep(t *testing.T) {
	list := func(s *testServer, _ string) (*runtimeapi.PodSandboxStats, error) {
		r, err := s.rt.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
		if err != nil || len(r.Stats) != 1 {
			return nil, errors.Join(err, errors.New("not one pod"))
		}
		return r.Stats[0], nil
	}
	one := func(s *testServer, sb string) (*runtimeapi.PodSandboxStats, error) {
		r, err := s.rt.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: sb})
		return r.GetStats(), err
	}
	for _, c := range []struct {
		name  string
		then  func(*fakeHost, *pod) // 10 s later
		ask   func(*testServer, string) (*runtimeapi.PodSandboxStats, error)
		asked int
	}{
		{"nothing happened", func(*fakeHost, *pod) {}, list, 1},
		{"hardly ran", func(h *fakeHost, _ *pod) { h.ran.Add(45e6) }, list, 1},
		{"ran", func(h *fakeHost, _ *pod) { h.ran.Add(70e6) }, list, 2},
		{"grew", func(h *fakeHost, _ *pod) { h.touched.Add(5 << 20) }, list, 2},
		{"counts from zero", func(h *fakeHost, _ *pod) { h.ran.Store(1<<64 - 5e9) }, list, 2},
		{"was told to do something", func(_ *fakeHost, p *pod) { p.link.acts.Add(1) }, list, 2},
		{"asked too long ago", func(_ *fakeHost, p *pod) { p.latest.read = p.latest.read.Add(-3 * idleFresh / 2) }, list, 2},
		{"one pod alone", func(*fakeHost, *pod) {}, one, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newFakeHost()
			s := serve(t, h, t.TempDir())
			sb := s.run(t)
			s.start(t, s.create(t, sb, ctrConfig("main")))
			first, err := list(s, sb)
			if err != nil {
				t.Fatal(err)
			}
			p := s.livePod(sb)
			p.latest.last.at = p.latest.last.at.Add(-10 * time.Second)
			p.latest.read = p.latest.read.Add(-10 * time.Second)
			p.latest.then.Time = p.latest.then.Time.Add(-10 * time.Second)
			c.then(h, p)
			again, err := c.ask(s, sb)
			if err != nil {
				t.Fatal(err)
			}
			if got := int(h.guest(podUID).statsAsked.Load()); got != c.asked {
				t.Errorf("the guest was asked %d times, want %d", got, c.asked)
			}
			a, b := first.Linux.Containers[0], again.Linux.Containers[0]
			if b.Cpu.Timestamp <= a.Cpu.Timestamp || b.Cpu.UsageCoreNanoSeconds.Value != a.Cpu.UsageCoreNanoSeconds.Value {
				t.Errorf("container: %v, then %v", a.Cpu, b.Cpu)
			}
			if want := 5e9 + h.ran.Load(); again.Linux.Cpu.UsageCoreNanoSeconds.Value != want {
				t.Errorf("the pod's CPU is %v, the hypervisor says %d", again.Linux.Cpu, want)
			}
		})
	}
}
