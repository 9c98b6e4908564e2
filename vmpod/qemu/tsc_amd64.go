package qemu

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// rdtsc reads the CPU's time stamp counter.
func rdtsc() uint64

// hostTSCkHz measures the rate of the host's TSC, which a guest under TCG
// reads as its own. It takes 20 ms, once a process. The error is that of two
// clock readings, below 100 ns each: 10 ppm, less than a quartz has.
var hostTSCkHz = sync.OnceValue(func() int {
	t0, c0 := readBoth()
	time.Sleep(20 * time.Millisecond)
	t1, c1 := readBoth()
	if t1 <= t0 || c1 <= c0 {
		return 0
	}
	return int(float64(c1-c0) * 1e6 / float64(t1-t0))
})

// readBoth reads clock (ns) and counter at the same time, as near as the best
// of several attempts comes.
func readBoth() (ns int64, tsc uint64) {
	best := ^uint64(0)
	for range 16 {
		var ts unix.Timespec
		a := rdtsc()
		_ = unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &ts)
		b := rdtsc()
		if b-a < best {
			best, ns, tsc = b-a, ts.Nano(), a+(b-a)/2
		}
	}
	return ns, tsc
}
