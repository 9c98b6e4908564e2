package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"
)

// A result is what a run came to.
type result struct {
	Kills       int    `json:"kills"`
	Asked       int    `json:"asked"` // kills
	Pods        int    `json:"pods"`
	Seed        uint64 `json:"seed"`
	Accelerator string `json:"accelerator"`
	CPUs        int    `json:"cpus"`
	// Churned is how many other pods were made and deleted meanwhile;
	// ChurnRestarts how many of their containers were started twice.
	Churned       int `json:"churned"`
	ChurnRestarts int `json:"churnRestarts"`
	// Events is how many changes the API server told of; LogLines how many
	// lines were compared.
	Events   int `json:"events"`
	LogLines int `json:"logLines"`
	// KillSeconds is from the start until all was back after the last kill.
	KillSeconds float64     `json:"killSeconds"`
	Within      float64     `json:"within"`
	Violations  []violation `json:"violations"`
	Recoveries  []recovery  `json:"recoveries"`
}

func (t *trial) result(churned, events, logLines int) *result {
	t.f.mu.Lock()
	defer t.f.mu.Unlock()
	return &result{Kills: t.f.kills, Asked: t.o.Kills, Pods: t.o.Pods, Seed: t.o.Seed, CPUs: runtime.NumCPU(), Churned: churned, ChurnRestarts: t.f.churnRestarts,
		Events: events, LogLines: logLines, Within: t.o.Within.Seconds(), Violations: slices.Clone(t.f.all), Recoveries: t.recovery}
}

func (r *result) violate(kind, format string, args ...any) {
	r.Violations = append(r.Violations, violation{Kind: kind, Message: fmt.Sprintf(format, args...), Kills: r.Kills})
}

// count tells how many violations of a kind there are.
func (r *result) count(kind string) (n int) {
	for _, v := range r.Violations {
		if v.Kind == kind {
			n++
		}
	}
	return n
}

// times returns one of the times of all recoveries that were measured, sorted.
func (r *result) times(which func(recovery) float64) (all []float64) {
	for _, one := range r.Recoveries {
		if !one.Interrupted {
			all = append(all, which(one))
		}
	}
	slices.Sort(all)
	return all
}

// quantile of sorted values: the smallest that the share q does not exceed.
func quantile(sorted []float64, q float64) float64 {
	if len(sorted) == 0 {
		return math.NaN()
	}
	return sorted[max(0, int(math.Ceil(q*float64(len(sorted))))-1)]
}

var stages = []struct {
	name string
	of   func(recovery) float64
}{
	{"CRI lists every pod as it was", func(r recovery) float64 { return r.Listed }},
	{"every guest's agent answers", func(r recovery) float64 { return r.Agents }},
	{"`kubectl exec` succeeds", func(r recovery) float64 { return r.Exec }},
	{"the node's lease is renewed", func(r recovery) float64 { return r.Node }},
	{"**all of these**", func(r recovery) float64 { return r.Back }},
}

func (r *result) summary() string {
	back := r.times(stages[len(stages)-1].of)
	return fmt.Sprintf("%d kills, %d pods, %d others made and deleted: %d restarts, %d Ready flips, %d orphans, %d wrong logs, %d other pods that went wrong; back after %.2f s (median), %.2f s (p99), %.2f s (most of %d); seed %d",
		r.Kills, r.Pods, r.Churned, r.count("restart"), r.count("flip"), r.count("orphan"), r.count("log"), r.count("churn"),
		quantile(back, 0.5), quantile(back, 0.99), quantile(back, 1), len(back), r.Seed)
}

// verdict is an error that names every violation, nil when there is none.
func (r *result) verdict() error {
	var errs []error
	if r.Kills < r.Asked {
		errs = append(errs, fmt.Errorf("there was time for %d of %d kills: this machine is too busy", r.Kills, r.Asked))
	}
	for _, v := range r.Violations {
		errs = append(errs, fmt.Errorf("%s: after kill %d: %s", v.Kind, v.Kills, v.Message))
	}
	return errors.Join(errs...)
}

func (r *result) writeJSON(file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

func readResult(file string) (*result, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &result{}
	return r, json.Unmarshal(text, r)
}

const tableHead = `# Pods do not notice what happens to the node agent

Written by ` + "`make crash`" + `: an isolated cluster with pods that run, with and without
probes, sidecars and volumes, each writing a numbered log; others are made,
used and deleted all the while. spherelet gets SIGKILL at random instants and is
started again half a second later, as systemd does it. One kill in five does
not wait until all is back after the one before, but hits the start itself.

`

// writeTable writes the result for people.
func (r *result) writeTable(file string) error {
	var b strings.Builder
	b.WriteString(tableHead)
	row := func(what string, value any) { fmt.Fprintf(&b, "| %s | %v |\n", what, value) }
	b.WriteString("| | |\n|---|---|\n")
	row("kills", fmt.Sprintf("%d of %d", r.Kills, r.Asked))
	row("pods that must not notice", r.Pods)
	row("other pods, made and deleted meanwhile", r.Churned)
	row("restarts: of VMs, containers, `restartCount`", r.count("restart"))
	row("flips: of a pod's conditions or phase, of the node's conditions", r.count("flip"))
	row("changes of pods and nodes that were looked at", r.Events)
	row("pods whose log has a gap, a repeat or a wrong order", r.count("log"))
	row("log lines that were compared", r.LogLines)
	row("orphans: VMs, taps, disks, directories", r.count("orphan"))
	row("other pods that did not become what they should", r.count("churn"))
	row("containers of other pods that were started twice", r.ChurnRestarts)
	row("seed", r.Seed)
	row("accelerator", r.Accelerator)
	row("CPUs, and median load average", fmt.Sprintf("%d, %.1f", r.CPUs, quantile(r.times(func(r recovery) float64 { return r.Load }), 0.5)))
	row("duration", (time.Duration(r.KillSeconds) * time.Second).String())
	fmt.Fprintf(&b, "\nSeconds from the kill, half a second of which nothing runs; %d of %d kills, the\nothers were followed by the next before all was back. All must be back within %g s;\n%d times it was not.\n\n", len(r.times(stages[0].of)), r.Kills, r.Within, r.count("slow"))
	b.WriteString("| until | median | p99 | most |\n|---|---|---|---|\n")
	for _, s := range stages {
		all := r.times(s.of)
		fmt.Fprintf(&b, "| %s | %.2f | %.2f | %.2f |\n", s.name, quantile(all, 0.5), quantile(all, 0.99), quantile(all, 1))
	}
	if len(r.Violations) > r.count("slow") {
		b.WriteString("\n## What was noticed\n\n")
		for _, v := range r.Violations {
			if v.Kind == "slow" {
				continue // the table has the times
			}
			fmt.Fprintf(&b, "- %s, after kill %d: %s\n", v.Kind, v.Kills, strings.Join(strings.Fields(v.Message), " "))
		}
	}
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
