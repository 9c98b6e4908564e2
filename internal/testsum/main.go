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
	// The linter works in what the suites after it leave idle, so that its
	// budget is theirs, too.
	{"lint", 60 * time.Minute, lintSteps},
	{"unit", 15 * time.Minute, unitSteps},
	{"suites", 30 * time.Minute, vmSteps},
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
	var under []<-chan result
	for i, s := range chosen {
		under = append(under, s.start(ctx, i < len(chosen)-1))
	}
	var results []result
	for _, u := range under {
		results = append(results, <-u)
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

// start runs all steps, even after one has failed. It returns when all have
// ended but those that may go on in the background while other suites run, if
// more of them follow; the result comes when those have, too.
func (s suite) start(ctx context.Context, more bool) <-chan result {
	began := time.Now()
	fmt.Printf("=== %s (at most %v)\n", s.name, s.budget)
	ctx, cancel := context.WithTimeout(ctx, s.budget)
	r := result{suite: s}
	steps, err := s.steps(ctx)
	var log *os.File
	if err == nil {
		log, err = openLog(s.name)
	}
	if err != nil {
		r.fail(s.name, err.Error())
		steps = nil
	}
	var now, later []step
	for _, st := range steps {
		if st.background && more {
			later = append(later, st.idle())
		} else {
			now = append(now, st)
		}
	}
	end := func() result {
		defer cancel()
		if ctx.Err() == context.DeadlineExceeded {
			r.fail(s.name, fmt.Sprintf("over its budget of %v", s.budget))
		}
		_ = log.Close() // nil, if there is none
		r.took = time.Since(began)
		return r
	}
	all := func(steps []step) {
		for _, st := range steps {
			r.add(st.run(ctx, log))
		}
	}
	all(now)
	done := make(chan result, 1)
	if len(later) == 0 {
		done <- end()
		return done
	}
	go func() {
		all(later)
		done <- end()
	}()
	return done
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
