package vmpod

import (
	"context"
	"net"
	"time"
)

// A Driver owns the pod VMs of one host. Errors wrap errdefs classes
// (github.com/containerd/errdefs): ErrNotFound, ErrAlreadyExists,
// ErrInvalidArgument, ErrResourceExhausted, ErrUnavailable.
//
// A Driver keeps nothing that List could not rebuild after a crash: the
// hypervisor (on KVM: the QEMU processes and their run directories) is the
// store of record.
type Driver interface {
	// Launch starts a machine and returns once the hypervisor runs it; it
	// does not wait for the guest. It is idempotent on Spec.ID: an equal Spec
	// returns the machine that is there, a different one ErrAlreadyExists.
	// When it fails or ctx ends it leaves nothing behind.
	Launch(ctx context.Context, spec Spec) (Machine, error)
	// Open returns a machine that Launch made, perhaps in an earlier process;
	// ErrNotFound if there is none.
	Open(ctx context.Context, id ID) (Machine, error)
	// List returns every machine this host owns, whoever launched it,
	// including those that have ended but were not yet removed.
	List(ctx context.Context) ([]Machine, error)
}

// A Machine is one pod VM. Its methods are safe for concurrent use.
type Machine interface {
	// Spec returns what the machine was launched with, plus what was plugged
	// and what it has grown by. What another process did to it may be missing
	// for as long as the hypervisor has not been asked yet (Grower.Extent).
	Spec() Spec
	// Status never blocks on the guest. A hypervisor that does not answer in
	// time yields StateUnknown and a reason, never StateStopped.
	Status(ctx context.Context) (Status, error)
	// Dial opens the agent channel. One connection is served at a time; a new
	// one takes over. It returns when the hypervisor accepts, which may be
	// before the guest has booted: agentapi.Attach waits for the agent.
	Dial(ctx context.Context) (net.Conn, error)
	// Wait returns when the machine is off, and says why. Any number of
	// callers may wait. Its error is about waiting only (ctx ended).
	Wait(ctx context.Context) (Exit, error)
	// Stop ends the machine: at once if grace is 0, else after asking the
	// guest to power off and waiting at most grace. Stopping what has
	// stopped succeeds.
	Stop(ctx context.Context, grace time.Duration) error
	// Remove stops the machine if need be and erases all that the driver
	// made for it (never disks or taps, which have other owners). Removing
	// what is gone succeeds.
	Remove(ctx context.Context) error
}

// A Plugger is a Machine whose disks and NICs can change while it runs.
type Plugger interface {
	// Plug adds a device; plugging an equal one again succeeds. It returns
	// when the hypervisor has it; the guest may see it a little later.
	Plug(ctx context.Context, d Device) error
	// Unplug removes a device by its ID and waits until the guest has let
	// go; unplugging what is not there succeeds.
	Unplug(ctx context.Context, id string) error
}

// A DiskResizer is a Machine whose plugged volumes can grow while it runs.
type DiskResizer interface {
	// ResizeDisk makes the disk at least bytes large, which the back end has
	// made room for (storage.Volumes.Expand). It never shrinks and is
	// idempotent. The guest is told by the device. ErrNotFound without such a
	// disk, ErrInvalidArgument for one that is no volume, ErrResourceExhausted
	// without room on the host.
	ResizeDisk(ctx context.Context, diskID string, bytes int64) error
}

// A Checker is a Driver that can tell whether it could launch now. The error
// says what is missing and the cure. It is asked every few seconds.
type Checker interface {
	Ready(ctx context.Context) error
}

// A Meter is a Machine whose use of the host can be read.
type Meter interface {
	// Counters is what the host has at hand, all but Proportional. It costs next
	// to nothing: statistics ask for it many times a minute.
	Counters(ctx context.Context) (Usage, error)
	// Usage is all of it. The kernel walks all pages of the VMM for it, which
	// waits meanwhile where it wants new ones.
	Usage(ctx context.Context) (Usage, error)
}

// Usage is what one machine costs the host, its VMM included.
type Usage struct {
	Time time.Time
	// CPU is the CPU time used so far, in nanoseconds.
	CPU uint64
	// Resident and Proportional are memory in bytes (RSS and PSS of the VMM).
	Resident, Proportional uint64
}

// Status is a machine's state as the hypervisor tells it.
type Status struct {
	State State
	// Reason is a CamelCase word and Message a sentence for people; both are
	// set in every state but StateRunning. There they tell of a fault that the
	// machine has outlived, such as HostDiskFull, and are empty without one.
	Reason, Message string
	StartedAt       time.Time
	// PID is the VMM's process on this host, 0 where there is none.
	PID int
}

// Exit says how a machine ended.
type Exit struct {
	// Reason is one of the Exit… constants.
	Reason ExitReason
	// Message is a sentence for people: what was seen, and where more is.
	Message string
	At      time.Time
}

// An ExitReason is a CamelCase word, fit for a Kubernetes condition.
type ExitReason string

// Ways a pod VM can end. Only ExitGuestPoweroff and ExitStopped are orderly.
const (
	ExitGuestPoweroff ExitReason = "GuestPoweroff" // the guest powered itself off
	ExitStopped       ExitReason = "Stopped"       // Stop or Remove asked for it
	ExitGuestPanic    ExitReason = "GuestPanic"    // the guest kernel panicked
	ExitGuestReset    ExitReason = "GuestReset"    // the guest rebooted (PID 1 died, triple fault)
	ExitVMMKilled     ExitReason = "VMMKilled"     // a signal ended the VMM
	ExitVMMOOMKilled  ExitReason = "VMMOOMKilled"  // the host's OOM killer ended the VMM
	ExitVMMFailed     ExitReason = "VMMFailed"     // the VMM exited with an error
	ExitHostRestart   ExitReason = "HostRestart"   // the host booted since the launch
	ExitAgentHung     ExitReason = "AgentHung"     // stopped because its agent did not answer
	ExitAgentWrong    ExitReason = "AgentWrong"    // stopped because its agent kept breaking the protocol
	ExitUnknown       ExitReason = "Unknown"       // it is off; why could not be told
)
