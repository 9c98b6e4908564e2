package vsphere

import (
	"testing"
	"time"
)

// A lone change is heard of at once, and so is the one after it; of a stream
// there is an answer in each 50 ms.
func TestPacer(t *testing.T) {
	var p pacer
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i, step := range []struct{ after, pause time.Duration }{
		{0, 0},                          // the first
		{time.Second, 0},                // lone
		{time.Millisecond, gather},      // a second one upon it
		{gather, gather},                // the stream
		{gather, gather},                //
		{2*gather - 1, gather},          // slower
		{2 * gather, 0},                 // over
		{10 * time.Millisecond, gather}, // and again
	} {
		at = at.Add(step.after)
		if got := p.next(at); got != step.pause {
			t.Errorf("step %d, %v after the one before: pause of %v, want %v", i, step.after, got, step.pause)
		}
	}
}
