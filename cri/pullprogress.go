package cri

import (
	"sync"
	"time"

	"github.com/openatoll/atoll/storage"
)

// pullReportInterval is how often a pull that takes long is told of.
const pullReportInterval = 10 * time.Second

// A pullReport logs how far one pull has come, from time to time.
type pullReport struct {
	mu    sync.Mutex
	last  storage.Progress
	timer *time.Timer
	done  bool
}

// reportPull begins to tell of the pull of ref until end is called.
func (s *Server) reportPull(ref string, every time.Duration) *pullReport {
	r := &pullReport{}
	start, before := time.Now(), int64(0)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.timer = time.AfterFunc(every, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.done {
			return
		}
		p := r.last
		s.log.Info("image is being pulled", "image", ref, "stage", p.Stage, "bytes", p.Bytes, "total", p.Total,
			"bytes_per_second", int64(float64(p.Bytes-before)/every.Seconds()), "since", time.Since(start).Round(time.Second))
		before = p.Bytes
		r.timer.Reset(every)
	})
	return r
}

// set is called by the store, which must not wait.
func (r *pullReport) set(p storage.Progress) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last = p
}

func (r *pullReport) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done = true
	r.timer.Stop()
}
