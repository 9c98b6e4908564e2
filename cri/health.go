package cri

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A pace says how often a pod's VM is looked at and how long silence is borne.
// Why these, and what silence means: docs/decisions/0008-liveness.md.
type pace struct {
	// look is the time between two looks at a VM that is well, again at one
	// that is not.
	look, again time.Duration
	// answer bounds the VMM's answer to one look.
	answer time.Duration
	// quiet is how long the agent need not have answered any call before it is
	// asked, so that a guest that is used anyway is never woken for it.
	quiet time.Duration
	// clock is the longest time between two readings of a guest's clock.
	clock time.Duration
	// silent and hung are how long a guest may leave the question unanswered,
	// counting only time in which it could have worked: then the fault is
	// told, then the VM is stopped.
	silent, hung time.Duration
}

var defaultPace = pace{
	look: 4 * time.Second, again: time.Second, answer: 2 * time.Second,
	quiet: 10 * time.Second, clock: time.Minute, silent: 7 * time.Second, hung: 14 * time.Second,
}

// until is the time to the next look at a VM that is well, whose agent has
// answered last at the given time: it is asked in time, not a whole look later.
func (l pace) until(answered time.Time) time.Duration {
	if left := l.quiet - time.Since(answered); left > 0 {
		return min(l.look, left)
	}
	return l.look
}

// A glance is what one look at a VM has shown.
type glance struct {
	status vmpod.Status
	// answered says that the agent owes no answer now.
	answered bool
	// could is how long the guest could have worked since the last look.
	could time.Duration
}

// A pulse judges a VM by one glance after the other. It knows no clock, so
// that what the host's load does to a guest is no evidence against it.
type pulse struct {
	silence time.Duration
	mute    bool // the VMM has not answered the last look
}

// take returns what is wrong with the VM, an empty reason if nothing is.
// vmpod.ExitAgentHung is final.
func (p *pulse) take(g glance, limits pace) (reason, message string) {
	mute := p.mute
	p.mute = g.status.State == vmpod.StateUnknown
	switch {
	case p.mute && !mute && g.status.Reason == vmpod.ReasonVMMNotResponding:
		return "", "" // it may be on its way out: the next look tells
	case p.mute:
		return g.status.Reason, g.status.Message // no word about the guest
	case g.answered:
		p.silence = 0
	default:
		p.silence += g.could
	}
	told := p.silence.Round(time.Second)
	switch {
	case p.silence >= limits.hung:
		return string(vmpod.ExitAgentHung), fmt.Sprintf("the guest's agent did not answer for %s in which the host let the guest work: the guest is hung", told)
	case p.silence >= limits.silent:
		return vmpod.ReasonAgentSilent, fmt.Sprintf("the guest's agent has not answered for %s in which the host let the guest work: at %s the VM is given up", told, limits.hung)
	case g.status.State == vmpod.StateRunning:
		return g.status.Reason, g.status.Message // disk errors
	}
	return "", ""
}

// watchHealth looks at the pod's VM until it has ended. The guest has no timer
// for this: the host asks, and only a guest that has answered nothing lately.
func (p *pod) watchHealth() {
	limits := p.s.config.pace
	var (
		beat     pulse
		fault    vmpod.Fault
		asked    chan struct{} // closed by the answer; nil: nothing is asked
		ran      vmpod.Progress
		last     = time.Now()
		interval = rand.N(limits.look) // not all pods at once
	)
	for {
		select {
		case <-time.After(interval):
		case <-asked:
			if asked = nil; fault.Reason == "" { // well: no look for that alone
				interval = limits.until(p.link.answered())
				continue
			}
		case <-p.dead:
			return
		case <-p.ctx.Done():
			return
		}
		g, took := p.lookAtVMM(limits)
		if g.status.State == vmpod.StateStopped || p.ctx.Err() != nil {
			return // watchMachine tells
		}
		if asked != nil && isClosed(asked) {
			asked = nil
		}
		now := time.Now()
		if g.answered = asked == nil; !g.answered {
			// A look that comes late proves that this process had no CPU either.
			g.could = min(now.Sub(last), 2*limits.look) - took
			if progress, ok := p.progress(); ok {
				if g.could -= progress.Since(ran); progress.Stuck {
					g.could = 0
				}
				ran = progress
			}
			g.could = max(g.could, 0)
		}
		last = now
		fault = p.judge(&beat, g, fault, limits)
		if fault.Reason == string(vmpod.ExitAgentHung) {
			p.giveUp(vmpod.ExitAgentHung, fault.Message)
			return
		}
		if asked == nil && (now.Sub(p.link.answered()) >= limits.quiet || p.link.clock.due(limits.clock)) {
			asked = make(chan struct{})
			ran, _ = p.progress()
			p.wg.Go(func() { p.askAgent(asked) })
		}
		interval = limits.until(p.link.answered())
		if asked != nil || g.status.State == vmpod.StateUnknown {
			interval = limits.again
		}
	}
}

func (p *pod) lookAtVMM(limits pace) (g glance, took time.Duration) {
	ctx, cancel := context.WithTimeout(p.ctx, limits.answer)
	defer cancel()
	began := time.Now()
	status, err := p.machine.Status(ctx)
	if err != nil {
		status = vmpod.Status{State: vmpod.StateUnknown, Reason: vmpod.ReasonVMMNotResponding, Message: err.Error()}
	}
	return glance{status: status}, time.Since(began)
}

func (p *pod) progress() (vmpod.Progress, bool) {
	m, ok := p.machine.(vmpod.Pacer)
	if !ok {
		return vmpod.Progress{}, false
	}
	progress, err := m.Progress(p.ctx)
	return progress, err == nil
}

