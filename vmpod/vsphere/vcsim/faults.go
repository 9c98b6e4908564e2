package vcsim

import (
	"slices"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

// A Fault makes calls fail. The first rule that matches a call is used.
type Fault struct {
	// Method is a SOAP method ("CreateResourcePool", "Destroy_Task"), or a REST
	// method and path ("POST /rest/com/vmware/cis/tagging/tag"); "*": any.
	Method string
	// Object is the managed object's id, or its name; empty: any.
	Object string
	// User whose calls it is about, with the domain; empty: any.
	User string
	// Skip is how many matching calls pass before the first that fails.
	Skip int
	// Times is how many calls fail; 0: all.
	Times int

	// Delay is waited before anything else; a caller that gives up ends it.
	Delay time.Duration
	// Fault is returned instead of the call being made.
	Fault types.BaseMethodFault
	// Task makes the task that the method returns fail with Fault; the call
	// itself succeeds, nothing is done. With Late it is done nevertheless
	// (methods of disks).
	Task bool
	// Hold keeps the task that the method returns running until the channel is
	// closed; then its work is done (methods of disks).
	Hold <-chan struct{}
	// Stuck makes the task that the method returns run for ever; nothing is
	// done.
	Stuck bool
	// Logout ends the caller's session first: the call is NotAuthenticated.
	Logout bool
	// Drop cuts the connection instead of answering. With Late the call is
	// made before that: the caller cannot know.
	Drop, Late bool
}

// Faults are the rules in force. The zero value has none.
type Faults struct {
	mu    sync.Mutex
	rules []*faultRule
	calls map[string]int
}

type faultRule struct {
	Fault
	seen, hit int
}

// Add puts a rule behind the others and returns a function that takes it
// back.
func (f *Faults) Add(rule Fault) (remove func()) {
	r := &faultRule{Fault: rule}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, r)
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.rules = slices.DeleteFunc(f.rules, func(x *faultRule) bool { return x == r })
	}
}

// Calls returns how often each method was called since the start, by SOAP
// method, or REST method and path pattern. Calls that the server makes itself
// are not counted.
func (f *Faults) Calls() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := make(map[string]int, len(f.calls))
	for m, n := range f.calls {
		calls[m] = n
	}
	return calls
}

func (f *Faults) count(method string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.calls == nil {
		f.calls = map[string]int{}
	}
	f.calls[method]++
}

// match returns the rule for a call, if there is one, and uses it up.
func (f *Faults) match(method, id, name, user string) (Fault, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range f.rules {
		if r.Method != "*" && r.Method != method ||
			r.Object != "" && r.Object != id && r.Object != name ||
			r.User != "" && r.User != user {
			continue
		}
		r.seen++
		if r.seen <= r.Skip || r.Times > 0 && r.hit >= r.Times {
			continue
		}
		r.hit++
		return r.Fault, true
	}
	return Fault{}, false
}
