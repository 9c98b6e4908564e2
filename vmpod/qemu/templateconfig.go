package qemu

import (
	"context"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// Templates says whether and how VMs are cloned instead of booted: see
// docs/decisions/0010-templates.md. The zero value boots every VM.
type Templates struct {
	Enabled bool
	// Sizes are made when the driver starts, in this order; others when VMs
	// want them. More than Memory allows are not made.
	Sizes []Size
	// PerTenant keeps a template for each namespace whose pods want one; then
	// none are made at the start.
	PerTenant bool
	// Memory bounds what templates and warm clones cost the host, in bytes;
	// default DefaultTemplateMemory. One template is always kept.
	Memory int64
	// Furnished templates have a disk and a NIC, in whose place a clone has its
	// own first ones, which saves the guest the finding of them. The guest's
	// agent must then give a NIC of agentapi.PlaceholderMAC the address that it
	// is told.
	Furnished bool
	// Warm is how many clones of the first of Sizes wait for a pod; default
	// none.
	Warm int
	// Probe returns when the guest's agent has answered on its channel, which
	// Probe closes, and has nothing left of the talk; default: package agentapi.
	Probe func(ctx context.Context, conn net.Conn) error `json:"-"`
}

// A Size is a VM's as in vmpod.Spec.
type Size struct {
	CPUs   int
	Memory int64 // bytes
}

// DefaultTemplateMemory is enough for half a dozen templates.
const DefaultTemplateMemory = 512 << 20

func (t *Templates) complete() error {
	if t.Memory <= 0 {
		t.Memory = DefaultTemplateMemory
	}
	if t.Warm < 0 {
		return fmt.Errorf("%d warm clones: want none or more: %w", t.Warm, errdefs.ErrInvalidArgument)
	}
	if t.Probe == nil {
		t.Probe = probeAgent
	}
	for _, s := range t.Sizes {
		if s.CPUs < 1 || s.CPUs > maxCPUs || s.Memory < minMemory || s.Memory > maxMemory {
			return fmt.Errorf("template of %d CPUs and %d bytes: want what a pod VM can have: %w", s.CPUs, s.Memory, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// probeAgent greets podinit and ends the session.
func probeAgent(ctx context.Context, conn net.Conn) error {
	c, err := agentapi.Attach(ctx, conn)
	if err != nil {
		return err
	}
	resp, err := c.Hello(ctx, &agentapi.HelloRequest{HostVersion: "template"})
	if err != nil {
		c.Close()
		return err
	}
	if resp.SandboxReady {
		c.Close()
		return fmt.Errorf("the guest has an identity: %w", errdefs.ErrFailedPrecondition)
	}
	return c.End()
}

// How long the making of a template may take, on a host that has better to do.
const (
	templateBoot   = 5 * time.Minute  // until the agent answers
	templateSettle = 10 * time.Second // until the guest has nothing more to do
	templateSave   = 30 * time.Second
	templateVerify = 2 * time.Minute // until a clone's agent answers
)

// After a failure the next attempt waits, twice as long each time; after
// templateAttempts it is given up until the guest or QEMU changes.
const (
	templateBackoff    = 10 * time.Second
	templateMaxBackoff = 10 * time.Minute
	templateAttempts   = 6
)
