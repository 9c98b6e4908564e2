package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A pod is a sandbox whose machine this process watches: what a record cannot
// hold. It exists from RunPodSandbox (or adoption) until the machine is given
// back.
type pod struct {
	s       *Server
	id      string
	vm      vmpod.ID
	log     *slog.Logger
	machine vmpod.Machine
	link    *link
	// clock times the start, and prepared says that Prepare began it; both are
	// unset in a pod that was adopted.
	clock    *startClock
	prepared bool

	// ops serialises what changes the pod's structure; see lock.
	ops chan struct{}

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	// dead is closed once the machine has ended and its containers are
	// marked.
	dead chan struct{}

	mu      sync.Mutex
	procs   map[string]*process
	volumes map[string]*liveVolume
	illness vmpod.Fault // see watchHealth
	verdict *vmpod.Exit // why the machine was given up; nil if it was not
	closed  bool        // nothing new begins

	latest *lastReading // what stats are told from

	// letGoSince is when the guest was first asked to unmount its disks; of who
	// has the pod's lock.
	letGoSince time.Time
}

// A process is the live side of one container.
type process struct {
	// exited is closed when the store says EXITED.
	exited chan struct{}
	once   sync.Once
	// gate serialises start, stop and remove of this container.
	gate chan struct{}

	mu   sync.Mutex
	pump *logPump
}

func (s *Server) newPod(id string, vm vmpod.ID, m vmpod.Machine, l *link) *pod {
	p := &pod{
		s: s, id: id, vm: vm, machine: m, link: l,
		log:     s.log.With("pod_uid", vm.PodUID, "sandbox", id),
		ops:     make(chan struct{}, 1),
		dead:    make(chan struct{}),
		procs:   map[string]*process{},
		volumes: map[string]*liveVolume{},
		latest:  newLastReading(),
	}
	p.ctx, p.cancel = context.WithCancel(s.ctx)
	return p
}

// start begins to watch the machine and the guest's exits.
func (p *pod) start() {
	for _, watch := range []func(){p.watchMachine, p.followExits, p.watchHealth, p.watchManners} {
		p.spawn(watch)
	}
}

// spawn runs f until it returns or close has waited for it; false when the pod
// is closed already. Who is not within another such f must use it: wg's
// counter may be on its way to zero.
func (p *pod) spawn(f func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.wg.Go(f)
	return true
}

// close stops watching; the machine goes on.
func (p *pod) close(why error) {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.cancel()
	p.link.close(why)
	p.wg.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, v := range p.volumes {
		p.s.watch.drop(v)
	}
}

// lock takes the right to change the pod's structure.
func (p *pod) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case p.ops <- struct{}{}:
		return func() { <-p.ops }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another operation on sandbox %s is under way: %w", p.id, ctx.Err())
	}
}

// process returns the live side of a container, making it if need be.
func (p *pod) process(containerID string) *process {
	p.mu.Lock()
	defer p.mu.Unlock()
	x := p.procs[containerID]
	if x == nil {
		x = &process{exited: make(chan struct{}), gate: make(chan struct{}, 1)}
		p.procs[containerID] = x
	}
	return x
}

func (x *process) lock(ctx context.Context) (unlock func(), err error) {
	select {
	case x.gate <- struct{}{}:
		return func() { <-x.gate }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("another operation on the container is under way: %w", ctx.Err())
	}
}

func (x *process) markExited() { x.once.Do(func() { close(x.exited) }) }

// watchMachine marks the sandbox and its containers when the machine ends.
func (p *pod) watchMachine() {
	for {
		exit, err := p.machine.Wait(p.ctx)
		if err == nil {
			p.machineEnded(exit)
			return
		}
		if p.ctx.Err() != nil {
			return
		}
		p.log.Error("waiting for the machine failed, trying again", "err", err)
		select {
		case <-time.After(time.Second):
		case <-p.ctx.Done():
			return
		}
	}
}

