package namespaces

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

// A VCenter is the vSphere side, as package vc has it: see there for the
// contract.
type VCenter interface {
	Run(ctx context.Context) error
	Ensure(ctx context.Context, ns vc.Namespace) (vc.State, error)
	Delete(ctx context.Context, ref vc.Ref) error
	Post(ctx context.Context, ref vc.Ref, e vc.Event) error

	State(ref vc.Ref) (vc.State, error)
	List() ([]vc.Ref, error)
	Zones() ([]vc.ZoneState, error)
	Policies() ([]vc.Policy, time.Time, error)
	Health() vc.Health
}

// settleTime is how long a connection may take, or be lost, before namespaces'
// status says so: a short break is no news.
const settleTime = 10 * time.Second

// A connection holds the client of the Supervisor's vCenter, of which there is
// one at a time.
type connection struct {
	live    client.Reader
	metrics *metrics
	log     *slog.Logger
	id      string // of this supervisor, in vSphere

	namespaces, supervisors, policies *feed

	mu      sync.Mutex
	vcenter VCenter
	key     string // of what it was made from
	since   time.Time
	stop    func()
	err     error // why there is none
	awaited bool  // by a namespace, since the last time that it came back
	usage   map[string]time.Time
}

// client is the vCenter, connected or not; ErrUnavailable without one.
func (c *connection) client() (VCenter, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.vcenter != nil:
		return c.vcenter, nil
	case c.err != nil:
		return nil, c.err
	}
	return nil, fmt.Errorf("the Supervisor has not been looked at yet: %w", errdefs.ErrUnavailable)
}

func (c *connection) connected() bool {
	vcenter, err := c.client()
	return err == nil && vcenter.Health().Connected
}

// await notes that a namespace found vCenter away, and is to be looked at when
// it is back.
func (c *connection) await() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.awaited = true
}

// takeAwaited tells whether any did, since this was asked last.
func (c *connection) takeAwaited() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.awaited
	c.awaited = false
	return was
}

// settling is while a new connection may still come about by itself.
func (c *connection) settling(now time.Time) bool {
	c.mu.Lock()
	vcenter, since, err := c.vcenter, c.since, c.err
	c.mu.Unlock()
	if vcenter == nil {
		return err == nil
	}
	return now.Sub(since) < settleTime && !vcenter.Health().Connected
}

// awaitSettled is settling, for a namespace, which is looked at when that is over.
// A new connection may also have been there and be lost again.
func (c *connection) awaitSettled(now time.Time) bool {
	if !c.settling(now) {
		return false
	}
	c.await() // before the question, or its return might be missed
	return c.settling(now)
}

// missing is the API server's answer to whether there is a Supervisor.
func (c *connection) missing(ctx context.Context) error {
	return c.live.Get(ctx, client.ObjectKey{Name: v1alpha1.SupervisorName}, &v1alpha1.Supervisor{})
}

// use connects as options say, unless it already does, and drops what was there
// before.
func (c *connection) use(o vc.Options, key string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.key == key && (c.vcenter != nil || c.err != nil) {
		return c.err
	}
	c.dropLocked()
	o.Supervisor, o.Observe = c.id, c.metrics.vcenterCall
	o.Notify = vc.Notify{
		Namespace: func(r vc.Ref) {
			if r.Name != "" {
				c.namespaces.add(r.Name)
			}
		},
		Policies: func() { c.policies.add(v1alpha1.SupervisorName) },
		Health:   func() { c.supervisors.add(v1alpha1.SupervisorName) },
	}
	c.key, c.since = key, time.Now()
	vcenter, err := vc.New(o)
	if err != nil {
		c.err = err
		return err
	}
	c.vcenter, c.err = vcenter, nil
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := vcenter.Run(ctx); err != nil && ctx.Err() == nil {
			c.log.Error("watch of vCenter ended", "error", err)
		}
	}()
	c.stop = func() { cancel(); <-done }
	return nil
}

// drop ends the connection, because of err or because there is no Supervisor.
func (c *connection) drop(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked()
	c.err = err
}

func (c *connection) dropLocked() {
	if c.stop != nil {
		c.stop()
	}
	c.vcenter, c.stop, c.err, c.key = nil, nil, nil, ""
}

func (c *connection) lastUsage(name string) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.usage[name]
}

func (c *connection) setLastUsage(name string, t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.usage[name] = t
}

// forget a namespace that is gone.
func (c *connection) forget(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.usage, name)
}

// credentials are read from the Secret at each login: it is in no cache.
func credentials(live client.Reader, ref v1alpha1.SecretReference) func(context.Context) (vc.Credentials, error) {
	read := vsphere.FromSecret(ref.Namespace, ref.Name, func(ctx context.Context, namespace, name string) (map[string][]byte, error) {
		s := &corev1.Secret{}
		err := live.Get(ctx, client.ObjectKey{Namespace: namespace, Name: name}, s)
		return s.Data, err
	})
	return func(ctx context.Context) (c vc.Credentials, err error) {
		c.User, c.Password, err = read(ctx)
		return c, err
	}
}

// A feed puts names into a controller's queue, without blocking and each once.
type feed struct {
	mu    sync.Mutex
	queue workqueue.TypedRateLimitingInterface[reconcile.Request]
}

// source is what the controller starts.
func (f *feed) source() source.Source {
	return source.Func(func(_ context.Context, q workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.queue = q
		return nil
	})
}

func (f *feed) add(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.queue != nil {
		f.queue.Add(reconcile.Request{NamespacedName: client.ObjectKey{Name: name}})
	}
}
