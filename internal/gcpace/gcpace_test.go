package gcpace

import (
	"testing"
	"time"
)

// A load raises GOGC, its waves do not lower it, and its end does; no load does
// where memory is short.
func TestNext(t *testing.T) {
	const mb = 1 << 20
	type step struct {
		after     time.Duration
		allocated uint64 // since the last step
		free      uint64
		want      int
	}
	for name, steps := range map[string][]step{
		"idle":  {{0, 50 * mb, 8 << 30, 50}, {every, mb, 8 << 30, 50}, {every, 12 * mb, 8 << 30, 50}},
		"load":  {{0, 50 * mb, 8 << 30, 50}, {every, 13 * mb, 8 << 30, 200}, {every, 0, 8 << 30, 200}, {rest, 0, 8 << 30, 50}},
		"tight": {{0, 50 * mb, 1 << 30, 50}, {every, 100 * mb, 1 << 30, 50}, {every, 100 * mb, 8 << 30, 200}, {every, 100 * mb, 1 << 30, 50}},
	} {
		t.Run(name, func(t *testing.T) {
			var free uint64
			p := pacer{calm: 50, busy: 200, available: func() uint64 { return free }}
			now, allocated := time.Unix(1, 0), uint64(0)
			for i, s := range steps {
				now, allocated, free = now.Add(s.after), allocated+s.allocated, s.free
				if got := p.next(now, allocated, 100*mb); got != s.want {
					t.Errorf("step %d: GOGC is %d, want %d", i, got, s.want)
				}
			}
		})
	}
}

func TestAvailable(t *testing.T) {
	if n := available(); n < 1<<20 {
		t.Errorf("%d bytes of memory are available", n)
	}
}
