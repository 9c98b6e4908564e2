// Package gcpace has the garbage collector of a process that is mostly idle save
// memory, but not at the cost of a load: while much is allocated, garbage may grow
// further before it is collected.
package gcpace

import (
	"bytes"
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"time"
)

const (
	// every is how often the rate of allocation is looked at.
	every = 500 * time.Millisecond
	// collections a second that a calm setting would mean, from which on a process
	// is busy; one in two seconds is a few per cent of a CPU for a heap of 100 MB.
	collections = 0.5
	// rest is how long a process stays busy after it last was: a load comes in
	// waves, and garbage of several is cheaper to collect at once.
	rest = 5 * time.Second
	// share of the memory that is available which the further garbage may take.
	share = 8
)

// Run sets GOGC to calm, and to busy while the process allocates so fast that calm
// would mean a collection every two seconds or more often. Five seconds after that
// it is calm again, and gives the host back what is free. It stays calm where the
// garbage that busy allows is more than an eighth of the host's available memory.
// It does nothing if GOGC is in the environment, and returns when ctx ends.
func Run(ctx context.Context, calm, busy int) {
	if os.Getenv("GOGC") != "" {
		return
	}
	debug.SetGCPercent(calm)
	p := pacer{calm: calm, busy: busy, available: available}
	set := calm
	t := time.NewTicker(every)
	defer t.Stop()
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			metrics.Read(samples)
			if want := p.next(now, samples[0].Value.Uint64(), samples[1].Value.Uint64()); want != set {
				set = want
				debug.SetGCPercent(set)
				if set == calm {
					debug.FreeOSMemory() // what the load has left behind
				}
			}
		}
	}
}

// A pacer decides; it is told of time and of memory.
type pacer struct {
	calm, busy int
	available  func() uint64 // bytes of the host's memory

	at, until time.Time
	allocated uint64
}

// next is the GOGC for now, of all bytes that were allocated so far, and of those
// that the last collection found in use.
func (p *pacer) next(now time.Time, allocated, live uint64) int {
	took, bytes := now.Sub(p.at).Seconds(), allocated-p.allocated
	first := p.at.IsZero()
	p.at, p.allocated = now, allocated
	if first || took <= 0 || live == 0 {
		return p.calm
	}
	if float64(bytes)/took >= collections*float64(live)*float64(p.calm)/100 {
		p.until = now.Add(rest)
	}
	if now.After(p.until) {
		return p.calm
	}
	if more := live * uint64(p.busy-p.calm) / 100; more > p.available()/share {
		return p.calm
	}
	return p.busy
}

// available is /proc/meminfo's MemAvailable; 0 if it cannot be read.
func available() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	_, rest, _ := bytes.Cut(b, []byte("MemAvailable:"))
	fields := bytes.Fields(rest)
	if len(fields) == 0 {
		return 0
	}
	kb, _ := strconv.ParseUint(string(fields[0]), 10, 64) // 0 if it is none
	return kb << 10
}
