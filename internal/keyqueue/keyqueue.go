// Package keyqueue is the loop of a controller that looks at one object at a time,
// by its key in the caches of informers.
package keyqueue

import (
	"context"
	"log/slog"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// A Queue has keys that wait to be looked at, each once.
type Queue = workqueue.TypedRateLimitingInterface[string]

// New makes a queue in which what failed waits first, doubling up to atMost.
func New(first, atMost time.Duration) Queue {
	return workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](first, atMost))
}

// Run looks at what is in the queue, one after another, until ctx ends, and shuts
// the queue down. kind is what log calls a key. A conflict is no news: the object
// has changed and is looked at again.
func Run(ctx context.Context, queue Queue, log *slog.Logger, kind string, look func(ctx context.Context, key string) error) {
	stop := context.AfterFunc(ctx, queue.ShutDown)
	defer stop()
	for {
		key, down := queue.Get()
		if down {
			return
		}
		err := look(ctx, key)
		switch {
		case err == nil:
			queue.Forget(key)
		case ctx.Err() == nil:
			if !apierrors.IsConflict(err) {
				log.Warn("trying again", kind, key, "err", err)
			}
			queue.AddRateLimited(key)
		}
		queue.Done(key)
	}
}

// Handle calls f for each object that is new or has changed.
func Handle[T any](informer cache.SharedIndexInformer, f func(T)) {
	one := func(o any) {
		if t, ok := o.(T); ok {
			f(t)
		}
	}
	_, _ = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: one, UpdateFunc: func(_, o any) { one(o) }})
}
