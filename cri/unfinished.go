package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// createInGuest has the guest create a container. When its caller leaves
// first, or it fails, whatever the guest may have made is removed again:
// behind the caller's back, who need not wait for a slow guest, and not before
// the guest has answered, or the removal could overtake the creation.
func (p *pod) createInGuest(ctx context.Context, req *agentapi.CreateContainerRequest) error {
	asked, cancel := context.WithTimeout(context.WithoutCancel(ctx), reclaimTimeout)
	closed := context.AfterFunc(p.ctx, cancel)
	answer := make(chan error, 1)
	left := make(chan bool, 1)
	ok := p.spawn(func() {
		defer cancel()
		defer closed()
		_, err := call(asked, p.link, agentapi.AgentService.CreateContainer, req)
		answer <- err
		if err != nil || <-left {
			p.forgetGuestContainer(req.Id)
		}
	})
	if !ok {
		closed()
		cancel()
		return fmt.Errorf("sandbox %s was stopped: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	select {
	case err := <-answer:
		left <- false
		return err
	case <-ctx.Done():
		left <- true
		return ctx.Err()
	}
}
