package main

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// What a change must be over to count, as a share of what was before. Between
// two runs of the same code on one machine, medians of ratios taken within a
// run differ by up to 8 %, those of times by what else the machine does.
const (
	ratioNoise = 0.15
	plainNoise = 0.30
	// surePoint is the chance that samples of the same kind differ so by luck,
	// from which on a change is believed.
	surePoint = 0.01
	// fewSamples are too few for statistics: their change must be over twice
	// the noise.
	fewSamples = 5
)

// yardstick is the figure by which times of different runs are made
// comparable: how fast this machine boots a guest with what else it does.
const yardstick = "raw_boot"

// A verdict on one figure.
type verdict string

const (
	same     verdict = "same"
	better   verdict = "better"
	worse    verdict = "WORSE"
	brokenBy verdict = "BROKEN" // the promise was kept, and is not any more
	mended   verdict = "mended"
	onlyNow  verdict = "new"
	gone     verdict = "gone"
)

// A change is what became of a figure from one run to another.
type change struct {
	name     string
	old, new *result
	// by is the change as a share, positive for more; NaN if it has none.
	by      float64
	in      string // what was compared: the unit, or "x <figure>"
	p       float64
	verdict verdict
}

// compare judges the figures of a run by those of an older one. Figures that
// have a base in their run are compared as ratios to that, other times as
// ratios to the yardstick.
func compare(old, now results) []change {
	var out []change
	for i := range now {
		n := &now[i]
		o := old.find(n.Name)
		if o == nil {
			out = append(out, change{name: n.Name, new: n, by: math.NaN(), in: n.Unit, verdict: onlyNow})
			continue
		}
		out = append(out, judge(old, now, o, n))
	}
	for i := range old {
		if now.find(old[i].Name) == nil {
			out = append(out, change{name: old[i].Name, old: &old[i], by: math.NaN(), in: old[i].Unit, verdict: gone})
		}
	}
	return out
}

func judge(old, now results, o, n *result) change {
	c := change{name: n.Name, old: o, new: n, in: n.Unit, p: 1, verdict: same}
	noise := ratioNoise
	if loadTells(n.Unit) {
		noise = plainNoise
	}
	oldBy, newBy := 1.0, 1.0
	if base := baseOf(n); base != "" && base != n.Name && sameBase(o, n, base) {
		if ob, nb := old.find(base), now.find(base); ob != nil && nb != nil && ob.Median > 0 && nb.Median > 0 {
			oldBy, newBy, noise, c.in = ob.Median, nb.Median, ratioNoise, "x "+base
		}
	}
	before, after := o.Median/oldBy, n.Median/newBy
	switch {
	case before == 0 && after == 0:
		c.by = 0
	case before == 0:
		c.by = math.Inf(1)
	default:
		c.by = after/before - 1
	}
	sure := math.Abs(c.by) > 2*noise
	if len(o.Samples) >= fewSamples && len(n.Samples) >= fewSamples {
		c.p = mannWhitney(scaled(o.Samples, oldBy), scaled(n.Samples, newBy))
		sure = c.p < surePoint && math.Abs(c.by) > noise
	}
	switch up := c.by > 0; {
	case o.Reach != "" && o.Reach == n.Reach && o.OK && !n.OK:
		c.verdict = brokenBy
	case sure && up == n.higherIsBetter():
		c.verdict = better
	case sure:
		c.verdict = worse
	case o.Reach != "" && o.Reach == n.Reach && !o.OK && n.OK:
		c.verdict = mended
	}
	return c
}

// baseOf is what a figure is a ratio to, or may be made one.
func baseOf(r *result) string {
	if r.Of != "" {
		return r.Of
	}
	if r.Unit == "ms" {
		return yardstick
	}
	return ""
}

// sameBase says that both runs have the figure to the same base, or none.
func sameBase(o, n *result, base string) bool {
	return o.Of == n.Of && baseOf(o) == base
}

// loadTells says of a unit that what else the machine does changes its figures.
func loadTells(unit string) bool {
	return unit == "ms" || strings.Contains(unit, "/") || strings.HasPrefix(unit, "%")
}

func (r *result) higherIsBetter() bool {
	return strings.HasSuffix(r.Unit, "/s") || strings.HasPrefix(r.Reach, ">=")
}

func scaled(samples []float64, by float64) []float64 {
	out := make([]float64, len(samples))
	for i, s := range samples {
		out[i] = s / by
	}
	return out
}

// mannWhitney is the chance that two sets of samples of the same kind differ
// in rank as much as these, by the normal approximation of the U test with
// correction for ties (which is fair from some five samples on).
func mannWhitney(a, b []float64) float64 {
	type ranked struct {
		v     float64
		first bool
	}
	all := make([]ranked, 0, len(a)+len(b))
	for _, v := range a {
		all = append(all, ranked{v, true})
	}
	for _, v := range b {
		all = append(all, ranked{v, false})
	}
	slices.SortFunc(all, func(x, y ranked) int { return cmp.Compare(x.v, y.v) })
	n := float64(len(all))
	var rankSum, ties float64
	for i := 0; i < len(all); {
		j := i
		for j < len(all) && all[j].v == all[i].v {
			j++
		}
		rank, t := float64(i+j+1)/2, float64(j-i)
		ties += t*t*t - t
		for ; i < j; i++ {
			if all[i].first {
				rankSum += rank
			}
		}
	}
	na, nb := float64(len(a)), float64(len(b))
	u := rankSum - na*(na+1)/2
	deviation := math.Sqrt(na * nb / 12 * (n + 1 - ties/(n*(n-1))))
	if deviation == 0 {
		return 1
	}
	z := max(math.Abs(u-na*nb/2)-0.5, 0) / deviation
	return math.Erfc(z / math.Sqrt2)
}

// printChanges prints a table and returns the names of what got worse.
func printChanges(w io.Writer, changes []change) (regressions []string) {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "FIGURE\tBEFORE\tNOW\tCHANGE\tIN\tP\tVERDICT")
	for _, c := range changes {
		side := func(r *result) string {
			if r == nil {
				return "-"
			}
			s := fmt.Sprintf("%.4g %s", r.Median, r.Unit)
			if r.Of != "" {
				s += fmt.Sprintf(" (%.2f x)", r.Ratio)
			}
			return s
		}
		by, p := "", ""
		if !math.IsNaN(c.by) {
			by = fmt.Sprintf("%+.1f %%", c.by*100)
		}
		if c.p > 0 && c.p < 1 {
			p = fmt.Sprintf("%.3f", c.p)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", c.name, side(c.old), side(c.new), by, c.in, p, c.verdict)
		if c.verdict == worse || c.verdict == brokenBy {
			regressions = append(regressions, c.name)
		}
	}
	tw.Flush()
	return regressions
}
