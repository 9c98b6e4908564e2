package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A result is one figure, as build/bench.json has it.
type result struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	N      int     `json:"n"`
	Median float64 `json:"median"`
	P90    float64 `json:"p90"`
	P99    float64 `json:"p99"`
	// Guest is the median of what of it was waiting for the guest, where that
	// is known; in Unit.
	Guest float64 `json:"guest,omitempty"`
	// Allocs and Bytes are what the runtime allocates for one, where that is
	// counted.
	Allocs float64 `json:"allocs,omitempty"`
	Bytes  float64 `json:"bytes,omitempty"`
	// Beside is what something else took for the same, as text.
	Beside string `json:"beside,omitempty"`
	// Ratio of the median to the median of the figure named by Of, if any.
	Ratio float64 `json:"ratio,omitempty"`
	Of    string  `json:"of,omitempty"`
	// Reach is the promise as text, OK whether it was kept; without a promise
	// Reach is empty and OK true.
	Reach string `json:"reach,omitempty"`
	OK    bool   `json:"ok"`
	// Samples are sorted, with four digits: what a later run is compared with.
	Samples []float64 `json:"samples,omitempty"`
}

type results []result

// add records samples and returns their median.
func (rs *results) add(name, unit string, samples []float64) *result {
	s := slices.Sorted(slices.Values(samples))
	*rs = append(*rs, result{Name: name, Unit: unit, N: len(s), Median: quantile(s, 0.5), P90: quantile(s, 0.9), P99: quantile(s, 0.99), OK: true, Samples: fourDigits(s)})
	r := &(*rs)[len(*rs)-1]
	say("%s: median %.2f %s, p90 %.2f, p99 %.2f, n=%d", name, r.Median, unit, r.P90, r.P99, r.N)
	return r
}

func fourDigits(samples []float64) []float64 {
	out := make([]float64, len(samples))
	for i, v := range samples {
		out[i], _ = strconv.ParseFloat(strconv.FormatFloat(v, 'g', 4, 64), 64)
	}
	return out
}

// find returns a figure by name; nil if there is none.
func (rs results) find(name string) *result {
	for i := range rs {
		if rs[i].Name == name {
			return &rs[i]
		}
	}
	return nil
}

// quantile of sorted samples, by linear interpolation between ranks.
func quantile(s []float64, q float64) float64 {
	if len(s) == 0 {
		return math.NaN()
	}
	at := q * float64(len(s)-1)
	i := int(at)
	if i+1 == len(s) {
		return s[i]
	}
	return s[i] + (at-float64(i))*(s[i+1]-s[i])
}

// median of samples in any order; 0 of none.
func median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	return quantile(slices.Sorted(slices.Values(samples)), 0.5)
}

// to sets the ratio to another figure and, if most > 0, its promise.
func (r *result) to(rs results, of string, most float64) {
	if o := rs.find(of); o != nil && o.Median != 0 {
		r.Of, r.Ratio = of, r.Median/o.Median
	}
	if most > 0 {
		r.Reach, r.OK = fmt.Sprintf("<= %g x %s", most, of), r.Of != "" && r.Ratio <= most
	}
}

// most sets a promise on the median.
func (r *result) most(limit float64) {
	r.Reach, r.OK = fmt.Sprintf("<= %g %s", limit, r.Unit), r.Median <= limit
}

// least sets a promise on the median that is kept from that on.
func (r *result) least(limit float64) {
	r.Reach, r.OK = fmt.Sprintf(">= %g %s", limit, r.Unit), r.Median >= limit
}

// also adds a promise; text says what it is.
func (r *result) also(text string, kept bool) {
	if r.Reach != "" {
		text = r.Reach + ", " + text
	}
	r.Reach, r.OK = text, r.OK && kept
}

// table prints the figures for people.
func (rs results) table(w io.Writer) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "FIGURE\tMEDIAN\tP90\tP99\tN\tRATIO\tREACH\tKEPT\tNOTES")
	for _, r := range rs {
		ratio, kept := "", ""
		if r.Of != "" {
			ratio = fmt.Sprintf("%.2f x %s", r.Ratio, r.Of)
		}
		if r.Reach != "" {
			kept = map[bool]string{true: "yes", false: "NO"}[r.OK]
		}
		fmt.Fprintf(tw, "%s\t%.4g %s\t%.4g\t%.4g\t%d\t%s\t%s\t%s\t%s\n", r.Name, r.Median, r.Unit, r.P90, r.P99, r.N, ratio, r.Reach, kept, r.notes())
	}
	tw.Flush()
	// The same as Go benchmark lines, for benchstat.
	fmt.Fprintln(w)
	for _, r := range rs {
		fmt.Fprintf(w, "Benchmark/%s 1 %g %s\n", r.Name, r.Median, r.Unit)
	}
}

// notes is what else is known of a figure.
func (r result) notes() string {
	var notes []string
	if r.Guest > 0 {
		notes = append(notes, fmt.Sprintf("%.4g %s of it in the guest", r.Guest, r.Unit))
	}
	if r.Allocs > 0 {
		notes = append(notes, fmt.Sprintf("%.0f allocations, %.0f kB", r.Allocs, r.Bytes/1e3))
	}
	if r.Beside != "" {
		notes = append(notes, r.Beside)
	}
	return strings.Join(notes, "; ")
}

// writeJSON writes a file, and its directory if need be.
func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
