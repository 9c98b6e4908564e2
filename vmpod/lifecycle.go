package vmpod

// A State is where a machine is in its life.
type State string

// States of a machine.
const (
	StateLaunching State = "Launching" // intent recorded, VMM not yet running
	StateRunning   State = "Running"   // VMM runs; the guest may still be booting
	StateStopping  State = "Stopping"  // Stop was asked for
	StateStopped   State = "Stopped"   // off; Wait says why
	StateUnknown   State = "Unknown"   // the hypervisor does not answer
)