// machineEnded is where a dead VM becomes a sandbox that is not ready and
// containers that have exited, never with success.
func (p *pod) machineEnded(exit vmpod.Exit) {
	defer close(p.dead)
	p.mu.Lock()
	if p.verdict != nil {
		exit = *p.verdict
	}
	p.mu.Unlock()
	p.link.cancel(fmt.Errorf("the pod VM has ended (%s): %s", exit.Reason, exit.Message))
	if exit.Reason == vmpod.ExitStopped || exit.Reason == vmpod.ExitGuestPoweroff {
		p.log.Info("pod VM has ended", "reason", exit.Reason)
	} else {
		p.log.Warn("pod VM has ended", "reason", exit.Reason, "message", exit.Message)
	}
	p.s.markDead(p.id, exit)
	p.mu.Lock()
	defer p.mu.Unlock()
	for id, x := range p.procs {
		if c, ok := p.s.store.container(id); !ok || c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			x.markExited()
		}
	}
}

// markDead records that a sandbox's machine is no more.
func (s *Server) markDead(sandboxID string, exit vmpod.Exit) {
	at := exit.At
	if at.IsZero() {
		at = time.Now()
	}
	code := int32(255)
	switch exit.Reason {
	case vmpod.ExitStopped, vmpod.ExitVMMKilled, vmpod.ExitVMMOOMKilled, vmpod.ExitAgentHung, vmpod.ExitAgentWrong:
		code = 137
	}
	for _, c := range s.store.containersOf(sandboxID) {
		err := s.store.updateContainer(c.ID, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, func(c *container) bool {
			if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
				return false
			}
			if c.StartedAt.IsZero() {
				c.StartedAt = c.CreatedAt
			}
			c.State, c.FinishedAt, c.ExitCode = runtimeapi.ContainerState_CONTAINER_EXITED, at, code
			c.Reason, c.Message = string(exit.Reason), clip("the pod's VM has ended: "+exit.Message, 4096)
			return true
		})
		if err != nil {
			s.log.Error("recording a container's end failed", "container", c.ID, "err", err)
		}
	}
	failpoint.Hit(failpoint.StopPodContainersMarked)
	fresh := false // a hung VM is dead before it has ended
	err := s.store.updateSandbox(sandboxID, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, func(sb *sandbox) {
		fresh = sb.State == runtimeapi.PodSandboxState_SANDBOX_READY
		sb.State = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
		sb.Reason, sb.Message = string(exit.Reason), clip(exit.Message, 4096)
	})
	if err != nil && !errdefs.IsNotFound(err) {
		s.log.Error("recording a sandbox's end failed", "sandbox", sandboxID, "err", err)
	}
	if fresh {
		s.ended(sandboxID, exit)
	}
}

// maxExitsAtOnce bounds what a guest can keep the host busy with.
const maxExitsAtOnce = 64

// exitDrain bounds how long an exit waits for the container's last log lines
// and its termination message before it is told.
const exitDrain = 3 * time.Second

// followExits reads the guest's journal of ended processes, session after
// session. A record is acknowledged once it, and all before it, are recorded
// here; what was not comes again, and finds the container exited already.
func (p *pod) followExits() {
	acks := &ackTracker{}
	room := make(chan struct{}, maxExitsAtOnce)
	for p.ctx.Err() == nil {
		c, err := p.link.session(p.ctx)
		if err != nil {
			return // the machine has ended or the server closes
		}
		acks.reset()
		for rec, err := range c.Exits(p.ctx, 0) {
			if err != nil {
				break
			}
			room <- struct{}{}
			acks.begin(rec.Offset)
			p.wg.Go(func() {
				defer func() { <-room }()
				if rec.ExecId == "" && p.containerEnded(rec) != nil && p.ctx.Err() != nil {
					return
				}
				if !p.s.store.awaitRecorded(p.ctx, rec.ContainerId) {
					return // let it come again
				}
				if upTo, ok := acks.end(rec.Offset); ok {
					p.acknowledge(&agentapi.AcknowledgeRequest{Exits: upTo})
					failpoint.Hit(failpoint.ExitAcknowledged)
				}
			})
		}
		select { // the session may outlive its stream when the guest errs
		case <-time.After(100 * time.Millisecond):
		case <-p.ctx.Done():
		}
	}
}

func (p *pod) acknowledge(req *agentapi.AcknowledgeRequest) {
	ctx, cancel := context.WithTimeout(p.ctx, 10*time.Second)
	defer cancel()
	if _, err := call(ctx, p.link, agentapi.AgentService.Acknowledge, req); err != nil && p.ctx.Err() == nil {
		p.log.Debug("acknowledging failed; the guest sends the records again", "err", err)
	}
}

