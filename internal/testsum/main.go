// Command testsum runs the test suites that it is given, each within its
// time budget, and sums them up: a table, and as the last line
//
//	N passed, N failed, N skipped
//
// over the leaves of all suites (a test with subtests counts as those). It
// exits with 1 if anything failed. Run it from the top of the checkout:
//
//	go run ./internal/testsum lint unit suites e2e
//
// What go test said, as JSON, stays in build/test/SUITE.jsonl.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// A suite is a list of steps with a budget for all of them together.
type suite struct {
	name   string
	budget time.Duration
	steps  func(context.Context) ([]step, error)
}

var suites = []suite{
	{"lint", 15 * time.Minute, lintSteps},
	{"unit", 15 * time.Minute, unitSteps},
	{"suites", 24 * time.Minute, vmSteps},
	{"e2e", 25 * time.Minute, e2eSteps},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	chosen, err := choose(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
		os.Exit(2)
	}
	var results []result
	for _, s := range chosen {
		results = append(results, s.run(ctx))
	}
	if !report(os.Stdout, results) {
		os.Exit(1)
	}
}

func choose(names []string) ([]suite, error) {
	var chosen []suite
	for _, name := range names {
		found := false
		for _, s := range suites {
			if s.name == name {
				chosen, found = append(chosen, s), true
			}
		}
		if !found {
			return nil, fmt.Errorf("suite %q is not known", name)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("name the suites to run: lint, unit, suites, e2e")
	}
	return chosen, nil
}

// run runs all steps, even after one has failed.
func (s suite) run(ctx context.Context) result {
	began := time.Now()
	fmt.Printf("=== %s (at most %v)\n", s.name, s.budget)
	ctx, cancel := context.WithTimeout(ctx, s.budget)
	defer cancel()
	r := result{suite: s}
	log, err := openLog(s.name)
	if err == nil {
		defer log.Close()
		var steps []step
		if steps, err = s.steps(ctx); err == nil {
			for _, st := range steps {
				r.add(st.run(ctx, log))
			}
		}
	}
	if err != nil {
		r.fail(s.name, err.Error())
	}
	if ctx.Err() == context.DeadlineExceeded {
		r.fail(s.name, fmt.Sprintf("over its budget of %v", s.budget))
	}
	r.took = time.Since(began)
	return r
}

// report prints the table and says whether all is well.
func report(w *os.File, results []result) bool {
	var sum result
	fmt.Fprintf(w, "\n%-8s %7s %7s %8s %8s %8s\n", "suite", "passed", "failed", "skipped", "time", "budget")
	for _, r := range results {
		fmt.Fprintf(w, "%-8s %7d %7d %8d %8s %8s\n", r.suite.name, r.passed, len(r.failed), len(r.skipped),
			r.took.Round(time.Second), r.suite.budget)
		sum.add(r)
	}
	for _, s := range sum.skipped {
		fmt.Fprintf(w, "skipped: %s\n", s)
	}
	for _, f := range sum.failed {
		fmt.Fprintf(w, "FAILED: %s\n", f)
	}
	ok := len(sum.failed) == 0
	if sum.passed == 0 && ok {
		fmt.Fprintln(w, "FAILED: no test ran")
		ok = false
	}
	fmt.Fprintf(w, "%d passed, %d failed, %d skipped\n", sum.passed, len(sum.failed), len(sum.skipped))
	return ok
}

// A result counts leaves.
type result struct {
	suite   suite
	took    time.Duration
	passed  int
	failed  []string
	skipped []string // with the reason
}

func (r *result) add(o result) {
	r.passed += o.passed
	r.failed = append(r.failed, o.failed...)
	r.skipped = append(r.skipped, o.skipped...)
}

func (r *result) fail(name, output string) {
	r.failed = append(r.failed, name)
	fmt.Printf("--- FAIL: %s\n%s\n", name, strings.TrimRight(output, "\n"))
}
