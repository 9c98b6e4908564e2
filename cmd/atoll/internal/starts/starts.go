// Package starts shows where the time of pods' last starts went, as their
// nodes have written it to them.
package starts

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A Start is a pod's latest start.
type Start struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Node      string `json:"node"`
	v1alpha1.PodStart
}

// Of reads a Pod's annotation; false if it has none that can be read.
func Of(pod *corev1.Pod) (Start, bool) {
	s := Start{Namespace: pod.Namespace, Pod: pod.Name, Node: pod.Spec.NodeName}
	err := json.Unmarshal([]byte(pod.Annotations[v1alpha1.StartAnnotation]), &s.PodStart)
	return s, err == nil && s.Total >= 0 && !s.Begun.IsZero()
}

// Last returns the n starts that ended last, the latest first; all if n is not
// above 0.
func Last(all []Start, n int) []Start {
	sorted := slices.Clone(all)
	slices.SortFunc(sorted, func(a, b Start) int {
		return cmp.Or(b.ended().Compare(a.ended()), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod))
	})
	if n > 0 && len(sorted) > n {
		sorted = sorted[:n]
	}
	return sorted
}

func (s Start) ended() time.Time { return s.Begun.Add(time.Duration(s.Total) * time.Millisecond) }

// took is the time for which a phase was under way, in ms; -1 if it was not.
func (s Start) took(phase string) int64 {
	sum := int64(-1)
	for _, p := range s.Phases {
		if p.Name == phase {
			sum = max(sum, 0) + p.Took
		}
	}
	return sum
}

// letters of the phases, in the order in which they begin.
var letters = []struct {
	phase  string
	letter rune
}{
	{"queue", 'q'}, {"network", 'n'}, {"image", 'i'}, {"vm", 'v'}, {"agent", 'a'}, {"container", 'c'},
}

// A Style says for what a table is made.
type Style struct {
	// Width is that of the terminal, in characters.
	Width int
	// ASCII keeps to that.
	ASCII bool
	// Namespaces shows those of the pods.
	Namespaces bool
}

func (s Style) nothing() rune {
	if s.ASCII {
		return '.'
	}
	return '·'
}

func (s Style) edge() string {
	if s.ASCII {
		return "|"
	}
	return "│"
}

// Widths of bars, in characters, without their edges. Figures of the phases
// are shown where they leave room for a bar that can be read.
const (
	minBar, maxBar  = 10, 80
	barWithFigures  = 30
	gap             = 2
	figuresPerPhase = 9 + gap
)

// Table writes starts as a table with a bar for each.
func Table(w io.Writer, starts []Start, style Style) error {
	fixed := gap + 2 // the bar's own gap and its edges
	columns := []func(Start) string{func(s Start) string { return s.Pod }, func(s Start) string { return s.Node }, func(s Start) string { return fmt.Sprint(s.Total) }}
	names := []string{"POD", "NODE", "MS"}
	if style.Namespaces {
		columns = append([]func(Start) string{func(s Start) string { return s.Namespace }}, columns...)
		names = append([]string{"NAMESPACE"}, names...)
	}
	for i, name := range names {
		width := len(name)
		for _, s := range starts {
			width = max(width, len(columns[i](s)))
		}
		fixed += width + gap
	}
	if all := len(letters) * figuresPerPhase; style.Width-fixed-all >= barWithFigures {
		fixed += all
		for _, l := range letters {
			names = append(names, strings.ToUpper(l.phase))
			columns = append(columns, func(s Start) string { return figure(s.took(l.phase)) })
		}
	}
	width := min(max(style.Width-fixed, minBar), maxBar)
	t := tabwriter.NewWriter(w, 0, 0, gap, ' ', 0)
	fmt.Fprintf(t, "%s\tPHASES\n", strings.Join(names, "\t"))
	for _, s := range starts {
		for _, column := range columns {
			fmt.Fprintf(t, "%s\t", column(s))
		}
		fmt.Fprintf(t, "%s%s%s\n", style.edge(), Bar(s.PodStart, width, style.nothing()), style.edge())
	}
	if err := t.Flush(); err != nil {
		return err
	}
	var legend []string
	for _, l := range letters {
		legend = append(legend, fmt.Sprintf("%c %s", l.letter, l.phase))
	}
	_, err := fmt.Fprintf(w, "\nEach bar is the whole of its start: %s, %c none of these\n", strings.Join(legend, ", "), style.nothing())
	return err
}

func figure(ms int64) string {
	if ms < 0 {
		return "-"
	}
	return fmt.Sprint(ms)
}

// Bar draws a start as so many letters: in each place that of the phase which
// took most of that stretch, the later one of two; nothing where there was
// none.
func Bar(s v1alpha1.PodStart, width int, nothing rune) string {
	bar := slices.Repeat([]rune{nothing}, width)
	for i := range bar {
		// In units of Total / width, so that nothing is rounded.
		from, to := int64(i)*s.Total, int64(i+1)*s.Total
		most := int64(0)
		for _, l := range letters {
			sum := int64(0)
			for _, p := range s.Phases {
				if p.Name == l.phase {
					sum += max(0, min(to, (p.From+p.Took)*int64(width))-max(from, p.From*int64(width)))
				}
			}
			if sum > 0 && sum >= most {
				most, bar[i] = sum, l.letter
			}
		}
	}
	return string(bar)
}
