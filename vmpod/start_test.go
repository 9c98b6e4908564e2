package vmpod

import (
	"slices"
	"testing"
	"time"
)

func TestMergePhases(t *testing.T) {
	const end = 100
	for _, tc := range []struct {
		name     string
		in, want []Phase
	}{
		{"side by side", []Phase{{PhaseVM, 10, 30}, {PhaseNetwork, 10, 5}}, []Phase{{PhaseNetwork, 10, 5}, {PhaseVM, 10, 30}}},
		{"overlap of one name", []Phase{{PhaseImage, 20, 20}, {PhaseImage, 10, 15}}, []Phase{{PhaseImage, 10, 30}}},
		{"one within the other", []Phase{{PhaseImage, 10, 50}, {PhaseImage, 20, 5}}, []Phase{{PhaseImage, 10, 50}}},
		{"a gap stays", []Phase{{PhaseVM, 0, 5}, {PhaseVM, 6, 4}}, []Phase{{PhaseVM, 0, 5}, {PhaseVM, 6, 4}}},
		{"another between them", []Phase{{PhaseVM, 0, 5}, {PhaseAgent, 1, 1}, {PhaseVM, 5, 5}}, []Phase{{PhaseVM, 0, 10}, {PhaseAgent, 1, 1}}},
		{"beyond the end", []Phase{{PhaseAgent, 90, 50}, {PhaseContainer, 101, 5}}, []Phase{{PhaseAgent, 90, 10}}},
		{"before the begin", []Phase{{PhaseQueue, -10, 30}, {PhaseImage, -9, 3}}, []Phase{{PhaseQueue, 0, 20}}},
		{"no time at all", []Phase{{PhaseQueue, 0, 0}}, []Phase{{PhaseQueue, 0, 0}}},
	} {
		got := MergePhases(tc.in, end)
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
		for _, name := range Phases() {
			if sum := (Start{Phases: got}).Total(name); sum > end {
				t.Errorf("%s: %s took %s of %s", tc.name, name, sum, time.Duration(end))
			}
		}
	}
}
