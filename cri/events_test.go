package cri

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A reader that does not read is cut off, and neither the store nor another
// reader waits for it.
func TestSlowReaderOfEvents(t *testing.T) {
	st := &store{sandboxes: map[string]*sandbox{}, containers: map[string]*container{}, subs: map[*subscription]struct{}{}}
	sb := &sandbox{ID: "s", Config: &runtimeapi.PodSandboxConfig{}}
	st.sandboxes[sb.ID] = sb
	slow, quick := st.subscribe(), st.subscribe()
	emit := func(n int) {
		st.mu.Lock()
		defer st.mu.Unlock()
		for range n {
			st.emit(sb.ID, "c", runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
		}
	}
	var last uint64
	read := func(n int) {
		t.Helper()
		events, more, err := quick.next(t.Context())
		if err != nil || !more || len(events) != n {
			t.Fatalf("the quick reader gets %d events, %v, %v; want %d", len(events), more, err, n)
		}
		for _, e := range events {
			if e.Seq != last+1 {
				t.Fatalf("event %d follows %d", e.Seq, last)
			}
			last = e.Seq
		}
	}
	emit(maxQueuedEvents)
	read(maxQueuedEvents)
	emit(3)
	read(3)
	// The slow one may have what fits; then it is told why there is no more.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var err error
	for more := true; more; {
		_, more, err = slow.next(ctx)
	}
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "subscribe again") {
		t.Errorf("the slow reader ends with %v", err)
	}
	emit(1)
	read(1)
}
