package cri

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/vmpod"
)

// Starts has fn called when the first container of a sandbox has started, with
// where the time went, in order, from one goroutine; not for sandboxes that an
// earlier server made. It is to be called once at most.
func (s *Server) Starts(fn func(vmpod.Start)) {
	s.background.Go(func() { s.starts.follow(s.ctx, fn) })
}

// maxSteps bounds what is kept of a start that fails again and again.
const maxSteps = 64

// A startClock notes when the steps of a pod's start ran. A nil one, of a pod
// that an earlier server started, notes nothing.
type startClock struct {
	begun time.Time

	mu    sync.Mutex
	steps []startStep
	over  bool
}

// A startStep is a part of a phase; spans have its name.
type startStep struct {
	phase, name string
	from, to    time.Time
}

func newStartClock() *startClock { return &startClock{begun: time.Now()} }

// step notes a step; it ends when the returned function is called.
func (c *startClock) step(phase, name string) (end func()) {
	from := time.Now()
	return func() { c.note(startStep{phase, name, from, time.Now()}) }
}

// note keeps the latest steps of each phase where there is no room for all.
func (c *startClock) note(st startStep) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return
	}
	if len(c.steps) >= maxSteps {
		same := func(o startStep) bool { return o.phase == st.phase }
		i := max(slices.IndexFunc(c.steps, same), 0)
		c.steps = slices.Delete(c.steps, i, i+1)
	}
	c.steps = append(c.steps, st)
}

// finish ends the start; true for the first call alone. queued is when the pod
// was given to the node, if that is known.
func (c *startClock) finish(queued, now time.Time) (vmpod.Start, bool) {
	if c == nil {
		return vmpod.Start{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return vmpod.Start{}, false
	}
	c.over = true
	s := startOf(c.begun, queued, now, c.steps)
	c.steps = nil
	return s, true
}

// startOf puts steps together. A pod cannot have been given to the node after
// work on it began: such a time is of a clock that is wrong.
func startOf(begun, queued, now time.Time, steps []startStep) vmpod.Start {
	s := vmpod.Start{Begun: begun}
	var phases []vmpod.Phase
	if !queued.IsZero() && !queued.After(begun) {
		s.Begun = queued
		phases = append(phases, vmpod.Phase{Name: vmpod.PhaseQueue, Took: begun.Sub(queued)})
	}
	for _, st := range steps {
		phases = append(phases, vmpod.Phase{Name: st.phase, From: st.from.Sub(s.Begun), Took: st.to.Sub(st.from)})
	}
	s.Took = now.Sub(s.Begun)
	s.Phases = vmpod.MergePhases(phases, s.Took)
	return s
}

// tracerName is the scope of this package's spans.
const tracerName = "github.com/openatoll/atoll/cri"

// trace makes spans of the steps so far below that of ctx, if there is one:
// what was prepared began before anybody could say whose trace it is part of.
func (c *startClock) trace(ctx context.Context) {
	parent := trace.SpanFromContext(ctx)
	if c == nil || !parent.IsRecording() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	tracer := parent.TracerProvider().Tracer(tracerName)
	for _, st := range c.steps {
		_, span := tracer.Start(ctx, st.name, trace.WithTimestamp(st.from))
		span.End(trace.WithTimestamp(st.to))
	}
}

// agentSpan begins a span for a call to the guest's agent, below that of ctx, if
// there is one. Requests are not part of it: they carry environments.
func agentSpan(ctx context.Context, req any) (_ context.Context, ended func(error)) {
	parent := trace.SpanFromContext(ctx)
	if !parent.IsRecording() {
		return ctx, func(error) {}
	}
	_, name, _ := strings.Cut(strings.TrimSuffix(fmt.Sprintf("%T", req), "Request"), ".")
	ctx, span := parent.TracerProvider().Tracer(tracerName).Start(ctx, "agent "+name, trace.WithSpanKind(trace.SpanKindClient))
	return ctx, func(err error) {
		if err != nil {
			span.SetStatus(codes.Error, status.Code(toGRPC(err)).String())
		}
		span.End()
	}
}

// started tells of the start that a container's start has ended.
func (p *pod) started() {
	sb, ok := p.s.store.sandbox(p.id)
	if !ok {
		return
	}
	var queued time.Time
	if sb.Hint != nil && p.vm.Attempt == 0 {
		queued = sb.Hint.Queued
	}
	start, first := p.clock.finish(queued, time.Now())
	if !first {
		return
	}
	m := sb.Config.GetMetadata()
	start.PodUID, start.Namespace, start.Name, start.Attempt = p.vm.PodUID, m.GetNamespace(), m.GetName(), p.vm.Attempt
	start.Prepared = p.prepared
	attrs := []any{"took", start.Took, "prepared", start.Prepared}
	for _, name := range vmpod.Phases() {
		attrs = append(attrs, name, start.Total(name))
	}
	p.log.Info("pod has started", attrs...)
	p.s.starts.tell(start)
}

// clockOf finds the clock of a sandbox that is there; nil if it is not.
func (s *Server) clockOf(vm vmpod.ID) *startClock {
	sb, ok := s.store.sandboxOfVM(vm)
	if !ok {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pods[sb.ID]; p != nil {
		return p.clock
	}
	return nil
}
