package controlplane

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/supervisor/podmirror"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// A mirrorInventory is the embedded vCenter, as the mirrors' controller has it.
type mirrorInventory struct{ *vcsim.Server }

func (i mirrorInventory) Mirror(ctx context.Context, vm podmirror.VM) (podmirror.Ref, error) {
	moid, err := i.Server.Mirror(ctx, vcsim.Mirror(vm))
	return podmirror.Ref{MoID: moid, VCenter: i.InstanceUUID()}, err
}

func (i mirrorInventory) Mirrored(context.Context) ([]string, error) { return i.Mirrors(), nil }

func (i mirrorInventory) ShowHost(ctx context.Context, h podmirror.Host) error {
	return i.Server.ShowHost(ctx, vcenterCluster, vcsim.Host{Name: h.Name, CPUs: h.CPUs, Memory: h.Memory, State: vcsim.HostState(h.State)})
}

func (i mirrorInventory) Hosts(context.Context) ([]string, error) { return i.Server.Hosts(), nil }

// A mirrorPower passes power operations on mirrors to the controller, which
// comes after the vCenter that is asked for them.
type mirrorPower struct {
	controller atomic.Pointer[podmirror.Controller]
}

// do is vcsim.Config.Power.
func (p *mirrorPower) do(ctx context.Context, r vcsim.PowerRequest) error {
	c := p.controller.Load()
	if c == nil {
		return fmt.Errorf("the supervisor is starting: try again in a moment: %w", errdefs.ErrUnavailable)
	}
	return c.Power(ctx, podmirror.PowerRequest{Op: podmirror.PowerOp(r.Op), UUID: r.UUID, User: r.User})
}

// newPodMirror returns the controller that shows pods in the embedded vCenter,
// and has power know it. It needs the rights that the add-ons give.
func (c Config) newPodMirror(vcenter *vcsim.Server, power *mirrorPower) (*podmirror.Controller, error) {
	client, dyn, err := clients(c, podMirror)
	if err != nil {
		return nil, err
	}
	controller, err := podmirror.New(podmirror.Options{Client: client, Dynamic: dyn, Inventory: mirrorInventory{vcenter}})
	if err != nil {
		return nil, err
	}
	power.controller.Store(controller)
	return controller, nil
}
