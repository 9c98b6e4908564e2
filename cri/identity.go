package cri

import (
	"fmt"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// checkProtocol refuses a guest that could run containers before it is one of
// a kind.
func checkProtocol(hello *agentapi.HelloResponse) error {
	if hello.GetProtocol() >= agentapi.ProtocolIdentity {
		return nil
	}
	return fmt.Errorf("the guest's agent (version %.64q) speaks protocol %d, and %d is the first that runs nothing before a VM has an identity of its own: build the guest image anew (make guest): %w",
		hello.GetVersion(), hello.GetProtocol(), agentapi.ProtocolIdentity, errdefs.ErrFailedPrecondition)
}

// maxBoots is how many boot ids are remembered, of VMs that are gone too.
const maxBoots = 4096

// bootIDs are those of the VMs seen so far. A guest's kernel draws its id from
// the same generator as all that containers draw: two VMs with the same one
// share their keys as well.
type bootIDs struct {
	mu    sync.Mutex
	of    map[uuid.UUID]vmpod.ID
	order []uuid.UUID // oldest first
}

// claim notes a VM's boot id; another VM's is ErrFailedPrecondition.
func (b *bootIDs) claim(id string, vm vmpod.ID) error {
	u, err := uuid.Parse(id)
	if err != nil {
		return fmt.Errorf("the guest has no boot id of its own: %w", errdefs.ErrFailedPrecondition)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if owner, ok := b.of[u]; ok {
		if owner == vm {
			return nil
		}
		return fmt.Errorf("the guest has the boot id of pod VM %s, so their random numbers are the same: remove the node's templates: %w", owner, errdefs.ErrFailedPrecondition)
	}
	if len(b.order) == maxBoots {
		delete(b.of, b.order[0])
		b.order = b.order[1:]
	}
	if b.of == nil {
		b.of = map[uuid.UUID]vmpod.ID{}
	}
	b.of[u] = vm
	b.order = append(b.order, u)
	return nil
}
