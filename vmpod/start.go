package vmpod

import (
	"cmp"
	"slices"
	"time"
)

// Phases of a pod's start, in the order in which they begin. Some run side by
// side, and between them nothing of ours may be under way.
const (
	// PhaseQueue: from when the pod was given to the node until work on its VM
	// began, which is known only for pods with a Hint; and waits for a turn.
	PhaseQueue = "queue"
	// PhaseNetwork: address and tap.
	PhaseNetwork = "network"
	// PhaseImage: pulls for the pod, and opening disks of images for its VM.
	PhaseImage = "image"
	// PhaseVM: the writable disk, and the hypervisor's Launch.
	PhaseVM = "vm"
	// PhaseAgent: from Launch until the guest's agent has answered, and setting
	// the guest up.
	PhaseAgent = "agent"
	// PhaseContainer: CreateContainer and StartContainer.
	PhaseContainer = "container"
)

// Phases returns the names of all phases in their order.
func Phases() []string {
	return []string{PhaseQueue, PhaseNetwork, PhaseImage, PhaseVM, PhaseAgent, PhaseContainer}
}

// A Phase is one stretch of time of a start; a phase may have several.
type Phase struct {
	Name string
	// From is counted from the Start's Begun.
	From, Took time.Duration
}

// A Start tells where the time went until the first container of a pod's
// sandbox ran, be it an init container: what follows is time of the pod's own.
type Start struct {
	PodUID, Namespace, Name string
	// Attempt is the sandbox's: above 0, the pod got another VM.
	Attempt uint32
	// Begun is when the pod was given to the node, or if that is not known,
	// when work on it began; Took is the time from there.
	Begun time.Time
	Took  time.Duration
	// Prepared says that work began before RunPodSandbox.
	Prepared bool
	// Phases are sorted by From; those of one name do not overlap, those of
	// different names may.
	Phases []Phase
}

// Total is the time for which a phase was under way.
func (s Start) Total(phase string) time.Duration {
	var sum time.Duration
	for _, p := range s.Phases {
		if p.Name == phase {
			sum += p.Took
		}
	}
	return sum
}

// MergePhases sorts phases, clips them to [0, end] and joins those of one name
// that overlap or touch. Phases without a duration are kept.
func MergePhases(phases []Phase, end time.Duration) []Phase {
	sorted := slices.Clone(phases)
	slices.SortStableFunc(sorted, func(a, b Phase) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(slices.Index(Phases(), a.Name), slices.Index(Phases(), b.Name)))
	})
	var out []Phase
	last := map[string]int{} // where the latest of a name is in out
	for _, p := range sorted {
		to := min(p.From+p.Took, end)
		p.From = max(p.From, 0)
		if p.Took = to - p.From; p.Took < 0 {
			continue
		}
		i, ok := last[p.Name]
		if ok && p.From <= out[i].From+out[i].Took {
			out[i].Took = max(out[i].Took, to-out[i].From)
			continue
		}
		last[p.Name] = len(out)
		out = append(out, p)
	}
	return out
}
