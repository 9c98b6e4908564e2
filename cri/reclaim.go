package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

const (
	// reclaimTimeout bounds taking back what was made for one sandbox.
	reclaimTimeout = time.Minute
	// What could not be taken back is tried again, first after minOwedPause,
	// then half as often each time, at least every maxOwedPause.
	minOwedPause = 500 * time.Millisecond
	maxOwedPause = time.Minute
)

// unmake closes a kit's session and reclaims all that was made for vm. The
// caller's cancellation does not stop it. When it fails, it is tried again
// until it succeeds or somebody else has the VM.
func (s *Server) unmake(vm vmpod.ID, kit *machineKit) error {
	if kit != nil && kit.link != nil {
		kit.link.close(errors.New("its sandbox was given up"))
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), reclaimTimeout)
	defer cancel()
	err := s.reclaim(ctx, vm)
	if err != nil {
		s.owe(vm)
	}
	return err
}

// reclaim takes back everything that was ever made for vm, in the reverse
// order of its making, however far that had come, and then drops the intent.
// It may be called any number of times. While the machine cannot be removed,
// its disks and its tap stay.
func (s *Server) reclaim(ctx context.Context, vm vmpod.ID) error {
	key := vm.String()
	if err := failpoint.Err(failpoint.ReclaimBegun); err != nil {
		return err
	}
	m, err := s.config.Driver.Open(ctx, vm)
	if err == nil {
		if ids := disksOf(m); len(ids) > 0 { // of a sandbox that no record knows
			if err := m.Stop(ctx, 0); err != nil {
				return fmt.Errorf("stop pod VM %s: %w", vm, err)
			}
			if err := s.forgetDisks(ctx, vm, ids); err != nil {
				return err
			}
		}
		err = m.Remove(ctx)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove pod VM %s: %w", vm, err)
	}
	failpoint.Hit(failpoint.ReclaimMachineRemoved)
	err = errors.Join(
		step("detach the network of "+key, s.config.Network.Detach(ctx, key)),
		step("release the images of "+key, s.config.Images.Release(ctx, key)),
		step("remove the ephemeral disk of "+key, s.config.Ephemeral.Remove(ctx, key)),
	)
	if err != nil {
		return err
	}
	failpoint.Hit(failpoint.ReclaimPartsRemoved)
	if err := s.store.dropIntent(vm); err != nil {
		return err
	}
	failpoint.Hit(failpoint.ReclaimIntentDropped)
	return nil
}

// standIn puts a preparation into the table that makes nothing, so that who
// wants vm waits until it has left. It is nil when vm belongs to somebody.
func (s *Server) standIn(vm vmpod.ID) *preparation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.preps[vm] != nil || s.runs[vm] != nil || s.known(vm) {
		return nil
	}
	p := newPreparation(vmpod.Hint{}, func() {})
	p.claimed = true
	close(p.done)
	s.preps[vm] = p
	return p
}

// takeBack reclaims what was left of vm, unless it belongs to somebody, and
// says so in the log.
func (s *Server) takeBack(vm vmpod.ID) {
	if p := s.standIn(vm); p != nil {
		s.takeBackAs(vm, p)
	}
}

func (s *Server) takeBackAs(vm vmpod.ID, p *preparation) {
	defer s.leave(vm, p)
	// What no record knows gets an intent, in case this does not succeed.
	err := s.store.addIntent(vm)
	if err == nil {
		err = s.unmake(vm, nil)
	}
	if err != nil {
		s.log.Error("what was left of a pod VM could not be taken back; it is tried again", "pod_uid", vm.PodUID, "vm", vm.String(), "err", err)
		return
	}
	s.log.Info("what was left of a pod VM is taken back", "pod_uid", vm.PodUID, "vm", vm.String())
}

// owe sees to it that what could not be taken back is, some day.
func (s *Server) owe(vm vmpod.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.owed[vm] || s.ctx.Err() != nil {
		return
	}
	s.owed[vm] = true
	s.background.Go(func() {
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.owed, vm)
		}()
		for pause := minOwedPause; ; pause = min(2*pause, maxOwedPause) {
			select {
			case <-time.After(pause):
			case <-s.ctx.Done():
				return // the next start finds the intent
			}
			// Without an intent it was taken back, or a sandbox's record
			// stands for it now. One that is in use gets another look.
			if owed, err := s.store.hasIntent(vm); err == nil && !owed {
				return
			}
			s.takeBack(vm)
		}
	})
}
