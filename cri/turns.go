package cri

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/openatoll/atoll/vmpod"
)

// turnLimit is how long a step of a start has its turn at most: what takes
// longer waits for something, and must not hold others up.
const turnLimit = 5 * time.Second

// turns let so many steps of pods' starts work in their guests at once, and the
// others wait; steps of starts that are on their way go before those that begin
// one, else in the order in which they came. Emulated guests that all do at once
// what they have never done take more CPU time for the same, since none finds
// its code in the CPU's caches. A nil turns holds nobody up.
type turns struct {
	limit time.Duration

	mu            sync.Mutex
	free          int
	ahead, behind []chan struct{} // closed when it is its turn
}

// newTurns returns turns for n at once; nil, without a bound, for none.
func newTurns(n int, limit time.Duration) *turns {
	if n <= 0 {
		return nil
	}
	return &turns{limit: limit, free: n}
}

// take waits for a turn, which lasts until done is called, or for the limit. It
// fails with the cause of ctx alone. The wait, if there is one, is the clock's.
func (t *turns) take(ctx context.Context, clock *startClock, ahead bool) (done func(), err error) {
	if t == nil {
		return func() {}, nil
	}
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return t.lease(), nil
	}
	queue, mine := &t.behind, make(chan struct{})
	if ahead {
		queue = &t.ahead
	}
	*queue = append(*queue, mine)
	t.mu.Unlock()
	defer clock.step(vmpod.PhaseQueue, "turn")()
	select {
	case <-mine:
		return t.lease(), nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	i := slices.Index(*queue, mine)
	if i >= 0 {
		*queue = slices.Delete(*queue, i, i+1)
	}
	t.mu.Unlock()
	if i < 0 { // it came in this moment
		t.give()
	}
	return nil, context.Cause(ctx)
}

// lease is a turn that has been taken.
func (t *turns) lease() (done func()) {
	once := sync.OnceFunc(t.give)
	over := time.AfterFunc(t.limit, once)
	return func() {
		over.Stop()
		once()
	}
}

// give hands a turn on.
func (t *turns) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, queue := range []*[]chan struct{}{&t.ahead, &t.behind} {
		if len(*queue) > 0 {
			close((*queue)[0])
			*queue = slices.Delete(*queue, 0, 1)
			return
		}
	}
	t.free++
}
