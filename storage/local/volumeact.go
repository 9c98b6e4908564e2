package local

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// An act is the making of a volume or a snapshot out of another. It may take
// longer than anybody waits: it goes on when the call that began it has ended,
// and later calls find it.
type act struct {
	cancel context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed
	// copied of total bytes; both are 0 while there is nothing to say.
	copied, total atomic.Int64
}

// actPatience is how long a call waits for an act. Then it says how far that is,
// which people read.
const actPatience = 20 * time.Second

// act does fn once at a time for each id, in a context that ends with x alone or
// by endAct. It returns fn's error, or after a while ErrAborted: fn goes on.
// Whoever comes meanwhile gets what the first one does.
func (x *Disks) act(ctx context.Context, id string, fn func(context.Context, *act) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	x.actsMu.Lock()
	a := x.acts[id]
	if a == nil {
		var life context.Context
		a = &act{done: make(chan struct{})}
		life, a.cancel = context.WithCancel(x.life)
		x.acts[id] = a
		go func() {
			defer a.cancel()
			a.err = fn(life, a)
			x.actsMu.Lock()
			delete(x.acts, id)
			x.actsMu.Unlock()
			close(a.done)
		}()
	}
	x.actsMu.Unlock()
	return a.wait(ctx)
}

// wait returns the act's error, or after a while ErrAborted.
func (a *act) wait(ctx context.Context) error {
	patience := actPatience
	if end, ok := ctx.Deadline(); ok { // whoever waits is to read it, and not that time is up
		patience = min(patience, time.Until(end)*9/10)
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-a.done:
		return a.err
	case <-timer.C:
		return fmt.Errorf("%s; that goes on: ask again: %w", a, errdefs.ErrAborted)
	case <-ctx.Done():
		return fmt.Errorf("%s; that goes on: ask again: %w", a, ctx.Err())
	}
}

// awaitAct waits for an act of this process, if there is one.
func (x *Disks) awaitAct(ctx context.Context, id string) error {
	x.actsMu.Lock()
	a := x.acts[id]
	x.actsMu.Unlock()
	if a == nil {
		return nil
	}
	return a.wait(ctx)
}

// endAct ends an act, if there is one, and waits until it has.
func (x *Disks) endAct(ctx context.Context, id string) error {
	x.actsMu.Lock()
	a := x.acts[id]
	x.actsMu.Unlock()
	if a == nil {
		return nil
	}
	a.cancel()
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("it is being made, which does not end: %w", ctx.Err())
	}
}

// String says how far it is.
func (a *act) String() string {
	copied, total := a.copied.Load(), a.total.Load()
	if total <= 0 {
		return "it is being made"
	}
	return fmt.Sprintf("its data is being copied, %d of %d MiB so far", copied/mib, (total+mib-1)/mib)
}

// progress is for what copies.
func (a *act) progress(copied, total int64) {
	a.copied.Store(copied)
	a.total.Store(total)
}
