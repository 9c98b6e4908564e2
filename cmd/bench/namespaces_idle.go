package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// calls to vCenter by method, from the controllers' start.
type calls map[string]float64

var askedLine = regexp.MustCompile(`^atoll_namespaces_vcenter_calls_total\{.*method="([^"]+)".*\} (\S+)$`)

// readCalls reads them from the text of /metrics, whatever came of them.
func readCalls(r io.Reader) (calls, error) {
	c := calls{}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		m := askedLine.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		n, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			return nil, fmt.Errorf("metrics: %q: %w", s.Text(), err)
		}
		c[m[1]] += n
	}
	if len(c) == 0 && s.Err() == nil {
		return nil, fmt.Errorf("metrics: no atoll_namespaces_vcenter_calls_total: the controllers have asked nothing of vCenter")
	}
	return c, s.Err()
}

// since returns what came after before; never what did not change.
func (c calls) since(before calls) calls {
	out := calls{}
	for method, n := range c {
		if n != before[method] {
			out[method] = n - before[method]
		}
	}
	return out
}

func (c calls) add(more calls) {
	for method, n := range more {
		c[method] += n
	}
}

func (c calls) total() (sum float64) {
	for _, n := range c {
		sum += n
	}
	return sum
}

// String is "2 SetField, 1 UpdateConfig", "nothing" for none.
func (c calls) String() string {
	var parts []string
	for _, method := range slices.Sorted(maps.Keys(c)) {
		parts = append(parts, fmt.Sprintf("%g %s", c[method], method))
	}
	if parts == nil {
		return "nothing"
	}
	return strings.Join(parts, ", ")
}

func (b *namespaceBench) calls(ctx context.Context) (calls, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddress+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	return readCalls(res.Body)
}

// quietCalls returns the calls when there were no more for a second.
func (b *namespaceBench) quietCalls(ctx context.Context) (calls, error) {
	last, err := b.calls(ctx)
	if err != nil {
		return nil, err
	}
	for since := time.Now(); time.Since(since) < time.Second; {
		if err := pause(ctx, 250*time.Millisecond); err != nil {
			return nil, err
		}
		now, err := b.calls(ctx)
		if err != nil {
			return nil, err
		}
		if now.total() != last.total() {
			last, since = now, time.Now()
		}
	}
	return last, nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// A state is what the controllers' process takes while nothing is asked of it.
type state struct {
	rss []float64 // MB
	cpu float64   // cores
}

// rest waits until the process has had time to collect garbage, and looks.
func (b *namespaceBench) rest(ctx context.Context, when string) (s state, err error) {
	if err := pause(ctx, restPause); err != nil {
		return s, err
	}
	began := time.Now()
	used, err := cpuSeconds(b.pid)
	if err != nil {
		return s, err
	}
	for range 10 { // the heap breathes
		if err := pause(ctx, time.Second); err != nil {
			return s, err
		}
		mb, err := procMB(b.pid, "status", "VmRSS:")
		if err != nil {
			return s, err
		}
		s.rss = append(s.rss, mb)
	}
	now, err := cpuSeconds(b.pid)
	s.cpu = (now - used) / time.Since(began).Seconds()
	say("the controllers %s: %.0f MB, %.1f %% of a core", when, median(s.rss), 100*s.cpu)
	return s, err
}

// A steadyState is what was asked of vCenter, and used, while nothing changed.
type steadyState struct {
	calls
	cpu float64 // cores
}

// steady watches the process while nothing changes.
func (b *namespaceBench) steady(ctx context.Context) (s steadyState, err error) {
	say("watching for %s while nothing changes", b.idle)
	before, err := b.quietCalls(ctx)
	if err != nil {
		return s, err
	}
	began := time.Now()
	used, err := cpuSeconds(b.pid)
	if err != nil {
		return s, err
	}
	if err := pause(ctx, b.idle); err != nil {
		return s, err
	}
	now, err := cpuSeconds(b.pid)
	if err != nil {
		return s, err
	}
	s.cpu = (now - used) / time.Since(began).Seconds()
	after, err := b.calls(ctx)
	s.calls = after.since(before)
	return s, err
}

// steadyFigures says what namespaces cost that are there.
func (b *namespaceBench) steadyFigures(all *results, before, after state, steady steadyState) {
	r := all.add("ns_idle_calls", "calls/min", []float64{steady.total() / b.idle.Minutes()})
	r.most(2)
	r.Beside = fmt.Sprintf("%d namespaces, %s, waits of the watch counted: %s", b.count, b.idle, steady.calls)
	r = all.add("ns_rss", "MB", after.rss)
	r.most(150)
	r.Beside = fmt.Sprintf("of atoll-namespaces, which has the controllers alone, with %d namespaces; %.0f before the first", b.count, median(before.rss))
	r = all.add("ns_idle_cpu", "% of a core", []float64{100 * steady.cpu})
	r.Beside = fmt.Sprintf("of the same process; %.1f before the first namespace", 100*before.cpu)
}
