package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// report writes a report as Ginkgo does, of specs NAME STATE MESSAGE.
func report(t *testing.T, specs ...[3]string) string {
	t.Helper()
	items := []string{`{"LeafNodeType":"SynchronizedBeforeSuite","State":"passed"}`,
		`{"ContainerHierarchyTexts":["[sig-node] Pods"],"LeafNodeType":"It","LeafNodeText":"are of another suite","State":"passed"}`}
	for _, s := range specs {
		items = append(items, `{"ContainerHierarchyTexts":["External Storage [Driver: csi.atoll.dev]",""],"LeafNodeType":"It","LeafNodeText":"`+s[0]+
			`","State":"`+s[1]+`","RunTime":1500000000,"StartTime":"2026-01-02T03:04:05Z","Failure":{"Message":"`+s[2]+`","Location":{"FileName":"/a/b.go","LineNumber":7}}}`)
	}
	path := filepath.Join(t.TempDir(), "report.json")
	if err := os.WriteFile(path, []byte(`[{"SpecReports":[`+strings.Join(items, ",")+`]}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func judged(t *testing.T, specs ...[3]string) *results {
	t.Helper()
	r, err := judge(report(t, specs...))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

const (
	unmount = "[Testpattern: Dynamic PV (block volmode)] volumeMode should not mount / map unused volumes in a pod [LinuxOnly]"
	known   = "[Testpattern: Dynamic PV (default fs)] volume-odd should be as it is elsewhere"
)

// knowOne explains one failure.
func knowOne(t *testing.T) {
	before := failures
	t.Cleanup(func() { failures = before })
	failures = []explanation{{`odd failure`, `volume-odd`, "A pod is a VM."}}
}

func TestJudge(t *testing.T) {
	knowOne(t)
	r := judged(t, [3]string{"[Testpattern: A] works", "passed", ""}, [3]string{"[Testpattern: B] works", "passed", ""},
		[3]string{"breaks", "failed", "Expected\\n  this"}, [3]string{known, "failed", "odd failure: timed out"},
		[3]string{"says why", "skipped", "Driver doesn't support ntfs"}, [3]string{"was left out", "skipped", ""},
		[3]string{"had no time", "interrupted", ""}, [3]string{unmount, "skipped", ""})
	for state, want := range map[string]int{passed: 2, failed: 2, skip: 1, excluded: 1, notRun: 2} {
		if got := len(r.of(state)); got != want {
			t.Errorf("%d are %q, want %d: %+v", got, state, want, r.of(state))
		}
	}
	if r.unexplained() != 1 || !strings.Contains(r.summary(), "FAILED: breaks: Expected this (b.go:7)") || strings.Contains(r.summary(), "FAILED: [Testp") {
		t.Errorf("%d failures are not explained, want that of «breaks»: %s", r.unexplained(), r.summary())
	}
	table := filepath.Join(t.TempDir(), "table.md")
	if err := r.writeTable(table); err != nil {
		t.Fatal(err)
	}
	md, err := os.ReadFile(table)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| 2 | 2 | 1 | 1 | 2 |", "| works | A; B | 3 |", "| says why |  | Driver doesn't support ntfs | Windows. |", "A pod is a VM.", "the node mounts no volume"} {
		if !strings.Contains(string(md), want) {
			t.Errorf("the table lacks %q:\n%s", want, md)
		}
	}
}

func TestMerge(t *testing.T) {
	before := judged(t, [3]string{"kept", "passed", ""}, [3]string{"mended", "failed", "no"}, [3]string{"broken", "passed", ""}, [3]string{"gone", "passed", ""})
	now := judged(t, [3]string{"kept", "skipped", ""}, [3]string{"mended", "passed", ""}, [3]string{"broken", "failed", "no"}, [3]string{"new", "skipped", ""})
	got := map[string]string{}
	for _, s := range merge(before, now).Specs {
		got[s.Name] = s.State
	}
	for name, want := range map[string]string{"kept": passed, "mended": passed, "broken": failed, "new": notRun, "gone": ""} {
		if got[name] != want {
			t.Errorf("%s is %q, want %q", name, got[name], want)
		}
	}
}

// What another run would find again is not run by -continue: a failure that
// nobody has explained is.
func TestContinue(t *testing.T) {
	knowOne(t)
	r := judged(t, [3]string{"works", "passed", ""}, [3]string{"breaks", "failed", "no"}, [3]string{known, "failed", "odd failure"},
		[3]string{"says why", "skipped", "no such thing"}, [3]string{"had no time", "interrupted", ""})
	got := strings.Join(skipped(options{resume: true, all: true}, r), "\n")
	for part, want := range map[string]bool{"works": true, "breaks": false, "volume-odd": true, "says why": true, "had no time": false} {
		if strings.Contains(got, part) != want {
			t.Errorf("%q is left out: %v, want %v", part, !want, want)
		}
	}
}
