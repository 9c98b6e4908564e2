package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

const (
	// orphanGrace is how long things that no record knows are left alone: they
	// may be the work of a process that is still on its way out.
	orphanGrace = time.Minute
	// adoptTimeout bounds the wait for one adopted guest at the start, and
	// adoptPatience that for a guest whose records tell all that a client asks
	// for at once: no slow guest may keep the others from being served. Links
	// go on trying behind it.
	adoptTimeout  = 5 * time.Second
	adoptPatience = time.Second
)

// adopt puts the records and the hypervisor's list together, at the start:
// machines of known sandboxes are watched again, sandboxes whose machine has
// gone are marked, what was half made is taken back. fresh says that the state
// file is new: then nothing is known, and nothing is removed at once.
func (s *Server) adopt(ctx context.Context, fresh bool) error {
	machines, err := s.config.Driver.List(ctx)
	if err != nil {
		return fmt.Errorf("list the host's machines: %w", err)
	}
	intents, err := s.store.intents()
	if err != nil {
		return fmt.Errorf("read the intents: %w", err)
	}
	byID := map[vmpod.ID]vmpod.Machine{}
	for _, m := range machines {
		byID[m.Spec().ID] = m
	}
	var g errgroup.Group
	g.SetLimit(statsParallel)
	for _, sb := range s.store.allSandboxes() {
		m := byID[sb.VM]
		if sb.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			if m != nil && !sb.Released { // given up, or ended, just before the last process did
				s.background.Go(func() { s.stopRest(sb, m) })
			}
			continue
		}
		if m == nil {
			s.log.Warn("a sandbox's machine is gone", "pod_uid", sb.VM.PodUID, "sandbox", sb.ID)
			s.markDead(sb.ID, vmpod.Exit{Reason: vmpod.ExitUnknown, Message: "the hypervisor does not know it any more", At: time.Now()})
			continue
		}
		g.Go(func() error {
			s.adoptPod(ctx, sb, m)
			return nil
		})
	}
	_ = g.Wait()
	half := map[vmpod.ID]bool{}
	for _, i := range intents {
		half[i.VM] = true
		// In the table before anybody can ask for the same pod.
		if p := s.standIn(i.VM); p != nil {
			s.background.Go(func() { s.takeBackAs(i.VM, p) })
		}
	}
	s.background.Go(func() { s.sweep(half, fresh) })
	return nil
}

// stopRest stops what may still run of a sandbox that is recorded as dead.
func (s *Server) stopRest(sb *sandbox, m vmpod.Machine) {
	if err := m.Stop(s.ctx, 0); err != nil && s.ctx.Err() == nil {
		s.log.Error("the machine of a dead sandbox cannot be stopped; removing the sandbox tries again", "pod_uid", sb.VM.PodUID, "sandbox", sb.ID, "err", err)
	}
}

// adoptPod watches a running machine again and reconciles its containers with
// what the guest says.
func (s *Server) adoptPod(ctx context.Context, sb *sandbox, m vmpod.Machine) {
	p := s.newPod(sb.ID, sb.VM, m, newLink(m, s.log.With("pod_uid", sb.VM.PodUID)))
	s.mu.Lock()
	s.pods[sb.ID] = p
	s.mu.Unlock()
	p.wg.Go(p.watchMachine)
	p.wg.Go(p.watchHealth)
	p.wg.Go(p.watchManners)
	ready := make(chan struct{})
	p.wg.Go(func() {
		p.settle(func() {
			p.wg.Go(p.followExits)
			p.resumeGrowth(sb)
			close(ready)
		})
	})
	select {
	case <-ready:
		p.log.Info("sandbox is adopted")
	case <-time.After(s.patience(sb)):
		p.log.Warn("an adopted guest does not answer yet")
	case <-p.dead:
	case <-ctx.Done():
	}
}

// patience is how long the start waits for a sandbox's guest. Only the guest
// knows whether a container that was being started runs: a client that heard
// of it as created would make another.
func (s *Server) patience(sb *sandbox) time.Duration {
	for _, c := range s.store.containersOf(sb.ID) {
		if c.State == runtimeapi.ContainerState_CONTAINER_CREATED {
			return adoptTimeout
		}
	}
	return adoptPatience
}

const (
	// reconcileTimeout bounds the guest's answer, as others wait meanwhile.
	reconcileTimeout = 10 * time.Second
	// A pod that could not be reconciled is tried again, at first and at last
	// after so long.
	minReconcilePause = 200 * time.Millisecond
	maxReconcilePause = 10 * time.Second
)

// settle reconciles until all of it has succeeded: a full disk may keep a log
// from being opened for a while. It calls answered once the guest has.
func (p *pod) settle(answered func()) {
	told := false
	for pause := minReconcilePause; p.ctx.Err() == nil && !isClosed(p.dead); pause = min(2*pause, maxReconcilePause) {
		said, err := p.reconcile()
		if said && !told {
			told = true
			answered()
		}
		if err == nil || p.ctx.Err() != nil || isClosed(p.dead) {
			return
		}
		p.log.Error("an adopted guest could not be reconciled, trying again", "err", err)
		select {
		case <-time.After(pause):
		case <-p.dead:
		case <-p.ctx.Done():
		}
	}
}

