package vmpod

import (
	"context"
	"time"
)

// Reasons of a Fault beside those of an Exit and of a Status.
const (
	// ReasonVMMStopped: a signal has stopped the VMM's process.
	ReasonVMMStopped = "VMMStopped"
	// ReasonVMMNotResponding: the VMM's process runs and does not answer.
	ReasonVMMNotResponding = "VMMNotResponding"
	// ReasonVMPaused: somebody has paused the guest on the VMM's monitor.
	ReasonVMPaused = "VMPaused"
	// ReasonAgentSilent: the guest's agent has not answered for a while in
	// which it could have. ExitAgentHung follows unless it answers.
	ReasonAgentSilent = "AgentSilent"
	// ReasonHostDiskFull and ReasonHostDiskError: the guest's disks fail.
	ReasonHostDiskFull  = "HostDiskFull"
	ReasonHostDiskError = "HostDiskError"
	// ReasonHostDirectoryLost: the guest waits for a share that nobody serves.
	ReasonHostDirectoryLost = "HostDirectoryLost"
)

// A Fault is something wrong with a pod's VM, or the end of one.
type Fault struct {
	PodUID, Namespace, Name string
	// Reason is a CamelCase word and Message a sentence for people.
	Reason, Message string
	// Ended says that the VM is no more; such a fault is never cleared.
	Ended bool
	// Cleared says that an earlier fault of this pod is over.
	Cleared bool
	At      time.Time
}

// Progress is how much a machine's guest could have done so far, as the host
// counts it. Only differences of two readings mean something.
type Progress struct {
	// Waited is the time that the machine's threads, by their ids, were ready
	// to run and had to wait for a CPU of the host.
	Waited map[int]time.Duration
	// Stuck says that one of them waits for the host's disk now.
	Stuck bool
}

// Since is the longest time that one thread has waited since earlier.
func (p Progress) Since(earlier Progress) time.Duration {
	longest := time.Duration(0)
	for id, w := range p.Waited {
		if before, ok := earlier.Waited[id]; ok {
			longest = max(longest, w-before)
		}
	}
	return longest
}

// A Pacer is a Machine that can tell a guest that does nothing from one that
// the host does not let work.
type Pacer interface {
	Progress(ctx context.Context) (Progress, error)
}
