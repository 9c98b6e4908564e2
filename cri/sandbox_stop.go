package cri

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// killTimeout bounds how long a sandbox's end waits for the guest to tell how
// its containers ended; after that the machine is stopped anyway.
const killTimeout = 5 * time.Second

// StopPodSandbox kills what runs, stops the machine and gives network and
// images back. It is idempotent, and what it began goes on when its caller
// leaves.
func (r *runtimeService) StopPodSandbox(ctx context.Context, req *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	sb, err := r.findSandbox(req.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.stopSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("stop sandbox %s: %w", sb.ID, err)
	}
	return &runtimeapi.StopPodSandboxResponse{}, nil
}

func (s *Server) stopSandbox(ctx context.Context, sb *sandbox) error {
	if sb.Released {
		return nil
	}
	p := s.livePod(sb.ID)
	if p != nil {
		unlock, err := p.lock(ctx)
		if err != nil {
			return err
		}
		defer unlock()
		now, ok := s.store.sandbox(sb.ID)
		if !ok || now.Released {
			return nil
		}
		sb = now // with all volumes
		p.killContainers(ctx)
		failpoint.Hit(failpoint.StopPodKilled)
		if err := p.letGoOfDisks(ctx, sb); err != nil {
			return err
		}
		if err := p.machine.Stop(ctx, 0); err != nil && !errdefs.IsNotFound(err) {
			return step("stop the machine", err)
		}
		select {
		case <-p.dead:
		case <-ctx.Done():
			return ctx.Err()
		}
		failpoint.Hit(failpoint.StopPodMachineStopped)
		p.close(errSandboxStopped)
	} else if err := s.stopUnwatched(ctx, sb); err != nil {
		return err
	}
	if err := s.forgetDisks(ctx, sb.VM, sb.diskIDs()); err != nil {
		return err
	}
	key := sb.VM.String()
	err := errors.Join(
		step("detach the network", s.config.Network.Detach(ctx, key)),
		step("release the images", s.config.Images.Release(ctx, key)),
	)
	if err != nil {
		return err
	}
	failpoint.Hit(failpoint.StopPodReleased)
	err = s.store.updateSandbox(sb.ID, noEvent, func(sb *sandbox) { sb.Released = true })
	failpoint.Hit(failpoint.StopPodRecorded)
	s.mu.Lock()
	delete(s.pods, sb.ID)
	s.mu.Unlock()
	s.samples.forget(sb.ID)
	if err == nil {
		s.log.Info("sandbox is stopped", "pod_uid", sb.VM.PodUID, "sandbox", sb.ID)
	}
	return err
}

// stopUnwatched stops a machine that nobody watches: its end was recorded by
// an earlier process, which may not have brought it about. The reason that is
// recorded stays. A machine whose files are damaged is left to
// RemovePodSandbox, which says so.
func (s *Server) stopUnwatched(ctx context.Context, sb *sandbox) error {
	sandboxID, vm := sb.ID, sb.VM
	m, err := s.config.Driver.Open(ctx, vm)
	if err == nil {
		err = step("stop the machine", m.Stop(ctx, 0))
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	} else if !errdefs.IsNotFound(err) {
		if len(sb.diskIDs()) > 0 {
			return step("open the machine, without which its volumes cannot be given to others", err)
		}
		s.log.Error("the machine of a sandbox cannot be opened", "pod_uid", vm.PodUID, "sandbox", sandboxID, "err", err)
	}
	if sb, ok := s.store.sandbox(sandboxID); ok && sb.State == runtimeapi.PodSandboxState_SANDBOX_READY {
		s.markDead(sandboxID, vmpod.Exit{Reason: vmpod.ExitStopped, Message: "the sandbox was stopped", At: time.Now()})
	}
	return nil
}

// killContainers ends all containers and lets the guest tell how, as long as
// it answers in time.
func (p *pod) killContainers(ctx context.Context) {
	if p.link.holding() != nil {
		return // who does not answer tells no ends either
	}
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for _, c := range p.s.store.containersOf(p.id) {
		if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
			continue
		}
		wg.Go(func() {
			_, err := call(ctx, p.link, agentapi.AgentService.SignalProcess, &agentapi.SignalProcessRequest{ContainerId: c.ID, Signal: uint32(syscall.SIGKILL), All: true})
			if err != nil && !errdefs.IsNotFound(err) {
				p.log.Debug("a container could not be killed; its machine goes anyway", "container", c.ID, "err", err)
				return
			}
			select {
			case <-p.process(c.ID).exited:
			case <-p.dead:
			case <-ctx.Done():
			}
		})
	}
	wg.Wait()
}

// RemovePodSandbox stops the sandbox if need be and erases every trace of it.
func (r *runtimeService) RemovePodSandbox(ctx context.Context, req *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	sb, err := r.findSandbox(req.GetPodSandboxId())
	if errdefs.IsNotFound(err) {
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := r.stopSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("remove sandbox %s: %w", sb.ID, err)
	}
	if err := r.reclaim(ctx, sb.VM); err != nil {
		return nil, fmt.Errorf("remove sandbox %s: %w", sb.ID, err)
	}
	for _, c := range r.store.containersOf(sb.ID) {
		if err := r.store.removeContainer(c.ID); err != nil {
			return nil, err
		}
	}
	failpoint.Hit(failpoint.RemovePodContainers)
	if err := r.store.removeSandbox(sb.ID); err != nil {
		return nil, err
	}
	failpoint.Hit(failpoint.RemovePodErased)
	r.forgetHint(sb.VM.PodUID)
	r.log.Info("sandbox is removed", "pod_uid", sb.VM.PodUID, "sandbox", sb.ID)
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

// forgetHint drops a pod's hint with its last sandbox, unless a preparation
// still stands on it.
func (s *Server) forgetHint(uid string) {
	if len(s.store.sandboxesOfPod(uid)) > 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	vm := vmpod.ID{PodUID: uid}
	if s.preps[vm] == nil && s.runs[vm] == nil {
		delete(s.hints, uid)
	}
}
