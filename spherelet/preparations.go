package spherelet

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/openatoll/atoll/vmpod"
)

const (
	// prepareTimeout bounds calls of the Preparer, which return at once.
	prepareTimeout = 10 * time.Second
	// sweepInterval is how soon a preparation is dropped whose pod a later
	// admission handler refused, or that was deleted before it had a sandbox.
	sweepInterval = time.Second
	// unusedAfter is when the runtime drops an unused preparation by itself.
	unusedAfter = 5 * time.Minute
)

// preparations remembers for which pods the runtime was asked to prepare and
// has not made a sandbox yet, so that what nobody will use is given back. A
// pod leaves when its sandbox changes (used), when it is no longer active
// (refused or deleted: Forget), or after unusedAfter.
type preparations struct {
	preparer vmpod.Preparer
	// active returns the UIDs of the pods that the kubelet means to run; nil
	// while the kubelet is not there yet.
	active func() map[string]bool
	now    func() time.Time
	log    *slog.Logger

	mu      sync.Mutex
	waiting map[string]time.Time
	wake    chan struct{}
}

func newPreparations(p vmpod.Preparer, active func() map[string]bool, log *slog.Logger) *preparations {
	return &preparations{preparer: p, active: active, now: time.Now, log: log,
		waiting: map[string]time.Time{}, wake: make(chan struct{}, 1)}
}

// start hands the hint on. An error is no reason to refuse the pod: without
// preparation the sandbox is made from what CRI says.
func (p *preparations) start(hint vmpod.Hint) {
	uid := hint.Owner.PodUID
	p.mu.Lock()
	p.waiting[uid] = p.now()
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), prepareTimeout)
	defer cancel()
	if err := p.preparer.Prepare(ctx, hint); err != nil {
		preparationsTotal.WithLabelValues("failed").Inc()
		p.log.Warn("pod VM could not be prepared; its sandbox will make it", "pod_uid", uid, "err", err)
		p.used(uid)
		return
	}
	preparationsTotal.WithLabelValues("started").Inc()
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// resize hands on how large the VM of a pod that runs is to be. Without it the
// runtime grows the VM by what CRI says.
func (p *preparations) resize(hint vmpod.Hint) {
	r, ok := p.preparer.(vmpod.Resizer)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), prepareTimeout)
	defer cancel()
	if err := r.Resize(ctx, hint); err != nil {
		p.log.Warn("the runtime could not be told the pod VM's new size", "pod_uid", hint.Owner.PodUID, "err", err)
	}
}

// canResize asks whether the VM of a pod that runs has room for a hint.
func (p *preparations) canResize(hint vmpod.Hint) error {
	r, ok := p.preparer.(vmpod.Resizer)
	if !ok {
		return nil
	}
	return r.CanResize(context.Background(), hint)
}

// used says that the pod has a sandbox.
func (p *preparations) used(uid string) {
	p.mu.Lock()
	delete(p.waiting, uid)
	p.mu.Unlock()
}

// run sweeps while something is waiting, and sleeps otherwise.
func (p *preparations) run(ctx context.Context) {
	for {
		p.mu.Lock()
		idle := len(p.waiting) == 0
		p.mu.Unlock()
		var tick <-chan time.Time
		if !idle {
			tick = time.After(sweepInterval)
		}
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-tick:
			p.sweep(ctx)
		}
	}
}

func (p *preparations) sweep(ctx context.Context) {
	active := p.active()
	if active == nil {
		return
	}
	var unused []string
	p.mu.Lock()
	for uid, since := range p.waiting {
		switch age := p.now().Sub(since); {
		case age < sweepInterval: // the kubelet is still deciding
		case age > unusedAfter:
			delete(p.waiting, uid)
		case !active[uid]:
			unused = append(unused, uid)
			delete(p.waiting, uid)
		}
	}
	p.mu.Unlock()
	for _, uid := range unused {
		ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
		if err := p.preparer.Forget(ctx, uid); err != nil {
			p.log.Warn("preparation of a pod that will not run could not be dropped", "pod_uid", uid, "err", err)
		}
		cancel()
		preparationsTotal.WithLabelValues("forgotten").Inc()
	}
}
