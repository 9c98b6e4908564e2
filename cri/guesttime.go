package cri

import (
	"context"
	"sync/atomic"
	"time"
)

// A guestTime sums what an RPC waited for its guest, so that a slow call can
// be laid at the right door. Calls made side by side count each.
type guestTime struct{ ns atomic.Int64 }

type guestTimeKey struct{}

func withGuestTime(ctx context.Context) (context.Context, *guestTime) {
	g := &guestTime{}
	return context.WithValue(ctx, guestTimeKey{}, g), g
}

// inGuest is called before the guest is asked; what it returns is called when
// the answer is there.
func inGuest(ctx context.Context) (done func()) {
	g, ok := ctx.Value(guestTimeKey{}).(*guestTime)
	if !ok {
		return func() {}
	}
	start := time.Now()
	return func() { g.ns.Add(int64(time.Since(start))) }
}

func (g *guestTime) total() time.Duration {
	if g == nil {
		return 0
	}
	return time.Duration(g.ns.Load())
}
