package cluster

import (
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestTokenLifetime: bad values are refused, good ones reach the control plane.
func TestTokenLifetime(t *testing.T) {
	l := Layout{data: t.TempDir()}
	for _, d := range []time.Duration{0, -time.Hour, 5*time.Minute - 1, 24*time.Hour + 1} {
		if _, err := chooseState(l, Options{Node: "n", TokenLifetime: &d}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", d, err)
		}
	}
	for _, d := range []time.Duration{5 * time.Minute, 24 * time.Hour} {
		s, err := chooseState(l, Options{Node: "n", TokenLifetime: &d})
		if err != nil || ControlPlaneConfig(l, s).TokenLifetime != d {
			t.Errorf("%s: %v %v", d, s.TokenLifetime, err)
		}
	}
	if got := ControlPlaneConfig(l, State{}).TokenLifetime; got != 10*time.Hour {
		t.Errorf("by default: %s", got)
	}
}
