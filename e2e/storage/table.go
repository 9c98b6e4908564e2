package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

const tableHead = `# Volumes, judged by upstream's external storage suite

Written by ` + "`make e2e-storage`" + `: the suite that is ` + "`e2e.test -storage.testdriver=FILE`" + ` in
Kubernetes v1.36.3, on ` + "`csi.atoll.dev`" + ` in a cluster that ` + "`atoll up --isolated`" + ` brings
up: one node, pods in emulated guests (TCG), default class. What the suite is told of
the driver is ` + "`e2e/storage/driver.yaml`" + `. Its images are built from source and served on
loopback: busybox is Debian's; agnhost is upstream's; of nginx and glibc-dns-testing the
specs run the shell alone, so those two are busybox as well. The
datastore is in the system's directory for temporary files; on ext4, whose files share
no blocks, volumes that pods write to are copied by their VMs.

`

// writeTable writes the results for people.
func (r *results) writeTable(path string) error {
	var b strings.Builder
	b.WriteString(tableHead)
	fmt.Fprintf(&b, "| passed | failed | skipped by the suite | excluded | not run | time |\n|---|---|---|---|---|---|\n| %d | %d | %d | %d | %d | %.0f min |\n",
		len(r.of(passed)), len(r.of(failed)), len(r.of(skip)), len(r.of(excluded)), len(r.of(notRun)), r.Seconds/60)
	why := func(list []explanation) func(spec) string {
		return func(s spec) string { return explain(list, s.Name, s.Reason) }
	}
	says := func(s spec) string { return s.Reason }
	section(&b, "Failed", "What does not work, or not as the suite wants it.", r.of(failed), column{"What the suite says", says}, column{"Why", why(failures)})
	section(&b, "Excluded", "What cannot pass where a pod is a virtual machine, or needs programs that are not built here. The list is `e2e/storage/exclusions.go`.", r.of(excluded), column{"Reason", says})
	section(&b, "Passed", "", r.of(passed), column{"s", nil})
	section(&b, "Not run", "What had no time in the runs so far: `make e2e-storage CONTINUE=1` adds it.", r.of(notRun))
	section(&b, "Skipped", "What the suite itself skips, by what it is told of the driver and finds in the cluster.", r.of(skip), column{"What the suite says", says}, column{"Why", why(skips)})
	return os.WriteFile(path, []byte(b.String()), 0o644)
}

// A column of a table; without a function it is the time of a row's specs.
type column struct {
	title string
	of    func(spec) string
}

// A row is one test: specs that differ in their pattern alone, and of which
// there is the same to say.
type row struct {
	test     string
	patterns []string
	cells    []string
	seconds  float64
}

var pattern = regexp.MustCompile(`^\[Testpattern: (.*?)\] ?(.*)$`)

// section writes the specs of one state, those with the same cells together.
func section(b *strings.Builder, title, text string, specs []spec, columns ...column) {
	if len(specs) == 0 {
		return
	}
	fmt.Fprintf(b, "\n## %s (%d)\n\n", title, len(specs))
	if text != "" {
		b.WriteString(text + "\n\n")
	}
	b.WriteString("| Test | Patterns |")
	for _, c := range columns {
		b.WriteString(" " + c.title + " |")
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", len(columns)) + "\n")
	for _, r := range rows(specs, columns) {
		fmt.Fprintf(b, "| %s | %s |", cell(r.test), cell(strings.Join(r.patterns, "; ")))
		for i, c := range columns {
			if c.of == nil {
				fmt.Fprintf(b, " %.0f |", r.seconds)
				continue
			}
			fmt.Fprintf(b, " %s |", cell(r.cells[i]))
		}
		b.WriteString("\n")
	}
}

func rows(specs []spec, columns []column) []*row {
	var list []*row
	for _, s := range specs {
		r := &row{test: s.Name}
		if m := pattern.FindStringSubmatch(s.Name); m != nil {
			r.test, r.patterns = m[2], []string{m[1]}
		}
		for _, c := range columns {
			text := ""
			if c.of != nil {
				text = c.of(s)
			}
			r.cells = append(r.cells, text)
		}
		i := slices.IndexFunc(list, func(o *row) bool { return o.test == r.test && slices.Equal(o.cells, r.cells) })
		if i < 0 {
			list, i = append(list, r), len(list)
		} else {
			list[i].patterns = append(list[i].patterns, r.patterns...)
		}
		list[i].seconds += s.Seconds
	}
	slices.SortStableFunc(list, func(a, b *row) int { return strings.Compare(a.test, b.test) })
	return list
}

func cell(s string) string {
	return strings.NewReplacer("|", `\|`, "<", "&lt;").Replace(s)
}