// reconcile compares the containers with the guest's: a start that was not
// recorded is recorded, logs are resumed, what only the guest knows is
// removed, what the guest does not know has ended. Volumes are followed again
// and brought up to date. It has the pod's lock while it compares: a container
// that is just being made is neither half made nor gone. said is whether the
// guest has answered.
func (p *pod) reconcile() (said bool, err error) {
	if _, err := p.link.session(p.ctx); err != nil { // without the lock: it may take long
		return false, err
	}
	unlock, err := p.lock(p.ctx)
	if err != nil {
		return false, err
	}
	defer unlock()
	sb, ok := p.s.store.sandbox(p.id)
	if !ok {
		return false, nil
	}
	ctx, cancel := context.WithTimeout(p.ctx, reconcileTimeout)
	defer cancel()
	hello, err := p.link.hello(ctx, p.s.config.Version)
	if err != nil {
		return false, err
	}
	if err := p.s.boots.claim(hello.GetBootId(), p.vm); err != nil {
		p.log.Warn("a pod VM that runs since before is not known by its boot id", "err", err)
	}
	guest := map[string]*agentapi.ContainerState{}
	for _, c := range hello.GetContainers() {
		guest[c.Id] = c
	}
	var errs []error
	for _, c := range p.s.store.containersOf(p.id) {
		g := guest[c.ID]
		delete(guest, c.ID)
		errs = append(errs, p.reconcileContainer(c, g))
	}
	for id := range guest {
		p.log.Info("removing a container that was half made", "container", id)
		p.forgetGuestContainer(id)
	}
	for _, v := range sb.Volumes {
		if v.Disk != nil && !v.Disk.Made {
			continue // the next container that wants it goes on
		}
		p.mu.Lock()
		live := p.volumes[v.ID]
		had := live != nil
		if !had {
			live = &liveVolume{pod: p, volume: v}
			p.volumes[v.ID] = live
		}
		p.mu.Unlock()
		if had {
			continue
		}
		if v.Follow {
			if err := p.s.watch.add(live); err != nil {
				p.log.Warn("a volume cannot be followed any more", "volume", v.ID, "err", err)
				continue
			}
			p.wg.Go(live.refresh)
		}
	}
	return true, errors.Join(errs...)
}

func (p *pod) reconcileContainer(c *container, g *agentapi.ContainerState) error {
	if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
		p.process(c.ID).markExited()
		return nil
	}
	if g == nil {
		return p.containerEnded(&agentapi.ExitRecord{ContainerId: c.ID, ExitCode: 255, Reason: "Unknown", Message: "the guest does not know the container any more", TimeNs: time.Now().UnixNano()})
	}
	if g.Phase == agentapi.ContainerState_CREATED {
		p.process(c.ID)
		return nil
	}
	if c.State == runtimeapi.ContainerState_CONTAINER_CREATED {
		err := p.s.store.updateContainer(c.ID, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT, func(c *container) bool { return running(c, g.StartedNs) })
		if err != nil {
			return err
		}
	}
	if err := p.startLog(c); err != nil {
		return fmt.Errorf("log of container %s: %w", c.ID, err)
	}
	// An exit comes by the journal; one that was acknowledged just before the
	// crash is told by Hello alone.
	if e := g.GetExit(); g.Phase == agentapi.ContainerState_EXITED && e != nil {
		p.wg.Go(func() { _ = p.containerEnded(e) })
	}
	return nil
}

// sweep removes, after a while, machines, attachments and disks that neither
// a record nor an intent knows. The lists are taken first and checked again
// against the records then; a list that cannot be had removes nothing.
func (s *Server) sweep(half map[vmpod.ID]bool, fresh bool) {
	ctx := s.ctx
	unknown := map[vmpod.ID]bool{}
	note := func(key string) {
		if id, err := vmpod.ParseID(key); err == nil && !half[id] && !s.known(id) {
			unknown[id] = true
		}
	}
	machines, err := s.config.Driver.List(ctx)
	if err != nil {
		return
	}
	for _, m := range machines {
		note(m.Spec().ID.String())
	}
	if as, err := s.config.Network.List(ctx); err == nil {
		for _, a := range as {
			note(a.Key)
		}
	}
	if keys, err := s.config.Ephemeral.List(ctx); err == nil {
		for _, k := range keys {
			note(k)
		}
	}
	if len(unknown) == 0 {
		return
	}
	if fresh {
		s.log.Warn("the state file is new, but the host has pod VMs or their parts: they are removed after a while unless a sandbox claims them", "count", len(unknown))
	}
	select {
	case <-time.After(orphanGrace):
	case <-ctx.Done():
		return
	}
	for id := range unknown {
		s.takeBack(id)
	}
}

// known says whether a record stands for vm.
func (s *Server) known(vm vmpod.ID) bool {
	_, ok := s.store.sandboxOfVM(vm)
	return ok
}
