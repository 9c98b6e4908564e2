package vcsim

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// Names that strings.EqualFold holds for the same have one key, others have two.
func TestFolded(t *testing.T) {
	all := []string{"team", "Team", "TEAM", "teams", "\u212a8s", "k8s", "K8S", "\u017ftore", "store", "Stra\u00dfe", "STRA\u1e9eE", "strasse", "\u03c3", "\u03c2", "\u03a3", "i", "\u0130", "\u0131"}
	for _, a := range all {
		if !utf8.ValidString(a) {
			t.Fatalf("%q", a)
		}
		for _, b := range all {
			if same := folded(a) == folded(b); same != strings.EqualFold(a, b) {
				t.Errorf("%q and %q: one key is %v, EqualFold %v", a, b, same, !same)
			}
		}
	}
}
