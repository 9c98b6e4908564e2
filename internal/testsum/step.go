package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const module = "github.com/openatoll/atoll/"

// maxOutput bounds what is shown of one failed test, in lines; the rest is in
// build/test.
const maxOutput = 150

// A step is one command.
type step struct {
	// name of a step that is not go test: it counts as one test.
	name string
	argv []string
	env  []string
	// background says that the step may go on while other suites run: it uses
	// no CPU that they want.
	background bool
	// test says that argv is `go test -json ...`.
	test bool
	// ignore are tests whose being skipped says nothing (package and name):
	// another suite runs them.
	ignore map[string]bool
	// fail judges the output of a command that succeeded.
	fail func(output string) string
}

func openLog(name string) (*os.File, error) {
	dir := filepath.Join("build", "test")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return os.Create(filepath.Join(dir, name+".jsonl"))
}

// idle is the step with a scheduling policy that gives it what CPU time
// nobody else wants, where util-linux is there to set it.
func (s step) idle() step {
	if chrt, err := exec.LookPath("chrt"); err == nil {
		s.argv = append([]string{chrt, "--idle", "0"}, s.argv...)
	}
	return s
}

// command is in a process group of its own, which gets SIGTERM, and a little
// later SIGKILL, when ctx ends.
func (s step) command(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.argv[0], s.argv[1:]...)
	cmd.Env = append(os.Environ(), s.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 90 * time.Second // e2e takes its cluster down
	return cmd
}

func (s step) run(ctx context.Context, log io.Writer) result {
	if s.test {
		return s.runTest(ctx, log)
	}
	var r result
	began := time.Now()
	out, err := s.command(ctx).CombinedOutput()
	switch {
	case err != nil:
		r.fail(s.name, fmt.Sprintf("%s\n%s: %v", out, strings.Join(s.argv, " "), err))
	case s.fail != nil && s.fail(string(out)) != "":
		r.fail(s.name, s.fail(string(out)))
	default:
		r.passed = 1
		fmt.Printf("ok   %-50s %6.1fs\n", s.name, time.Since(began).Seconds())
	}
	return r
}

func (s step) runTest(ctx context.Context, log io.Writer) result {
	cmd := s.command(ctx)
	stdout, err := cmd.StdoutPipe()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err == nil {
		err = cmd.Start()
	}
	c := newCounter(s.ignore)
	if err == nil {
		sc := bufio.NewScanner(io.TeeReader(stdout, log))
		sc.Buffer(nil, 16<<20)
		for sc.Scan() {
			c.line(sc.Bytes())
		}
		_, _ = io.Copy(io.Discard, stdout)
		err = cmd.Wait()
	}
	r := c.result
	if err != nil && len(r.failed) == 0 {
		r.fail("go test", fmt.Sprintf("%s\n%s: %v", stderr.Bytes(), strings.Join(s.argv, " "), err))
	}
	return r
}

// An event is a line of test2json.
type event struct {
	Action     string
	Package    string
	ImportPath string // of a build's output
	Test       string
	Elapsed    float64 // seconds
	Output     string
}

// A counter makes a result of events.
type counter struct {
	result
	ignore map[string]bool
	output map[string][]string // of tests under way, by package and test
	parent map[string]bool     // tests that have subtests
	failed map[string]int      // failed leaves, by package
	count  map[string]int      // passed leaves, by package
	builds map[string][]string
}

func newCounter(ignore map[string]bool) *counter {
	return &counter{
		ignore: ignore, output: map[string][]string{}, parent: map[string]bool{},
		failed: map[string]int{}, count: map[string]int{}, builds: map[string][]string{},
	}
}

func key(pkg, test string) string { return strings.TrimPrefix(pkg, module) + "." + test }

// top is the test that a subtest belongs to.
func top(test string) string {
	name, _, _ := strings.Cut(test, "/")
	return name
}

func (c *counter) line(b []byte) {
	var e event
	if json.Unmarshal(b, &e) != nil {
		return // not test2json's: what a killed run printed last
	}
	k := key(e.Package, e.Test)
	switch e.Action {
	case "run":
		if i := strings.LastIndexByte(e.Test, '/'); i > 0 {
			c.parent[key(e.Package, e.Test[:i])] = true
		}
	case "output":
		c.output[k] = append(c.output[k], e.Output)
	case "build-output":
		c.builds[e.ImportPath] = append(c.builds[e.ImportPath], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			c.endPackage(e)
		} else {
			c.endTest(e, k)
		}
		delete(c.output, k)
	}
}

func (c *counter) endTest(e event, k string) {
	leaf := !c.parent[k]
	switch {
	case e.Action == "fail" && (leaf || c.spokeItself(k)):
		c.failed[e.Package]++
		c.fail(k, tail(c.output[k]))
	case e.Action == "fail":
		// Its subtests have been counted.
	case e.Action == "skip" && c.ignore[key(e.Package, top(e.Test))]:
	case e.Action == "skip":
		c.skipped = append(c.skipped, k+": "+reason(c.output[k]))
	case e.Action == "pass" && leaf:
		c.passed++
		c.count[e.Package]++
	}
}

// spokeItself tells a parent that failed by itself from one whose subtests
// did: it has printed more than the framework's lines.
func (c *counter) spokeItself(k string) bool {
	for _, line := range c.output[k] {
		if t := strings.TrimSpace(line); !strings.HasPrefix(t, "=== ") && !strings.HasPrefix(t, "--- ") && t != "" {
			return true
		}
	}
	return false
}

func (c *counter) endPackage(e event) {
	name := strings.TrimPrefix(e.Package, module)
	switch {
	case e.Action == "fail" && c.failed[e.Package] == 0:
		// It did not build, or ended outside of a test; or in the middle of
		// one, whose output is then still here.
		var out []string
		for _, lines := range c.builds {
			out = append(out, lines...)
		}
		clear(c.builds)
		for k, lines := range c.output {
			if strings.HasPrefix(k, name+".") {
				out = append(out, lines...)
			}
		}
		c.fail(name, tail(out))
	case e.Action == "pass":
		fmt.Printf("ok   %-50s %6.1fs  %d passed\n", name, e.Elapsed, c.count[e.Package])
	}
}

func tail(lines []string) string {
	if n := len(lines) - maxOutput; n > 0 {
		lines = append([]string{fmt.Sprintf("... %d lines before, see build/test\n", n)}, lines[n:]...)
	}
	return strings.Join(lines, "")
}

// reason is what a test said when it skipped itself.
func reason(lines []string) string {
	for i := len(lines) - 1; i >= 0; i-- {
		t := strings.TrimSpace(lines[i])
		if t != "" && !strings.HasPrefix(t, "--- ") && !strings.HasPrefix(t, "=== ") {
			return t
		}
	}
	return "no reason given"
}
