package cri

import (
	"context"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// ephemeralDiskID is the serial under which the guest finds its writable disk.
const ephemeralDiskID = "ephemeral"

// A machineKit is a machine that runs, with all that was made for it.
type machineKit struct {
	vm         vmpod.ID
	machine    vmpod.Machine
	link       *link
	attachment netplugin.Attachment
	size       size
	clock      *startClock
}

// A preparation makes a machineKit before its sandbox is asked for.
type preparation struct {
	hint   vmpod.Hint
	cancel context.CancelFunc
	done   chan struct{} // closed when kit and err are set
	gone   chan struct{} // closed when it has left the table for good
	kit    *machineKit
	err    error
	// claimed is set, under Server.mu, by who takes the result over.
	claimed bool
	expire  *time.Timer
}

// newPreparation has a timer that is far away: Prepare sets its own.
func newPreparation(hint vmpod.Hint, cancel context.CancelFunc) *preparation {
	return &preparation{hint: hint, cancel: cancel, done: make(chan struct{}), gone: make(chan struct{}), expire: time.NewTimer(math.MaxInt64)}
}

// leave ends a preparation's time in the table.
func (s *Server) leave(vm vmpod.ID, p *preparation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p.expire.Stop()
	if s.preps[vm] == p {
		delete(s.preps, vm)
	}
	close(p.gone)
}

// Prepare implements vmpod.Preparer.
func (s *Server) Prepare(_ context.Context, hint vmpod.Hint) error {
	vm := vmpod.ID{PodUID: hint.Owner.PodUID}
	if err := checkPodUID(vm.PodUID); err != nil {
		return err
	}
	if hint.CPUs < 0 || hint.Memory < 0 || hint.EphemeralBytes < 0 {
		return fmt.Errorf("prepare pod %s: negative size: %w", vm.PodUID, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	if s.ctx.Err() != nil {
		s.mu.Unlock()
		return fmt.Errorf("prepare pod %s: %w: %w", vm.PodUID, errServerClosed, errdefs.ErrUnavailable)
	}
	s.hints[vm.PodUID] = &hint
	old := s.preps[vm]
	if old != nil && !old.claimed && reflect.DeepEqual(old.hint, hint) || s.runs[vm] != nil {
		s.mu.Unlock()
		return nil // it is there, or being used
	}
	if old == nil && len(s.store.sandboxesOfPod(vm.PodUID)) > 0 {
		s.mu.Unlock() // adopted: only the size was of interest
		return nil
	}
	replace := old != nil && !old.claimed
	if replace {
		old.claimed = true
		old.expire.Stop()
		old.cancel()
	}
	ctx, cancel := context.WithCancel(s.ctx)
	p := newPreparation(hint, cancel)
	p.expire = time.AfterFunc(s.config.PrepareTTL, func() { s.discard(vm, p, "no sandbox used it in time") })
	s.preps[vm] = p
	clock := newStartClock()
	s.background.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.background.Done()
		defer close(p.done)
		if replace {
			<-old.done
			p.err = s.unmake(vm, old.kit)
			s.leave(vm, old)
		} else if old != nil {
			<-old.gone // it is being taken back
		}
		if p.err = errors.Join(p.err, ctx.Err()); p.err != nil {
			return
		}
		z := s.sizeOf(&hint, nil)
		p.kit, p.err = s.bringUp(ctx, clock, vm, hint.Owner, z, nil)
		if p.err != nil && ctx.Err() == nil {
			s.log.Warn("preparing a pod VM failed; its sandbox will try again", "pod_uid", vm.PodUID, "err", p.err)
		}
	}()
	return nil
}

// Forget implements vmpod.Preparer.
func (s *Server) Forget(_ context.Context, podUID string) error {
	vm := vmpod.ID{PodUID: podUID}
	s.mu.Lock()
	p := s.preps[vm]
	delete(s.hints, podUID)
	s.mu.Unlock()
	if p != nil {
		s.discard(vm, p, "the pod was forgotten")
	}
	return nil
}

// discard gives an unclaimed preparation up, behind the caller's back.
func (s *Server) discard(vm vmpod.ID, p *preparation, why string) {
	s.mu.Lock()
	if p.claimed || s.ctx.Err() != nil {
		s.mu.Unlock()
		return
	}
	p.claimed = true
	p.expire.Stop()
	s.background.Add(1)
	s.mu.Unlock()
	go func() {
		defer s.background.Done()
		p.cancel()
		<-p.done
		if err := s.unmake(vm, p.kit); err != nil {
			s.log.Error("an unused pod VM could not be taken back; it is tried again", "pod_uid", vm.PodUID, "err", err)
		} else if p.kit != nil {
			s.log.Info("unused pod VM taken back", "pod_uid", vm.PodUID, "why", why)
		}
		s.leave(vm, p)
	}()
}

// claim takes over what was prepared for vm, waiting for it; nil when nothing
// usable was. The preparation stays in the table until it is over, so that a
// discard under way is waited for.
func (s *Server) claim(ctx context.Context, vm vmpod.ID) (*machineKit, error) {
	for {
		s.mu.Lock()
		p := s.preps[vm]
		if p == nil {
			s.mu.Unlock()
			return nil, nil
		}
		mine := !p.claimed
		p.claimed = true
		p.expire.Stop()
		s.mu.Unlock()
		if !mine { // it is being taken back
			select {
			case <-p.gone:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		select {
		case <-p.done:
			return p.kit, s.finishClaim(vm, p, false)
		case <-ctx.Done():
			p.cancel()
			<-p.done
			return nil, errors.Join(context.Cause(ctx), s.finishClaim(vm, p, true))
		}
	}
}

func (s *Server) finishClaim(vm vmpod.ID, p *preparation, undo bool) error {
	var err error
	if undo {
		err = s.unmake(vm, p.kit)
	}
	p.cancel()
	s.leave(vm, p)
	return err
}

// bringUp makes everything that a sandbox's machine needs, launches it and
// waits for its agent. Steps that do not depend on each other run side by
// side. When it fails or ctx ends, all is taken back.
func (s *Server) bringUp(ctx context.Context, clock *startClock, vm vmpod.ID, owner vmpod.Owner, z size, ports []netplugin.HostPort) (_ *machineKit, err error) {
	start := time.Now()
	left, err := s.store.hasIntent(vm) // what could not be taken back yet
	if err != nil {
		return nil, err
	}
	if !left { // no record knows it: of a process whose notes are lost
		_, err := s.config.Driver.Open(ctx, vm)
		left = err == nil
	}
	if left { // a disk that was in use, above all, must not get a second VM
		if err := s.unmake(vm, nil); err != nil {
			return nil, err
		}
	}
	if err := s.store.addIntent(vm); err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.RunIntentRecorded)
	kit := &machineKit{vm: vm, size: z, clock: clock}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.unmake(vm, kit))
		}
	}()
	var disk string
	var imageDisks []vmpod.Disk
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		defer clock.step(vmpod.PhaseNetwork, "network")()
		kit.attachment, err = s.config.Network.Attach(gctx, netplugin.Request{Key: vm.String(), Namespace: owner.Namespace, Name: owner.Name, HostPorts: ports})
		failpoint.Hit(failpoint.RunNetworkAttached)
		return step("attach the network", err)
	})
	g.Go(func() (err error) {
		defer clock.step(vmpod.PhaseVM, "disk")()
		disk, err = s.config.Ephemeral.Create(gctx, vm.String(), z.ephemeral)
		failpoint.Hit(failpoint.RunDiskMade)
		return step("make the ephemeral disk", err)
	})
	g.Go(func() (err error) {
		defer clock.step(vmpod.PhaseImage, "image disks")()
		imageDisks, err = s.presentImages(gctx, vm, z.images)
		return step("open the image disks", err)
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	spec := vmpod.Spec{
		ID: vm, Owner: owner, CPUs: z.cpus, Memory: z.memory, Pool: z.pool,
		Disks: append([]vmpod.Disk{{ID: ephemeralDiskID, Path: disk}}, imageDisks...),
		NICs:  []vmpod.NIC{{ID: "net0", MAC: kit.attachment.MAC, Tap: kit.attachment.Tap, MTU: kit.attachment.MTU}},
	}
	done, err := s.turns.take(ctx, clock, false)
	if err != nil {
		return nil, step("wait for a turn", err)
	}
	defer done()
	ended := clock.step(vmpod.PhaseVM, "launch")
	kit.machine, err = s.config.Driver.Launch(ctx, spec)
	ended()
	if err != nil {
		return nil, step("launch the machine", err)
	}
	launched := time.Now()
	failpoint.Hit(failpoint.RunLaunched)
	kit.link = newLink(kit.machine, s.log.With("pod_uid", vm.PodUID))
	ended = clock.step(vmpod.PhaseAgent, "agent")
	err = s.awaitAgent(ctx, kit)
	ended()
	if err != nil {
		return nil, step("reach the agent", err)
	}
	failpoint.Hit(failpoint.RunAgentAnswered)
	s.log.Info("pod VM is up", "pod_uid", vm.PodUID, "vm", vm.String(), "launch", launched.Sub(start), "agent", time.Since(launched))
	return kit, nil
}

// awaitAgent returns when the agent answers, the machine has ended, or the
// time for booting is over.
func (s *Server) awaitAgent(ctx context.Context, kit *machineKit) error {
	ctx, cancel := context.WithTimeoutCause(ctx, s.config.BootTimeout,
		fmt.Errorf("the guest did not answer within %s of its launch: %w", s.config.BootTimeout, errdefs.ErrUnavailable))
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		exit, err := kit.machine.Wait(ctx)
		if err == nil {
			ended <- fmt.Errorf("the machine ended while it booted (%s): %s: %w", exit.Reason, exit.Message, errdefs.ErrUnavailable)
		}
	}()
	up := make(chan error, 1)
	go func() {
		_, err := kit.link.session(ctx)
		up <- err
	}()
	select {
	case err := <-ended:
		return err
	case err := <-up:
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
}

// presentImages holds and returns the disks of those images that are on the
// host; the others come when their container does.
func (s *Server) presentImages(ctx context.Context, vm vmpod.ID, refs []string) ([]vmpod.Disk, error) {
	var disks []vmpod.Disk
	for _, ref := range refs {
		img, err := s.config.Images.Get(ctx, ref)
		// A bad name is its container's mistake, which the kubelet names; the
		// other containers of the pod can run.
		if errdefs.IsNotFound(err) || errdefs.IsInvalidArgument(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		d, err := s.config.Images.Disk(ctx, img.ID, vm.String())
		if errdefs.IsDataLoss(err) { // it will be pulled before its container is made
			s.log.Warn("the disk of an image is damaged", "pod_uid", vm.PodUID, "image", ref, "err", err)
			continue
		}
		if err != nil {
			return nil, err
		}
		if v := imageDisk(d); !slices.Contains(disks, v) {
			disks = append(disks, v)
		}
	}
	return disks, nil
}

// imageDisk shows an image to a machine; it is read-only at the device.
func imageDisk(d storage.ImageDisk) vmpod.Disk {
	return vmpod.Disk{ID: d.ID, Path: d.Path, Format: d.Format, ReadOnly: true}
}

// step names what failed.
func step(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
