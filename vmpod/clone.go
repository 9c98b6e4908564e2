package vmpod

// An Origin says how a machine came to be.
type Origin struct {
	// Cloned: it began as a copy of a guest that had booted before, and went
	// on where that one stood. Else it was booted, and Reason is a CamelCase
	// word that says why, empty if its driver clones nothing.
	Cloned bool
	Reason string
	// Grown: its driver added memory to what the copy had, up to the Spec's.
	// The guest takes that as it takes what Grow offers, so its agent must have
	// answered Online (package agentapi) before the first container starts.
	Grown bool
}

// An Originator is a Machine that knows its Origin. What another process
// launched may know Cloned alone.
type Originator interface {
	Origin() Origin
}
