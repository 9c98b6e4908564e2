package vmpod

import "context"

// A Grower is a Machine that can be given more CPUs and memory while it runs.
type Grower interface {
	// Grow sees to it that the machine has at least so many CPUs and so much
	// RAM, in bytes, the guest's own share included, as Spec counts them; 0
	// leaves one as it is. It never shrinks: less than what is there is there
	// already. It is idempotent, and after an error, a lost context or a crash
	// of the caller it is completed by being called again.
	//
	// Memory is rounded up to the driver's step, but not beyond the maximum.
	// Nothing is changed and the error is ErrResourceExhausted if either is
	// more than Extent's maximum, or the host has not the memory that it would
	// take; ErrInvalidArgument for negative values; ErrUnavailable if the
	// machine is off or the hypervisor does not answer.
	//
	// It returns when the hypervisor offers what was asked for, and Spec,
	// Extent and the host's accounting count it from then on. The guest takes
	// it a little later, with its agent's help (Online in package agentapi). A
	// guest that does not take it runs on with what it has; it may take the
	// rest at any later time.
	Grow(ctx context.Context, cpus int, memory int64) error
	// Extent asks the hypervisor how large the machine is now, whoever grew it,
	// and how large it can become. Errors are those of Grow.
	Extent(ctx context.Context) (Extent, error)
}

// An Extent is how large a machine is and can become. A machine that cannot
// grow has what it can have.
type Extent struct {
	CPUs   int
	Memory int64 // bytes, as in Spec
	// MaxCPUs and MaxMemory are set at the launch.
	MaxCPUs   int
	MaxMemory int64
}
