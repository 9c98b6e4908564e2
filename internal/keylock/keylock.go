// Package keylock lets one caller at a time work on what a key names.
package keylock

import (
	"context"
	"fmt"
	"sync"
)

// Locks has a lock for each key, which takes memory only while it is held. The
// zero value is ready for use.
type Locks[K comparable] struct {
	mu   sync.Mutex
	held map[K]chan struct{} // closed when it is let go
}

// Lock waits until nobody holds key. Its error wraps that of ctx, which ended
// before.
func (l *Locks[K]) Lock(ctx context.Context, key K) (unlock func(), err error) {
	mine := make(chan struct{})
	for {
		l.mu.Lock()
		other := l.held[key]
		if other == nil {
			if l.held == nil {
				l.held = map[K]chan struct{}{}
			}
			l.held[key] = mine
		}
		l.mu.Unlock()
		if other == nil {
			return func() {
				l.mu.Lock()
				delete(l.held, key)
				l.mu.Unlock()
				close(mine)
			}, nil
		}
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fmt.Errorf("%v: another call has not ended: %w", key, ctx.Err())
		}
	}
}
