package cri

import (
	"context"
	"sync"
)

// maxFed is how many news wait for somebody who wants to hear of them; then
// the oldest go.
const maxFed = 256

// A feed hands news on in their order.
type feed[T any] struct {
	mu    sync.Mutex
	queue []T
	wake  chan struct{}
}

func newFeed[T any]() *feed[T] { return &feed[T]{wake: make(chan struct{}, 1)} }

func (f *feed[T]) tell(news T) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.queue = append(f.queue, news); len(f.queue) > maxFed {
		f.queue = f.queue[1:]
	}
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

func (f *feed[T]) take() []T {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := f.queue
	f.queue = nil
	return q
}

// follow calls fn for all news, in order, until ctx ends.
func (f *feed[T]) follow(ctx context.Context, fn func(T)) {
	for {
		select {
		case <-f.wake:
		case <-ctx.Done():
			return
		}
		for _, news := range f.take() {
			fn(news)
		}
	}
}
