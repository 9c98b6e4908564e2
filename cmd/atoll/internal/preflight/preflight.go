// Package preflight finds out, before anything is changed, whether this host
// can run Atoll, and says for each thing that it cannot what the cure is.
package preflight

import (
	"context"
	"fmt"
	"strings"
)

// A Level says how much a finding matters.
type Level string

// Levels.
const (
	OK   Level = "ok"
	Warn Level = "warning" // it will run, but not as it could
	Fail Level = "failure" // it will not run
)

// A Finding is what one check found.
type Finding struct {
	Check string `json:"check"`
	Level Level  `json:"level"`
	// Detail is what was found.
	Detail string `json:"detail"`
	// Cure is what to do about it; set unless the level is OK.
	Cure string `json:"cure,omitempty"`
}

func ok(format string, args ...any) Finding {
	return Finding{Level: OK, Detail: fmt.Sprintf(format, args...)}
}

func warn(cure, format string, args ...any) Finding {
	return Finding{Level: Warn, Detail: fmt.Sprintf(format, args...), Cure: cure}
}

func fail(cure, format string, args ...any) Finding {
	return Finding{Level: Fail, Detail: fmt.Sprintf(format, args...), Cure: cure}
}

// A Check looks at one thing and changes nothing that stays.
type Check struct {
	Name string
	// Needs names checks that must not have failed for this one to make
	// sense; it is left out otherwise.
	Needs []string
	Run   func(ctx context.Context) Finding
}

// Run runs the checks in their order.
func Run(ctx context.Context, checks []Check) []Finding {
	failed := map[string]bool{}
	var findings []Finding
	for _, c := range checks {
		if ctx.Err() != nil {
			break
		}
		blocked := false
		for _, need := range c.Needs {
			blocked = blocked || failed[need]
		}
		if blocked {
			failed[c.Name] = true
			continue
		}
		f := c.Run(ctx)
		f.Check = c.Name
		failed[c.Name] = f.Level == Fail
		findings = append(findings, f)
	}
	return findings
}

// An Error lists what failed.
type Error struct{ Failures []Finding }

func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "this host cannot run Atoll yet:")
	for _, f := range e.Failures {
		fmt.Fprintf(&b, "\n  %s: %s\n    cure: %s", f.Check, f.Detail, f.Cure)
	}
	return b.String()
}

// Err returns an *Error if any finding is a failure.
func Err(findings []Finding) error {
	var failures []Finding
	for _, f := range findings {
		if f.Level == Fail {
			failures = append(failures, f)
		}
	}
	if len(failures) == 0 {
		return nil
	}
	return &Error{Failures: failures}
}
