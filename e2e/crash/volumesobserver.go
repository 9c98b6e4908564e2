package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// An observer is told of every value once it is on disk. It holds the writers to
// what they have said: a value comes after the one before, a pod that begins
// finds all that was acknowledged and at most one value more, and once its
// successor has begun a pod writes no more.
type observer struct {
	f       *findings
	address string

	mu      sync.Mutex
	writers map[string]*writerState // by pod name
}

// A writerState is what one volume's writers have said.
type writerState struct {
	// Acked is the last value that was acknowledged.
	Acked int64
	// Begun counts the times that a writer has begun.
	Begun int
	// run is of the writer that has begun last, last its last value.
	run  string
	last int64
}

// observe serves an observer on an address of this namespace until ctx ends.
func observe(ctx context.Context, f *findings, ip string) (*observer, error) {
	ln, err := net.Listen("tcp4", net.JoinHostPort(ip, "0"))
	if err != nil {
		return nil, err
	}
	o := &observer{f: f, address: ln.Addr().String(), writers: map[string]*writerState{}}
	srv := &http.Server{Handler: o, ReadHeaderTimeout: time.Minute}
	context.AfterFunc(ctx, func() { srv.Close() })
	go func() { _ = srv.Serve(ln) }()
	return o, nil
}

// ServeHTTP takes /begin and /wrote, with the pod's name, an ID of this run of the
// writer and a value.
func (o *observer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	n, err := strconv.ParseInt(q.Get("n"), 10, 64)
	if err != nil || q.Get("pod") == "" || q.Get("run") == "" {
		http.Error(w, "want pod, run and n", http.StatusBadRequest)
		return
	}
	o.heard(r.URL.Path, q.Get("pod"), q.Get("run"), n)
}

func (o *observer) heard(what, pod, run string, n int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.writers[pod]
	if s == nil {
		s = &writerState{}
		o.writers[pod] = s
	}
	switch what {
	case "/begin":
		if s.run == run {
			return // said again, because the answer was lost
		}
		switch {
		case n < s.Acked:
			o.f.add("lost", "%s finds %d values, %d were acknowledged", pod, n, s.Acked)
		case n > s.Acked+1:
			o.f.add("order", "%s finds %d values, %d were acknowledged, and one more at most was under way", pod, n, s.Acked)
		}
		s.run, s.last = run, n
		s.Begun++
	case "/wrote":
		switch {
		case run != s.run:
			o.f.add("twice", "%s: run %s of the writer writes value %d after run %s has begun on the same volume", pod, run, n, s.run)
			return
		case n == s.last:
			return // said again
		case n != s.last+1:
			o.f.add("order", "%s wrote %d after %d", pod, n, s.last)
		}
		s.last = n
		s.Acked = max(s.Acked, n)
	case "/failed":
		o.f.add("failed", "%s: value %d could not be written", pod, n)
	}
}

// acked is the last acknowledged value of each pod.
func (o *observer) acked() map[string]int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := map[string]int64{}
	for pod, s := range o.writers {
		all[pod] = s.Acked
	}
	return all
}

// begun counts how often each pod's writer has begun.
func (o *observer) begun() map[string]int {
	o.mu.Lock()
	defer o.mu.Unlock()
	all := map[string]int{}
	for pod, s := range o.writers {
		all[pod] = s.Begun
	}
	return all
}

// awaitBegun waits until the writers of the pods have begun once more than
// before.
func (o *observer) awaitBegun(ctx context.Context, before map[string]int, pods []string) error {
	for {
		now := o.begun()
		var still []string
		for _, p := range pods {
			if now[p] <= before[p] {
				still = append(still, p)
			}
		}
		if len(still) == 0 {
			return nil
		}
		if sleep(ctx, poll) != nil {
			return fmt.Errorf("the writers of %v have not begun again: %w", still, context.Cause(ctx))
		}
	}
}

// awaitProgress waits until each of the pods has had a value acknowledged that
// was not when it was called.
func (o *observer) awaitProgress(ctx context.Context, pods []string) error {
	before := o.acked()
	for {
		now := o.acked()
		var still []string
		for _, p := range pods {
			if now[p] <= before[p] {
				still = append(still, fmt.Sprintf("%s (%d)", p, now[p]))
			}
		}
		if len(still) == 0 {
			return nil
		}
		if sleep(ctx, poll) != nil {
			return fmt.Errorf("no value of %v was acknowledged: %w", still, context.Cause(ctx))
		}
	}
}
