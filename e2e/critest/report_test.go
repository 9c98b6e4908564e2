package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestJudge(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "report.json")
	it := func(name, state, message string) string {
		return `{"ContainerHierarchyTexts":["[k8s.io] Streaming","runtime"],"LeafNodeType":"It","LeafNodeText":"` + name + `","State":"` + state +
			`","RunTime":1500000000,"Failure":{"Message":"` + message + `","Location":{"FileName":"/a/b.go","LineNumber":7}}}`
	}
	text := `[{"SpecReports":[` + strings.Join([]string{
		`{"LeafNodeType":"BeforeSuite","State":"passed"}`,
		it("works", "passed", ""), it("does not", "failed", "Expected\\n  this"), it("panics", "panicked", "oh"),
		it("says why", "skipped", "no such thing"), it("out of focus", "skipped", ""),
		it("runtime should support portforward in host network", "skipped", ""), it("benchmark about it", "skipped", ""),
	}, ",") + `]}]`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := judge(file, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := r.summary(), "1 passed, 2 failed, 1 skipped, 1 excluded in 60 s"; !strings.HasSuffix(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if r.Passed[0].Seconds != 1.5 || r.Failed[0].Reason != "Expected this (b.go:7)" {
		t.Errorf("%+v", r)
	}
	table := filepath.Join(dir, "table.md")
	if err := r.writeTable(table); err != nil {
		t.Fatal(err)
	}
	md, err := os.ReadFile(table)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| 1 | 2 | 1 | 1 | 60 s |", "Streaming runtime does not | Expected this", "its own kernel"} {
		if !strings.Contains(string(md), want) {
			t.Errorf("the table lacks %q:\n%s", want, md)
		}
	}
}
