package cri

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

const (
	// clockTolerance is how wrong a guest's clock may be: an exchange with a
	// guest at rest takes a few milliseconds, and nothing less is known then.
	clockTolerance = 20 * time.Millisecond
	// clockDoubt is how long setting a guest's clock may take without being
	// checked: it may be slow by as much.
	clockDoubt = 100 * time.Millisecond
	// clockRounds is how often a clock is read again that was found wrong.
	clockRounds = 3
)

// A clockKeeper keeps one guest's wall clock by this host's, with the hellos
// that are exchanged anyway: the guest has no timer for it.
type clockKeeper struct {
	log *slog.Logger

	mu   sync.Mutex
	off  *agentapi.ClockReading // to be told with the next hello
	read time.Time              // when the clock was read last
}

// hello is the agent's, with the clock in both directions.
func (c *clockKeeper) hello(ctx context.Context, guest agentapi.AgentService, r *agentapi.HelloRequest) (*agentapi.HelloResponse, error) {
	c.mu.Lock()
	told := c.off
	c.mu.Unlock()
	sent := time.Now()
	resp, err := guest.Hello(ctx, &agentapi.HelloRequest{HostVersion: r.HostVersion, Clock: told})
	if err != nil || !resp.SandboxReady {
		return resp, err
	}
	if told != nil {
		c.log.Info("guest's clock was wrong and is corrected", "by", time.Duration(told.HostNs-told.GuestNs))
	}
	c.note(sent, time.Since(sent), resp.ClockNs)
	return resp, nil
}

// note judges what the guest's clock read at some time between sent and took
// later.
func (c *clockKeeper) note(sent time.Time, took time.Duration, guest int64) {
	by := clockError(sent.UnixNano(), took, guest)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.off, c.read = nil, time.Now()
	if by.Abs() > clockTolerance && guest > 0 {
		c.off = &agentapi.ClockReading{HostNs: guest + int64(by), GuestNs: guest}
	}
}

// clockError returns by how much a clock is to be set forward that read so
// between sent and took later; 0 if it may be right.
func clockError(sent int64, took time.Duration, read int64) time.Duration {
	if read < sent {
		return time.Duration(sent - read)
	}
	return min(time.Duration(sent-read)+took, 0)
}

// wrong says that the guest is to be told.
func (c *clockKeeper) wrong() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.off != nil
}

// due says that the clock was not read for a while.
func (c *clockKeeper) due(every time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(c.read) >= every
}

// hello asks the guest who it is.
func (l *link) hello(ctx context.Context, version string) (*agentapi.HelloResponse, error) {
	return call(ctx, l, func(guest agentapi.AgentService, ctx context.Context, r *agentapi.HelloRequest) (*agentapi.HelloResponse, error) {
		return l.clock.hello(ctx, guest, r)
	}, &agentapi.HelloRequest{HostVersion: version})
}

// setClock checks the clock of a guest that was told the time a while ago, as
// it answered since, and sets it right if need be.
func (l *link) setClock(ctx context.Context, told time.Time, read int64, version string) {
	if told.Add(time.Since(told)).UnixNano()-read < int64(clockDoubt) {
		return
	}
	for range clockRounds {
		if _, err := l.hello(ctx, version); err != nil || !l.clock.wrong() {
			return // later hellos keep it
		}
	}
}
