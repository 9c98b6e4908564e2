package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// suiteName begins the name of every spec.
const suiteName = "External Storage [Driver: csi.atoll.dev] "

// What can have become of a spec.
const (
	passed   = "passed"
	failed   = "failed"
	skip     = "skipped"  // by the suite
	excluded = "excluded" // by exclusions.go
	notRun   = "not run"
)

// A spec is one test of the suite and what became of it.
type spec struct {
	Name    string  `json:"name"` // without suiteName
	State   string  `json:"state"`
	Seconds float64 `json:"seconds,omitempty"`
	// Reason is what the suite says of a failure or a skip, or the exclusion's.
	Reason string `json:"reason,omitempty"`
	// Date is that of the run.
	Date string `json:"date,omitempty"`
}

// settled: another run would find the same.
func (s spec) settled() bool {
	return s.State == passed || s.State == skip || s.State == failed && explain(failures, s.Name, s.Reason) != ""
}

// results are those of all runs so far.
type results struct {
	Specs []spec `json:"specs"`
	// Seconds that the suite took, all runs together.
	Seconds float64 `json:"seconds"`
}

// ginkgoReport is what we read of Ginkgo's JSON report.
type ginkgoReport []struct {
	SpecReports []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   string
		RunTime                 time.Duration
		StartTime               time.Time
		Failure                 struct {
			Message  string
			Location struct {
				FileName   string
				LineNumber int
			}
		}
	}
}

func judge(path string) (*results, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var reports ginkgoReport
	if err := json.Unmarshal(text, &reports); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r := &results{Specs: []spec{}}
	for _, report := range reports {
		for _, s := range report.SpecReports {
			if s.LeafNodeType != "It" {
				if s.State == "failed" {
					return nil, fmt.Errorf("%s of the suite failed: %s", s.LeafNodeType, oneLine(s.Failure.Message))
				}
				continue
			}
			// As Ginkgo itself names it, which -continue leaves out by name: some
			// containers have no text.
			texts := slices.DeleteFunc(append(s.ContainerHierarchyTexts, s.LeafNodeText), func(text string) bool { return text == "" })
			name := strings.Join(texts, " ")
			if !strings.HasPrefix(name, suiteName) {
				continue // of another suite that is linked in
			}
			one := spec{Name: short(name), Reason: oneLine(s.Failure.Message)}
			if !s.StartTime.IsZero() {
				one.Date, one.Seconds = s.StartTime.UTC().Format(time.DateOnly), s.RunTime.Round(100*time.Millisecond).Seconds()
			}
			switch why := excludedBecause(one.Name); {
			case s.State == "passed":
				one.State = passed
			case s.State == "failed" || s.State == "panicked":
				one.State = failed
				one.Reason += fmt.Sprintf(" (%s:%d)", s.Failure.Location.FileName[strings.LastIndex(s.Failure.Location.FileName, "/")+1:], s.Failure.Location.LineNumber)
			case s.State == "skipped" && one.Reason != "":
				one.State = skip
			case why != "":
				one.State, one.Reason = excluded, why
			default: // left out by the focus, or the suite's time was over
				one = spec{Name: one.Name, State: notRun}
			}
			r.Specs = append(r.Specs, one)
		}
	}
	slices.SortFunc(r.Specs, func(a, b spec) int { return strings.Compare(a.Name, b.Name) })
	return r, nil
}

// short is a spec's name without what all of them begin with.
func short(name string) string { return strings.TrimPrefix(strings.TrimSpace(name), suiteName) }

// oneLine makes of a failure's text one line of at most 400 bytes.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 400 {
		s = strings.ToValidUTF8(s[:400], "") + "…"
	}
	return s
}

func excludedBecause(name string) string {
	for _, e := range exclusions {
		if regexp.MustCompile(e.spec).MatchString(name) {
			return e.reason
		}
	}
	return ""
}

// merge adds a run's results to those of the runs before it; specs that the
// suite no longer has are left out.
func merge(before, now *results) *results {
	had := map[string]spec{}
	for _, s := range before.Specs {
		had[s.Name] = s
	}
	r := &results{Seconds: before.Seconds + now.Seconds}
	for _, s := range now.Specs {
		if old, ok := had[s.Name]; ok && s.State == notRun {
			s = old
		}
		r.Specs = append(r.Specs, s)
	}
	return r
}

// of returns the specs of a state.
func (r *results) of(state string) []spec {
	return slices.DeleteFunc(slices.Clone(r.Specs), func(s spec) bool { return s.State != state })
}

// unexplained counts the failures that known.go does not have.
func (r *results) unexplained() int {
	return len(slices.DeleteFunc(r.of(failed), spec.settled))
}

func (r *results) summary() string {
	var b strings.Builder
	for _, s := range r.of(failed) {
		if !s.settled() {
			fmt.Fprintf(&b, "FAILED: %s: %s\n", s.Name, s.Reason)
		}
	}
	fmt.Fprintf(&b, "%d passed, %d failed (%d of them not explained), %d skipped, %d excluded, %d not run",
		len(r.of(passed)), len(r.of(failed)), r.unexplained(), len(r.of(skip)), len(r.of(excluded)), len(r.of(notRun)))
	return b.String()
}

func readResults(path string) (*results, error) {
	r := &results{}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (r *results) writeJSON(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
