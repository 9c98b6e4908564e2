package crashmatrix

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

func (r result) String() string {
	name := string(r.point)
	if r.nth > 1 {
		name += fmt.Sprintf(" (hit %d)", r.nth)
	}
	verdict := "ok"
	if !r.ok() {
		verdict = "FAILED"
	}
	return fmt.Sprintf("%-22s %-40s %-6s recovered in %.2f s", r.op, name, verdict, r.recovery.Seconds())
}

// A summary is what a run came to.
type summary struct {
	cells, rounds, lines int
	took                 time.Duration
	accelerator          string
}

func (s summary) String() string {
	return fmt.Sprintf("%d crashes in %d pods' lives; the neighbour wrote %d lines; %.0f s", s.cells, s.rounds, s.lines, s.took.Seconds())
}

const tableHead = `# The crash matrix

Written by ` + "`make crash-matrix`" + `: ` + "`spherelet cri`" + `, built with the tag
failpoints, is killed (SIGKILL) at each point in the operation named, on real
VMs without a kubelet, and started again. Then must hold:

- **retry**: the client's same call, made again, succeeds, and the pod is what
  it would have been (exit codes and log lines included).
- **orphans**: nothing is left that no record stands for: QEMU processes, VM
  directories, sockets, taps, packet filter entries, disks, cgroups, secrets,
  blobs, image disks, holds, leases, intents, files of any kind; nothing is
  missing that a record stands for; lists, records and guests agree. No volume is
  lost, open in a VM that does not hold it, or formatted twice.
- **neighbour**: another pod's VM is the same process, Ready at the first answer,
  its container still the one that was started, its log without a gap or a
  repetition.
- **recovery**: from the start of the new process until all of that holds for
  what the crash left, before the retry. Starting the process is most of it.

Failpoints are in ` + "`internal/failpoint`" + `; what meets which is in
` + "`e2e/crashmatrix/plan_test.go`" + `; decision
[0007](decisions/0007-failpoints.md) says why they are as they are.

`

// writeTable makes the results readable, in the order of a pod's life.
func writeTable(results []result, s summary) string {
	var b strings.Builder
	b.WriteString(tableHead)
	var times []time.Duration
	bad := 0
	for _, r := range results {
		if !r.ok() {
			bad++
		}
		if r.recovery > 0 { // it came so far
			times = append(times, r.recovery)
		}
	}
	slices.Sort(times)
	if len(times) > 0 {
		fmt.Fprintf(&b, "%d crashes, %d with a fault; recovery p50 %.2f s, longest %.2f s; the neighbour wrote %d lines in %.0f s (%s).\n\n",
			len(results), bad, times[len(times)/2].Seconds(), times[len(times)-1].Seconds(), s.lines, s.took.Seconds(), s.accelerator)
	}
	b.WriteString("| Point | Operation | died | retry | orphans | neighbour | recovery s |\n|---|---|---|---|---|---|---|\n")
	order := func(r result) int { return slices.Index(operations, r.op)*1000 + slices.Index(plan[r.op], r.visit) }
	slices.SortStableFunc(results, func(a, b result) int { return order(a) - order(b) })
	for _, r := range results {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %.2f |\n", r.cell(), r.op, well(r.died, "yes"), well(r.retry, "ok"), well(r.orphans, "none"), well(r.noticed, "untouched"), r.recovery.Seconds())
	}
	return b.String()
}

// well is a cell of the table: the good word, or what went wrong.
func well(fault, word string) string {
	if fault == "" {
		return word
	}
	fault = strings.Join(strings.Fields(fault), " ")
	return "**" + strings.ReplaceAll(fault[:min(len(fault), 300)], "|", "\\|") + "**"
}