// askAgent has the guest answer, whatever it says, in this session or a later
// one. Should its clock be wrong, it is told, and that is looked at again.
func (p *pod) askAgent(answered chan<- struct{}) {
	for round := 1; ; round++ {
		c, err := p.link.current(p.ctx)
		if err != nil {
			return
		}
		_, err = p.link.clock.hello(p.ctx, c, &agentapi.HelloRequest{HostVersion: p.s.config.Version})
		if err == nil && p.link.clock.wrong() && round < clockRounds {
			continue
		}
		if err == nil || c.Err() == nil && p.ctx.Err() == nil {
			close(answered)
			return
		}
		select { // the session is broken: the link makes another
		case <-c.Done():
		case <-p.ctx.Done():
			return
		}
	}
}

// judge tells what has changed: in the log, to calls that would wait for the
// VMM in vain, and to whoever has asked for faults.
func (p *pod) judge(beat *pulse, g glance, old vmpod.Fault, limits pace) vmpod.Fault {
	reason, message := beat.take(g, limits)
	if g.status.State == vmpod.StateUnknown && reason != "" {
		p.link.hold(fmt.Errorf("the pod's VM does not answer (%s): %s", reason, message))
	} else {
		p.link.release()
	}
	now := p.fault(reason, message)
	p.mu.Lock()
	p.illness = now
	p.mu.Unlock()
	if reason == old.Reason || reason == string(vmpod.ExitAgentHung) { // giveUp tells that
		return now
	}
	// Of a VM that falls silent nobody knows whether its disks are well again.
	if old.Reason != "" && g.status.State == vmpod.StateRunning && reason != vmpod.ReasonAgentSilent {
		p.log.Info("pod VM has recovered", "reason", old.Reason)
		old.Cleared, old.At = true, now.At
		p.s.faults.tell(old)
	}
	if reason != "" {
		p.log.Warn("pod VM has a fault", "reason", reason, "message", message)
		p.s.faults.tell(now)
	}
	if reason == vmpod.ReasonHostDiskError {
		p.recheckImages()
	}
	return now
}

// giveUp ends a VM whose guest is hung, or worse. The record comes first: should this
// process die in between, the next one stops the VM of a sandbox that is not
// ready, for the same reason.
func (p *pod) giveUp(reason vmpod.ExitReason, message string) {
	exit := vmpod.Exit{Reason: reason, Message: message, At: time.Now()}
	p.mu.Lock()
	p.verdict = &exit
	p.mu.Unlock()
	p.log.Error("pod VM is given up", "reason", exit.Reason, "message", message)
	p.s.markDead(p.id, exit)
	for p.ctx.Err() == nil {
		err := p.machine.Stop(p.ctx, 0)
		if err == nil {
			return
		}
		p.log.Error("a pod VM that is given up cannot be stopped, trying again", "err", err)
		select {
		case <-time.After(time.Second):
		case <-p.ctx.Done():
		}
	}
}

// unwell returns the fault that the pod's VM has now; its reason is empty if
// it has none.
func (p *pod) unwell() vmpod.Fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.illness
}

func (p *pod) fault(reason, message string) vmpod.Fault {
	f := vmpod.Fault{PodUID: p.vm.PodUID, Reason: reason, Message: message, At: time.Now()}
	if sb, ok := p.s.store.sandbox(p.id); ok {
		f.Namespace, f.Name = sb.Config.GetMetadata().GetNamespace(), sb.Config.GetMetadata().GetName()
	}
	return f
}

// ended tells of a VM that nobody wanted to end.
func (s *Server) ended(sandboxID string, exit vmpod.Exit) {
	sb, ok := s.store.sandbox(sandboxID)
	if !ok || exit.Reason == vmpod.ExitStopped || exit.Reason == vmpod.ExitGuestPoweroff {
		return
	}
	m := sb.Config.GetMetadata()
	s.faults.tell(vmpod.Fault{PodUID: sb.VM.PodUID, Namespace: m.GetNamespace(), Name: m.GetName(), Reason: string(exit.Reason), Message: exit.Message, Ended: true, At: exit.At})
}

// Conditions of Status beside CRI's own two. The kubelet does not act on them.
const (
	conditionVMs   = "PodVMsResponding"
	conditionDisks = "HostDisksUsable"
)

// healthConditions say what is wrong with pods' VMs and the disks under them.
func (s *Server) healthConditions() []*runtimeapi.RuntimeCondition {
	vms := &runtimeapi.RuntimeCondition{Type: conditionVMs, Status: true}
	disks := &runtimeapi.RuntimeCondition{Type: conditionDisks, Status: true}
	if reason, message := s.diskFault(); reason != "" {
		disks.Status, disks.Reason, disks.Message = false, reason, message
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	silent := 0
	for _, p := range s.pods {
		f := p.unwell()
		said := fmt.Sprintf("pod %s/%s: %s", f.Namespace, f.Name, f.Message)
		switch f.Reason {
		case "":
		case vmpod.ReasonVMMStopped, vmpod.ReasonVMMNotResponding, vmpod.ReasonVMPaused, vmpod.ReasonAgentSilent:
			silent++
			vms.Status, vms.Reason, vms.Message = false, f.Reason, said
		default:
			if disks.Status {
				disks.Status, disks.Reason, disks.Message = false, f.Reason, said
			}
		}
	}
	if silent > 1 {
		vms.Message += fmt.Sprintf(" (and %d more)", silent-1)
	}
	return []*runtimeapi.RuntimeCondition{vms, disks}
}
