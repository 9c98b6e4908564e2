package cri

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

const (
	// statsTimeout bounds one guest's answer; a guest that is slower is left
	// out of this round.
	statsTimeout = 4 * time.Second
	// statsParallel is how many guests are asked at once. More than the host has
	// CPUs take each other's caches: eight emulated guests at once took 70 ms
	// of CPU each for what one takes 25 for. A guest that does not answer must
	// not hold up the rest either.
	statsParallel = 4
	// statsFresh is how long a reading serves whoever asks next. A kubelet's
	// summary, its cAdvisor metrics and its eviction ask for the same numbers
	// side by side, and each answer costs a guest CPU that its pod pays for.
	statsFresh = minInterval
)

// What a guest that does nothing counts does not change, but to say so it must
// wake up: asked every 10 s by a kubelet's eviction and every 15 s by its
// metrics, that was most of what an idle pod cost (docs/spec.md, idle_cpu). So
// its last reading serves lists for idleFresh, as long as this host has had
// nothing done in the guest and sees that the VM has hardly run since: for at
// most 1/idleShare of the time and idleTail, which is what a guest does behind its
// answer, and with at most idleGrowth bytes that it had not touched before. CPU
// figures of containers are too small by that at most.
const (
	idleFresh  = time.Minute // a half more or less, so that not all are due at once
	idleShare  = 200         // 0.5 % of a core
	idleTail   = 10 * time.Millisecond
	idleGrowth = 4 << 20
)

// A reading is what one pod's guest and VMM say at one time.
type reading struct {
	sb    *sandbox
	pod   *pod
	at    time.Time
	guest *agentapi.StatsResponse
	cpu   *uint64 // CPU time of the VM, in ns, where the hypervisor tells
}

// container finds one container's numbers in a reading.
func (r *reading) container(id string) *agentapi.ContainerStats {
	for _, c := range r.guest.GetContainers() {
		if c.Id == id {
			return c
		}
	}
	return nil
}

// stats asks the guest for everything it counts.
func (p *pod) stats(ctx context.Context) (*agentapi.StatsResponse, error) {
	if why := p.link.holding(); why != nil {
		return nil, fmt.Errorf("%w: %w", why, errdefs.ErrUnavailable)
	}
	return call(ctx, p.link, agentapi.AgentService.Stats, &agentapi.StatsRequest{})
}

// A meterReading is what the host knows of a pod's VM at one time, without
// asking the guest.
type meterReading struct {
	vmpod.Usage
	acts uint64 // see link
}

// meter is nil where the hypervisor does not tell.
func (p *pod) meter(ctx context.Context) *meterReading {
	m, ok := p.machine.(vmpod.Meter)
	if !ok {
		return nil
	}
	acts := p.link.acts.Load()
	u, err := m.Counters(ctx)
	if err != nil {
		return nil
	}
	return &meterReading{Usage: u, acts: acts}
}

// readings asks all ready sandboxes that keep says yes to, side by side. A
// guest that does not answer is left out.
func (s *Server) readings(ctx context.Context, keep func(*sandbox) bool) []*reading {
	var mu sync.Mutex
	var out []*reading
	g := errgroup.Group{}
	g.SetLimit(statsParallel)
	for _, sb := range s.store.allSandboxes() {
		if sb.State != runtimeapi.PodSandboxState_SANDBOX_READY || !keep(sb) {
			continue
		}
		g.Go(func() error {
			r, err := s.read(ctx, sb, letSleep)
			if err != nil {
				s.log.Debug("no stats from a guest this time", "pod_uid", sb.VM.PodUID, "err", err)
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			out = append(out, r)
			return nil
		})
	}
	_ = g.Wait()
	return out
}

// A lastReading is a pod's latest reading; one caller at a time makes a new one,
// and those who came meanwhile share it.
type lastReading struct {
	turn chan struct{} // of one
	// Whose turn it is may look at the rest. read is when the guest was last
	// asked, then what the hypervisor counted after its answer.
	last  *reading
	read  time.Time
	then  *meterReading
	fresh time.Duration // how long the reading serves while the guest is idle
}

func newLastReading() *lastReading { return &lastReading{turn: make(chan struct{}, 1)} }

// take waits for the caller's turn. It returns a reading that is good enough,
// or nil and the duty to call give.
func (l *lastReading) take(ctx context.Context) (*reading, error) {
	select {
	case l.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("another reading of the guest is under way: %w", ctx.Err())
	}
	if l.last != nil && time.Since(l.last.at) < statsFresh {
		return l.serve(), nil
	}
	return nil, nil
}

// takeIdle is take for those who let a guest sleep that does nothing; meter may
// return nil: it is not known.
func (l *lastReading) takeIdle(ctx context.Context, meter func() *meterReading) (*reading, error) {
	r, err := l.take(ctx)
	if r != nil || err != nil || l.last == nil || l.then == nil {
		return r, err
	}
	now := meter()
	if now == nil || !idleSince(*l.then, *now) || now.Time.Sub(l.read) >= l.fresh {
		return nil, nil
	}
	again := *l.last
	again.at, again.cpu = now.Time, &now.CPU
	l.last = &again
	return l.serve(), nil
}

// serve ends the caller's turn with a copy of the last reading.
func (l *lastReading) serve() *reading {
	r := *l.last
	<-l.turn
	return &r
}

// give ends the caller's turn; r is nil if it got nothing, and then is nil where
// the hypervisor does not count.
func (l *lastReading) give(r *reading, then *meterReading) {
	if r != nil {
		l.last, l.read, l.then = r, r.at, then
		l.fresh = idleFresh/2 + rand.N(idleFresh)
	}
	<-l.turn
}

// idleSince says whether a VM has hardly run between two readings of its meter.
func idleSince(then, now meterReading) bool {
	ran, took := time.Duration(now.CPU-then.CPU), now.Time.Sub(then.Time)
	return now.acts == then.acts && now.CPU >= then.CPU && ran <= took/idleShare+idleTail && now.Resident <= then.Resident+idleGrowth
}

// A freshness says what may be told of a guest that does nothing.
type freshness bool

const (
	askGuest freshness = false // what it says now
	letSleep freshness = true  // what it said last
)

func (s *Server) read(ctx context.Context, sb *sandbox, f freshness) (*reading, error) {
	p, _, err := s.podOf(sb.ID)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	var r *reading
	if f == letSleep {
		r, err = p.latest.takeIdle(ctx, func() *meterReading {
			if p.link.holding() != nil {
				return nil // nothing is told of a VM that does not answer
			}
			return p.meter(ctx)
		})
	} else {
		r, err = p.latest.take(ctx)
	}
	if err != nil {
		return nil, err
	}
	if r != nil {
		r.sb = sb
		return r, nil
	}
	r, then, err := readNow(ctx, p, sb)
	p.latest.give(r, then)
	return r, err
}

func readNow(ctx context.Context, p *pod, sb *sandbox) (*reading, *meterReading, error) {
	guest, err := p.stats(ctx)
	if err != nil {
		return nil, nil, err
	}
	r := &reading{sb: sb, pod: p, at: time.Now(), guest: guest}
	then := p.meter(ctx)
	if then != nil {
		r.cpu = &then.CPU
	}
	return r, then, nil
}
