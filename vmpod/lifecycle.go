package vmpod

import "fmt"

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

// An Event is what moves a machine from one State to another.
type Event string

// Events.
const (
	EventStarted  Event = "Started"  // the hypervisor runs the machine
	EventStop     Event = "Stop"     // Stop or Remove was called
	EventEnded    Event = "Ended"    // the machine is off, for whatever reason
	EventSilent   Event = "Silent"   // the hypervisor did not answer in time
	EventAnswered Event = "Answered" // it answers again
)

// transitions is the whole life of a machine; the test of this package draws
// the picture in Next's comment from it. An event that is missing in a state
// cannot happen there. Silence is never death: only Ended leads to Stopped.
var transitions = map[State]map[Event]State{
	StateLaunching: {
		EventStarted: StateRunning,
		EventStop:    StateStopping,
		EventEnded:   StateStopped,
		EventSilent:  StateUnknown,
	},
	StateRunning: {
		EventStop:     StateStopping,
		EventEnded:    StateStopped,
		EventSilent:   StateUnknown,
		EventAnswered: StateRunning,
	},
	StateUnknown: {
		EventStop:     StateStopping,
		EventEnded:    StateStopped,
		EventSilent:   StateUnknown,
		EventAnswered: StateRunning,
	},
	StateStopping: {
		EventStop:     StateStopping,
		EventEnded:    StateStopped,
		EventSilent:   StateStopping,
		EventAnswered: StateStopping,
	},
	StateStopped: {
		EventStop:  StateStopped,
		EventEnded: StateStopped,
	},
}

// Next returns the state that follows s when e happens. It is an error, and
// the state stays, if e cannot happen in s.
//
//	Launching -- Started --> Running
//	Launching -- Silent --> Unknown
//	Launching -- Stop --> Stopping
//	Launching -- Ended --> Stopped
//	Running   -- Answered --> Running
//	Running   -- Silent --> Unknown
//	Running   -- Stop --> Stopping
//	Running   -- Ended --> Stopped
//	Unknown   -- Answered --> Running
//	Unknown   -- Silent --> Unknown
//	Unknown   -- Stop --> Stopping
//	Unknown   -- Ended --> Stopped
//	Stopping  -- Answered, Silent, Stop --> Stopping
//	Stopping  -- Ended --> Stopped
//	Stopped   -- Ended, Stop --> Stopped
func Next(s State, e Event) (State, error) {
	next, ok := transitions[s][e]
	if !ok {
		return s, fmt.Errorf("machine in state %s: event %s cannot happen", s, e)
	}
	return next, nil
}
