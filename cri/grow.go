package cri

import (
	"context"
	"fmt"
	"reflect"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// extentTimeout bounds how long an admission waits for the hypervisor, as
// vmpod.Resizer has it.
const extentTimeout = 500 * time.Millisecond

var _ vmpod.Resizer = (*Server)(nil)

// CanResize implements vmpod.Resizer.
func (s *Server) CanResize(ctx context.Context, hint vmpod.Hint) error {
	for _, sb := range s.store.sandboxesOfPod(hint.Owner.PodUID) {
		p := s.livePod(sb.ID)
		if p == nil || sb.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			continue
		}
		if hint.CPUs <= sb.CPUs && hint.Memory <= sb.Memory {
			return nil
		}
		g, ok := p.machine.(vmpod.Grower)
		if !ok {
			return errNoGrowth(sb)
		}
		ctx, cancel := context.WithTimeout(ctx, extentTimeout)
		defer cancel()
		e, err := g.Extent(ctx)
		if err != nil {
			p.log.Warn("whether the pod VM can grow is not known", "err", err)
			return nil
		}
		return within(e, hint.CPUs, hint.Memory)
	}
	return nil
}

// Resize implements vmpod.Resizer.
func (s *Server) Resize(_ context.Context, hint vmpod.Hint) error {
	uid := hint.Owner.PodUID
	if hint.CPUs < 0 || hint.Memory < 0 || hint.EphemeralBytes < 0 {
		return fmt.Errorf("resize pod %s: negative size: %w", uid, errdefs.ErrInvalidArgument)
	}
	for _, sb := range s.store.sandboxesOfPod(uid) {
		if sb.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			s.mu.Lock()
			s.hints[uid] = &hint
			s.mu.Unlock()
			return nil
		}
	}
	return nil
}

func errNoGrowth(sb *sandbox) error {
	return fmt.Errorf("the pod VM has %d CPUs and %d MiB, and does not grow on this hypervisor while it runs: recreate the pod: %w", sb.CPUs, sb.Memory/mib, errdefs.ErrResourceExhausted)
}

// within says whether a machine can become so large.
func within(e vmpod.Extent, cpus int, memory int64) error {
	if cpus > e.MaxCPUs {
		return fmt.Errorf("the pod needs a VM of %d CPUs, and the one that runs can have %d at most: recreate the pod: %w", cpus, e.MaxCPUs, errdefs.ErrResourceExhausted)
	}
	if memory > e.MaxMemory {
		return fmt.Errorf("the pod needs a VM of %d MiB, its guest's own share included, and the one that runs can have %d at most: recreate the pod: %w", memory/mib, e.MaxMemory/mib, errdefs.ErrResourceExhausted)
	}
	return nil
}

// makeRoom grows the pod's VM to what the pod is to have now: what the latest
// hint says, which counts the whole pod and knows that a limit beyond the host
// is no reason for a VM beyond it; without one what needs, which is computed
// from CRI alone. A VM that is larger stays as it is: its memory is given back
// with the pod, and what containers may use of it is their limits' affair.
func (p *pod) makeRoom(ctx context.Context, needs size) error {
	unlock, err := p.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return p.makeRoomLocked(ctx, needs)
}

// makeRoomLocked is makeRoom for who has locked the pod.
func (p *pod) makeRoomLocked(ctx context.Context, needs size) error {
	_, sb, err := p.s.podOf(p.id)
	if err != nil {
		return err
	}
	hint := p.s.hintFor(p.vm.PodUID)
	if hint != nil {
		needs.cpus, needs.memory = hint.CPUs, hint.Memory
	}
	extent := vmpod.Extent{CPUs: sb.CPUs, Memory: sb.Memory}
	if needs.cpus > sb.CPUs || needs.memory > sb.Memory {
		g, ok := p.machine.(vmpod.Grower)
		if !ok {
			return errNoGrowth(sb)
		}
		if err := g.Grow(ctx, needs.cpus, needs.memory); err != nil {
			return err
		}
		if extent, err = p.online(ctx, g); err != nil {
			return err
		}
	}
	return p.recordSize(extent, hint)
}

// online has the guest use all that its machine has, and returns how much that
// is.
func (p *pod) online(ctx context.Context, g vmpod.Grower) (vmpod.Extent, error) {
	e, err := g.Extent(ctx)
	if err != nil {
		return e, err
	}
	_, err = call(ctx, p.link, agentapi.AgentService.Online, &agentapi.OnlineRequest{Cpus: int32(e.CPUs), Memory: e.Memory})
	return e, step("use what the pod VM has grown by", err)
}

// takeGrowth has the guest of a cloned machine use the memory that was added
// to what the copy had, before any container counts on it.
func takeGrowth(ctx context.Context, kit *machineKit) error {
	o, ok := kit.machine.(vmpod.Originator)
	if !ok || !o.Origin().Grown {
		return nil
	}
	_, err := call(ctx, kit.link, agentapi.AgentService.Online, &agentapi.OnlineRequest{Cpus: int32(kit.size.cpus), Memory: kit.size.memory})
	return step("use the memory of the pod VM", err)
}

// recordSize notes how large the VM is and by which hint, if that is new.
func (p *pod) recordSize(e vmpod.Extent, hint *vmpod.Hint) error {
	sb, ok := p.s.store.sandbox(p.id)
	if ok && sb.CPUs == e.CPUs && sb.Memory == e.Memory && reflect.DeepEqual(sb.Hint, hint) {
		return nil
	}
	err := p.s.store.updateSandbox(p.id, noEvent, func(sb *sandbox) {
		sb.CPUs, sb.Memory, sb.Hint = e.CPUs, e.Memory, hint
	})
	p.s.podVMs.tell(p.id)
	return err
}

// resumeGrowth finishes what an earlier process began: a VM that is larger than
// its record has grown, and perhaps nobody has told its guest.
func (p *pod) resumeGrowth(sb *sandbox) {
	g, ok := p.machine.(vmpod.Grower)
	if !ok {
		return
	}
	e, err := g.Extent(p.ctx)
	if err == nil && (e.CPUs > sb.CPUs || e.Memory/mib > (sb.Memory+mib-1)/mib) {
		if e, err = p.online(p.ctx, g); err == nil {
			err = p.recordSize(e, sb.Hint)
		}
	}
	if err != nil && p.ctx.Err() == nil && !isClosed(p.dead) {
		p.log.Warn("how far the pod VM has grown is not known; the next resize finds out", "err", err)
	}
}
