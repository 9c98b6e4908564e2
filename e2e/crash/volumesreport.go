package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// A volumesResult is what a run of `crash volumes` came to.
type volumesResult struct {
	// For was asked for, Seconds is how long there were kills.
	For         float64      `json:"for"`
	Seconds     float64      `json:"seconds"`
	Seed        uint64       `json:"seed"`
	Accelerator string       `json:"accelerator"`
	Kills       []volumeKill `json:"kills"`
	// Acknowledged values of all volumes, Begun is how often their writers began.
	Acknowledged int64 `json:"acknowledged"`
	Begun        int   `json:"begun"`
	// Formatted is how many volumes were, Looks how often it was looked who has
	// them open.
	Formatted int `json:"formatted"`
	Looks     int `json:"looks"`
	// Refusal is what a second pod, on the other node, is told.
	Refusal    string      `json:"refusal"`
	Violations []violation `json:"violations"`
}

func (r *volumesResult) kills() int { return len(r.Kills) }

func (r *volumesResult) count(kinds ...string) (n int) {
	for _, v := range r.Violations {
		if slices.Contains(kinds, v.Kind) {
			n++
		}
	}
	return n
}

// backs are the times of the kills of a kind that were waited for, sorted.
func (r *volumesResult) backs(kind string) (n int, all []float64) {
	for _, k := range r.Kills {
		if k.Kind != kind {
			continue
		}
		if n++; k.Back > 0 {
			all = append(all, k.Back)
		}
	}
	slices.Sort(all)
	return n, all
}

func (r *volumesResult) summary() string {
	return fmt.Sprintf("%d kills in %.0f s, %d values acknowledged by %d runs of three writers: %d lost or out of order, %d attached twice, %d formatted twice, %d leftovers; seed %d",
		len(r.Kills), r.Seconds, r.Acknowledged, r.Begun, r.count("lost", "order", "failed"), r.count("twice"), r.count("format"), r.count("left"), r.Seed)
}

// verdict is an error that names every violation, nil when there is none.
func (r *volumesResult) verdict() error {
	var errs []error
	if len(r.Kills) == 0 || r.Acknowledged == 0 || r.Looks == 0 {
		errs = append(errs, fmt.Errorf("nothing is proved by %d kills, %d values and %d looks", len(r.Kills), r.Acknowledged, r.Looks))
	}
	for _, v := range r.Violations {
		errs = append(errs, fmt.Errorf("%s: after kill %d: %s", v.Kind, v.Kills, v.Message))
	}
	return errors.Join(errs...)
}

const volumesTableHead = `# What volumes go through

Written by ` + "`make crash-volumes`" + `: two nodes with a datastore that both have, and a
StatefulSet of three whose pods write a counter each. A value is acknowledged to
an observer outside the VMs when fsync has returned. Pods are deleted,
spherelets, QEMUs and a whole node killed, at random instants. A node that is
lost is found NotReady, gets the taint ` + "`node.kubernetes.io/out-of-service`" + `, is
fenced, and its pods go on with their volumes on the other node. One kill in five
does not wait until all is back after the one before.

`

var killNames = []struct{ kind, name string }{
	{"pod", "pod deleted, with a grace of 0 or 1 s"}, {"spherelet", "spherelet, SIGKILL"}, {"qemu", "QEMU, SIGKILL"},
	{"node", "node: spherelet and all VMs, SIGKILL; back within 5 s"}, {"lost", "node lost: NotReady, out of service, pods moved, node back"},
}

// writeTable writes the result for people.
func (r *volumesResult) writeTable(file string) error {
	var b strings.Builder
	b.WriteString(volumesTableHead)
	row := func(what string, value any) { fmt.Fprintf(&b, "| %s | %v |\n", what, value) }
	b.WriteString("| | |\n|---|---|\n")
	row("duration of the kills", (time.Duration(r.Seconds) * time.Second).String())
	row("kills", len(r.Kills))
	row("values acknowledged", r.Acknowledged)
	row("runs of the three writers", r.Begun)
	row("acknowledged values lost, changed or out of order", r.count("lost", "order", "failed"))
	row("volumes open in two VMs, or written by two", r.count("twice"))
	row("looks at who has them open", r.Looks)
	row("a second pod with a claim in use, on the other node, waits and is told", r.Refusal)
	row("volumes formatted", r.Formatted)
	row("volumes formatted twice", r.count("format"))
	row("leftovers: VMs, links, files, volumes, leases", r.count("left"))
	row("seed", r.Seed)
	row("accelerator, CPUs", fmt.Sprintf("%s, %d", r.Accelerator, runtime.NumCPU()))
	b.WriteString("\nSeconds until all three write again:\n\n| | kills | median | most |\n|---|---|---|---|\n")
	for _, k := range killNames {
		if n, all := r.backs(k.kind); len(all) > 0 {
			fmt.Fprintf(&b, "| %s | %d | %.1f | %.1f |\n", k.name, n, quantile(all, 0.5), quantile(all, 1))
		} else if n > 0 {
			fmt.Fprintf(&b, "| %s | %d | | |\n", k.name, n)
		}
	}
	if len(r.Violations) > 0 {
		b.WriteString("\n## What went wrong\n\n")
		for _, v := range r.Violations {
			fmt.Fprintf(&b, "- %s, after kill %d: %s\n", v.Kind, v.Kills, strings.Join(strings.Fields(v.Message), " "))
		}
	}
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
