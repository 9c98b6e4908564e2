package main

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// A spec is one test of the suite and what became of it.
type spec struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
	// Reason is why it failed, was skipped by the suite, or is excluded.
	Reason string `json:"reason,omitempty"`
}

// A result is what a run came to.
type result struct {
	Passed   []spec  `json:"passed"`
	Failed   []spec  `json:"failed"`
	Skipped  []spec  `json:"skipped"`
	Excluded []spec  `json:"excluded"`
	Seconds  float64 `json:"seconds"`
}

// ginkgoReport is what we read of Ginkgo's JSON report.
type ginkgoReport []struct {
	SpecReports []struct {
		ContainerHierarchyTexts []string
		LeafNodeType            string
		LeafNodeText            string
		State                   string
		RunTime                 time.Duration
		Failure                 struct {
			Message  string
			Location struct {
				FileName   string
				LineNumber int
			}
		}
	}
}

func judge(file string, took time.Duration) (*result, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var reports ginkgoReport
	if err := json.Unmarshal(text, &reports); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	r := &result{Seconds: took.Seconds(), Passed: []spec{}, Failed: []spec{}, Skipped: []spec{}, Excluded: []spec{}}
	for _, report := range reports {
		for _, s := range report.SpecReports {
			one := spec{Name: strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " "), Seconds: s.RunTime.Round(time.Millisecond).Seconds(), Reason: oneLine(s.Failure.Message)}
			switch {
			case s.State == "passed" && s.LeafNodeType != "It": // BeforeSuite and the like
			case strings.Contains(one.Name, "benchmark"):
			case s.State == "passed":
				r.Passed = append(r.Passed, one)
			case s.State != "skipped":
				one.Reason = fmt.Sprintf("%s (%s:%d)", one.Reason, base(s.Failure.Location.FileName), s.Failure.Location.LineNumber)
				r.Failed = append(r.Failed, one)
			case excludedBecause(one.Name) != "":
				one.Reason = excludedBecause(one.Name)
				r.Excluded = append(r.Excluded, one)
			case one.Reason != "": // else the focus left it out
				r.Skipped = append(r.Skipped, one)
			}
		}
	}
	for _, list := range [][]spec{r.Passed, r.Failed, r.Skipped, r.Excluded} {
		slices.SortFunc(list, func(a, b spec) int { return strings.Compare(a.Name, b.Name) })
	}
	return r, nil
}

func base(path string) string { return path[strings.LastIndex(path, "/")+1:] }

// oneLine makes of a failure's text one line of at most 300 bytes.
func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "…"
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

func (r *result) summary() string {
	var b strings.Builder
	for _, s := range r.Failed {
		fmt.Fprintf(&b, "FAILED: %s: %s\n", s.Name, s.Reason)
	}
	fmt.Fprintf(&b, "%d passed, %d failed, %d skipped, %d excluded in %.0f s", len(r.Passed), len(r.Failed), len(r.Skipped), len(r.Excluded), r.Seconds)
	return b.String()
}

func (r *result) writeJSON(file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// containerd is what containerd 2.4.2 with runc 1.5.2 does on this kind of
// machine.
const containerd = "| containerd 2.4.2 + runc 1.5.2 | 108 | 0 | 9 | 0 | 85 s |"

const tableHead = `# The CRI, judged by its own test suite

Written by ` + "`make critest`" + `: critest v1.36.0 against ` + "`spherelet cri`" + `, without a
kubelet, in a network namespace without a way out. Its images are built from
source and served from a local registry under their public names.

| | passed | failed | skipped | excluded | time |
|---|---|---|---|---|---|
`

// writeTable writes the results for people.
func (r *result) writeTable(file string) error {
	var b strings.Builder
	b.WriteString(tableHead)
	fmt.Fprintf(&b, "| Atoll, emulated (TCG) | %d | %d | %d | %d | %.0f s |\n%s\n", len(r.Passed), len(r.Failed), len(r.Skipped), len(r.Excluded), r.Seconds, containerd)
	section := func(title, text string, specs []spec, column string) {
		if len(specs) == 0 {
			return
		}
		fmt.Fprintf(&b, "\n## %s\n\n%s\n\n| Spec | %s |\n|---|---|\n", title, text, column)
		for _, s := range specs {
			fmt.Fprintf(&b, "| %s | %s |\n", cell(s.Name), cell(s.Reason))
		}
	}
	section("Excluded", "What presumes that host and pod share one kernel or its file systems. The list is `e2e/critest/exclusions.go`.", r.Excluded, "Reason")
	section("Failed", "What does not work yet.", r.Failed, "What the suite says")
	section("Skipped", "What the suite itself skips, as it finds no support for it on this machine.", r.Skipped, "What the suite says")
	b.WriteString("\n## Passed\n\n| Spec | s |\n|---|---|\n")
	for _, s := range r.Passed {
		fmt.Fprintf(&b, "| %s | %.1f |\n", cell(s.Name), s.Seconds)
	}
	return os.WriteFile(file, []byte(b.String()), 0o644)
}

func cell(s string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;").Replace(strings.TrimPrefix(s, "[k8s.io] "))
}
