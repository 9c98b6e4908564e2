// Package heappeak lets tests bound the memory that work takes.
package heappeak

import (
	"runtime"
	"time"
)

// pause between two readings. What comes and goes within it is not seen.
const pause = 10 * time.Millisecond

// Of runs do and returns by how many bytes the whole heap in use stood above
// its start at most, garbage included.
func Of(do func()) uint64 {
	runtime.GC()
	start := inUse()
	peak := start
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			peak = max(peak, inUse())
			select {
			case <-stop:
				return
			case <-time.After(pause):
			}
		}
	}()
	do()
	close(stop)
	<-done
	return peak - start
}

func inUse() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse
}
