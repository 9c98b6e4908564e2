package vmpod

import (
	"context"
	"time"
)

// A Hint is what the whole Pod says about its coming VM. CRI carries too
// little to size one (no memory requests, no volumes, no images), so
// spherelet sends it at admission, long before RunPodSandbox, and the runtime
// starts everything that can be started. Without a hint (crictl, a stock
// kubelet) the runtime works from CRI alone.
type Hint struct {
	Owner Owner `json:"owner"`
	// CPUs and Memory are the VM's size, overhead included (see package
	// spherelet/resources for the arithmetic).
	CPUs   int   `json:"cpus"`
	Memory int64 `json:"memory"`
	// EphemeralBytes is the size of the pod's writable disk.
	EphemeralBytes int64 `json:"ephemeralBytes"`
	// Pool is where the VM is accounted: QoS class or resource pool.
	Pool string `json:"pool,omitempty"`
	// Images are the references of images whose disks the VM may have from its
	// start, if they are on the host; others are plugged with their containers.
	Images []string `json:"images,omitempty"`
	// Queued is when the pod was given to the node; zero if that is not known.
	Queued time.Time `json:"queued,omitzero"`
	// HostNetwork and the like never appear: such pods are refused before.
}

// A Preparer starts work for a pod whose sandbox will be asked for soon.
type Preparer interface {
	// Prepare records the hint and returns at once; the work goes on behind
	// it and RunPodSandbox joins it. Calling it again with the same pod UID
	// replaces a hint that has not been used yet.
	Prepare(ctx context.Context, hint Hint) error
	// Forget drops a preparation that no sandbox will use, with all that was
	// made for it. Forgetting what is unknown or in use does nothing.
	Forget(ctx context.Context, podUID string) error
}

// A Resizer is a Preparer that learns of changes to pods that run: CRI says as
// little of their new size as of their first.
type Resizer interface {
	// CanResize returns nil if the pod's VM can become as large as the hint
	// says, or has no VM that would have to grow, or if that cannot be told
	// within half a second; else ErrResourceExhausted, with the maximum and the
	// cure in the message.
	CanResize(ctx context.Context, hint Hint) error
	// Resize says how large the VM of a pod that runs is to be from now on, and
	// returns at once. The VM grows to that, if it is not as large already, when
	// the runtime is next told of the pod's resources. For a pod without a VM
	// it does nothing.
	Resize(ctx context.Context, hint Hint) error
}
