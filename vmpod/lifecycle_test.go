package vmpod

import (
	"flag"
	"fmt"
	"os"
	"sort"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the picture in lifecycle.go")

// states in the order of a life.
var states = []State{StateLaunching, StateRunning, StateUnknown, StateStopping, StateStopped}

// picture draws the table: a line for each state and the state it leads to,
// with the events that do it.
func picture() string {
	var b strings.Builder
	for _, s := range states {
		by := map[State][]string{}
		for e, next := range transitions[s] {
			by[next] = append(by[next], string(e))
		}
		for _, next := range states {
			if events := by[next]; len(events) > 0 {
				sort.Strings(events)
				fmt.Fprintf(&b, "//\t%-9s -- %s --> %s\n", s, strings.Join(events, ", "), next)
			}
		}
	}
	return b.String()
}

// TestLifecyclePicture keeps the picture in Next's comment true to the table.
func TestLifecyclePicture(t *testing.T) {
	b, err := os.ReadFile("lifecycle.go")
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(b), "// the state stays, if e cannot happen in s.\n//\n")
	i := strings.Index(rest, "func Next(")
	if !ok || i < 0 {
		t.Fatal("lifecycle.go: Next's comment is not where it was")
	}
	want := picture()
	if rest[:i] == want {
		return
	}
	if !*update {
		t.Fatalf("the picture in lifecycle.go does not show the table (go test ./vmpod -update redraws it); want:\n%s", want)
	}
	out := head + "// the state stays, if e cannot happen in s.\n//\n" + want + rest[i:]
	if err := os.WriteFile("lifecycle.go", []byte(out), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestNext(t *testing.T) {
	for _, s := range states {
		if _, ok := transitions[s]; !ok {
			t.Errorf("state %s is not in the table", s)
		}
		for e, next := range transitions[s] {
			if got, err := Next(s, e); got != next || err != nil {
				t.Errorf("Next(%s, %s) = %s, %v", s, e, got, err)
			}
			if next == StateStopped && e != EventEnded && s != StateStopped {
				t.Errorf("%s leads from %s to Stopped: only the end itself may", e, s)
			}
		}
		// Whatever happens, a machine can be stopped and can end.
		for _, e := range []Event{EventStop, EventEnded} {
			if _, err := Next(s, e); err != nil {
				t.Errorf("state %s: %v", s, err)
			}
		}
	}
	if s, err := Next(StateStopped, EventStarted); s != StateStopped || err == nil {
		t.Errorf("a stopped machine starts again: %s, %v", s, err)
	}
}