// containerEnded records an exit, after the logs and the termination message
// that belong to it, because the kubelet reads those as soon as it hears.
func (p *pod) containerEnded(rec *agentapi.ExitRecord) error {
	c, ok := p.s.store.container(rec.ContainerId)
	if !ok || c.SandboxID != p.id || c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
		return nil
	}
	ctx, cancel := context.WithTimeout(p.ctx, exitDrain)
	defer cancel()
	failpoint.Hit(failpoint.ExitArrived)
	x := p.process(c.ID)
	if pump := x.logPump(); pump != nil {
		pump.drain(ctx)
	}
	failpoint.Hit(failpoint.ExitLogsDrained)
	if err := p.fetchTermination(ctx, c); err != nil {
		p.log.Warn("the termination message could not be fetched", "container", c.ID, "err", err)
	}
	err := p.s.store.updateContainer(c.ID, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT, func(c *container) bool {
		return exited(c, rec)
	})
	failpoint.Hit(failpoint.ExitRecorded)
	x.markExited()
	if err != nil && !errdefs.IsNotFound(err) {
		p.log.Error("recording a container's exit failed", "container", c.ID, "err", err)
		return err
	}
	return nil
}

// exited turns a running container's record into that of an ended one.
func exited(c *container, rec *agentapi.ExitRecord) bool {
	if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
		return false
	}
	c.State = runtimeapi.ContainerState_CONTAINER_EXITED
	c.ExitCode, c.Message = rec.ExitCode, clip(rec.Message, 4096)
	if guestReason.MatchString(rec.Reason) {
		c.Reason = rec.Reason
	}
	c.FinishedAt = guestClock(rec.TimeNs)
	if c.StartedAt.IsZero() {
		c.StartedAt = c.CreatedAt
	}
	if c.FinishedAt.Before(c.StartedAt) { // the guest's clock is the guest's
		c.FinishedAt = c.StartedAt
	}
	if c.Reason == "" {
		c.Reason = reasonOf(c.ExitCode)
	}
	return true
}

func reasonOf(code int32) string {
	if code == 0 {
		return "Completed"
	}
	return "Error"
}

// guestReason is what a reason that a guest gives may look like: one word, as
// the pod's status has them.
var guestReason = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]{0,63}$`)

// clip bounds a text that a guest wrote, in bytes. The result is UTF-8, also
// when the cut is within a letter: an API message with anything else in it
// cannot be sent at all.
func clip(s string, n int) string {
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "…"
	}
	return strings.ToValidUTF8(s, "\ufffd")
}

// An ackTracker finds up to where records are done without a gap.
type ackTracker struct {
	mu      sync.Mutex
	pending map[uint64]bool // offset to done
	acked   uint64
}

func (t *ackTracker) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending = map[uint64]bool{}
}

func (t *ackTracker) begin(offset uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pending[offset] = false
}

// end marks a record done; ok is true when more can be acknowledged.
func (t *ackTracker) end(offset uint64) (upTo uint64, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.pending[offset]; !known {
		return 0, false
	}
	t.pending[offset] = true
	lowest := uint64(0)
	for o, done := range t.pending {
		if !done && (lowest == 0 || o < lowest) {
			lowest = o
		}
	}
	for o, done := range t.pending {
		if done && (lowest == 0 || o < lowest) {
			t.acked, ok = max(t.acked, o), true
			delete(t.pending, o)
		}
	}
	return t.acked, ok
}

// podOf finds the live pod of a sandbox that is ready.
func (s *Server) podOf(sandboxID string) (*pod, *sandbox, error) {
	sb, ok := s.store.sandbox(sandboxID)
	if !ok {
		return nil, nil, fmt.Errorf("sandbox %s: %w", sandboxID, errdefs.ErrNotFound)
	}
	s.mu.Lock()
	p := s.pods[sandboxID]
	s.mu.Unlock()
	if p == nil || sb.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, sb, fmt.Errorf("sandbox %s is not ready (%s): %w", sandboxID, firstOf(sb.Reason, "stopped"), errdefs.ErrFailedPrecondition)
	}
	return p, sb, nil
}

// livePod finds the pod of a sandbox if it has one.
func (s *Server) livePod(sandboxID string) *pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pods[sandboxID]
}

func firstOf(words ...string) string {
	for _, w := range words {
		if w != "" {
			return w
		}
	}
	return ""
}

var errSandboxStopped = errors.New("its sandbox was stopped")
