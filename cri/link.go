package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

const (
	// attachTimeout bounds one attempt to reach the agent. A guest that is
	// slower is asked again: slow is not dead.
	attachTimeout = 30 * time.Second
	// attachFirstPause and attachPause are the shortest and the longest pause
	// between two attempts.
	attachFirstPause = 50 * time.Millisecond
	attachPause      = 2 * time.Second
	// sessionWorth is how long a session must last for the next attempt to
	// follow at once: a guest that breaks every one keeps no core busy.
	sessionWorth = 5 * time.Second
)

// A link keeps a session with the agent of one machine: it attaches, and
// attaches again when the session breaks, until it is closed.
type link struct {
	machine vmpod.Machine
	log     *slog.Logger
	clock   *clockKeeper

	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{}

	mu      sync.Mutex
	client  *agentapi.Client
	held    error         // why calls wait, nil if they do not
	heard   time.Time     // the last answer in sessions before this one
	changed chan struct{} // closed when client or held changes

	// acts counts the calls that may have changed something in the guest.
	acts atomic.Uint64
}

// newLink starts to attach; it returns at once.
func newLink(m vmpod.Machine, log *slog.Logger) *link {
	l := &link{machine: m, log: log, clock: &clockKeeper{log: log}, done: make(chan struct{}), changed: make(chan struct{})}
	l.ctx, l.cancel = context.WithCancelCause(context.Background())
	go l.run()
	return l
}

// close ends the session; the guest goes on. Who waits for the agent is told
// why.
func (l *link) close(why error) {
	l.cancel(why)
	<-l.done
}

func (l *link) run() {
	defer close(l.done)
	pause := attachFirstPause
	var wrongs wrongCount
	for l.ctx.Err() == nil {
		c, err := l.attach()
		if err != nil {
			l.blame(&wrongs, err)
			if l.ctx.Err() == nil {
				l.log.Debug("agent not reached yet", "err", err)
			}
			pause = l.rest(pause)
			continue
		}
		began := time.Now()
		l.set(c)
		select {
		case <-c.Done():
			l.log.Info("agent session ended, attaching again", "err", c.Err())
			l.blame(&wrongs, c.Err())
		case <-l.ctx.Done():
		}
		l.set(nil)
		c.Close()
		if time.Since(began) > sessionWorth {
			pause = attachFirstPause
			continue
		}
		pause = l.rest(pause)
	}
}

// rest waits before the next attempt and returns how long to wait before the
// one after.
func (l *link) rest(pause time.Duration) time.Duration {
	select {
	case <-time.After(pause):
	case <-l.ctx.Done():
	}
	return min(2*pause, attachPause)
}

func (l *link) attach() (*agentapi.Client, error) {
	ctx, cancel := context.WithTimeout(l.ctx, attachTimeout)
	defer cancel()
	conn, err := l.machine.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return agentapi.Attach(ctx, conn)
}

func (l *link) set(c *agentapi.Client) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.client != nil {
		l.heard = l.client.Answered()
	}
	l.client = c
	l.wake()
}

// wake lets all who wait look again; mu is held.
func (l *link) wake() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// hold makes new calls wait until release: a VMM that does not answer would
// let them pile up in front of the guest. Those under way stay.
func (l *link) hold(why error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = why
	l.wake()
}

func (l *link) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held != nil {
		l.held = nil
		l.wake()
	}
}

// holding returns why calls wait, nil if they do not.
func (l *link) holding() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.held
}

// answered returns when the guest has answered a call last.
func (l *link) answered() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.client == nil || l.client.Answered().IsZero() {
		return l.heard
	}
	return l.client.Answered()
}

// session returns the present session, waiting for one if need be, and while
// calls are held.
func (l *link) session(ctx context.Context) (*agentapi.Client, error) { return l.await(ctx, true) }

// current is session for who asks whether the guest lives.
func (l *link) current(ctx context.Context) (*agentapi.Client, error) { return l.await(ctx, false) }

func (l *link) await(ctx context.Context, held bool) (*agentapi.Client, error) {
	for {
		l.mu.Lock()
		c, changed, why := l.client, l.changed, l.held
		l.mu.Unlock()
		if !held {
			why = nil
		}
		if c != nil && c.Err() == nil && why == nil {
			return c, nil
		}
		select {
		case <-changed:
		case <-l.ctx.Done():
			return nil, l.gone()
		case <-ctx.Done():
			if why != nil {
				return nil, fmt.Errorf("%w: %w", why, ctx.Err())
			}
			return nil, fmt.Errorf("the guest's agent does not answer: %w", ctx.Err())
		}
	}
}

func (l *link) gone() error {
	cause := context.Cause(l.ctx)
	if errors.Is(cause, context.Canceled) {
		cause = errors.New("the pod VM was given up")
	}
	return fmt.Errorf("pod VM %s: %w: %w", l.machine.Spec().ID, cause, errdefs.ErrUnavailable)
}

// call makes one call of the agent's service, which may be repeated, and does
// so once more if the session broke under it.
func call[Req, Resp any](ctx context.Context, l *link, method func(agentapi.AgentService, context.Context, *Req) (*Resp, error), req *Req) (*Resp, error) {
	for try := 0; ; try++ {
		c, err := l.session(ctx)
		if err != nil {
			return nil, err
		}
		if _, asks := any(req).(*agentapi.StatsRequest); !asks {
			l.acts.Add(1)
		}
		sctx, ended := agentSpan(ctx, req)
		done := inGuest(sctx)
		resp, err := method(c, sctx, req)
		done()
		ended(err)
		if err == nil || try > 0 || c.Err() == nil || ctx.Err() != nil {
			return resp, err
		}
	}
}
