package vc

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/keylock"
	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/internal/vsphere"
)

const (
	defaultPolicyInterval = 5 * time.Minute
	minPolicyInterval     = 10 * time.Second
	// taskTimeout bounds what Ensure and Delete wait for one task, whose end is
	// unknown then.
	taskTimeout = 5 * time.Minute
)

// A Client keeps the vSphere side of one supervisor's namespaces. Its methods
// are safe for concurrent use; until Run has connected, and while it has lost
// the connection, they are ErrUnavailable.
type Client struct {
	options   Options
	session   *vsphere.Session
	watch     *vsphere.Watch
	tasks     *vsphere.Tasks
	cache     *cache
	fields    fields
	roles     roles
	tags      tags
	policies  policies
	ownGroups ownGroups
	locks     keylock.Locks[string]
	wrote     chan struct{} // a write awaits its echo
}

// New checks the options, ErrInvalidArgument if they cannot be; it makes no
// call.
func New(o Options) (*Client, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	c := &Client{options: o, cache: newCache(o.Supervisor), wrote: make(chan struct{}, 1)}
	session, err := vsphere.NewSession(vsphere.Config{
		Address: o.Address, CA: o.CA, Thumbprint: o.Thumbprint,
		UserAgent: "Atoll/" + version.Version,
		Credentials: func(ctx context.Context) (string, string, error) {
			cred, err := o.Credentials(ctx)
			return cred.User, cred.Password, err
		},
		Observe: func(call vsphere.Call) { c.observe(call) },
	})
	if err != nil {
		return nil, err
	}
	c.session = session
	c.watch = vsphere.NewWatch(session, vsphere.WatchConfig{Types: watched, Setup: c.setup}, c.cache)
	c.tasks = vsphere.NewTasks(c.watch)
	c.cache.notify = func(r Ref) {
		if o.Notify.Namespace != nil {
			o.Notify.Namespace(r)
		}
	}
	c.cache.health = func() {
		if o.Notify.Health != nil {
			o.Notify.Health()
		}
		c.policies.wake()
	}
	c.policies.poke = make(chan struct{}, 1)
	return c, nil
}

func (o *Options) complete() error {
	switch {
	case o.Credentials == nil:
		return fmt.Errorf("vCenter %s: no credentials: %w", o.Address, errdefs.ErrInvalidArgument)
	case o.Supervisor == "" || strings.Contains(o.Supervisor, "/"):
		return fmt.Errorf("supervisor id %q: it must be there, without '/': %w", o.Supervisor, errdefs.ErrInvalidArgument)
	case len(o.Zones) == 0:
		return fmt.Errorf("vCenter %s: no zones: name at least one cluster: %w", o.Address, errdefs.ErrInvalidArgument)
	}
	for i, z := range o.Zones {
		if slices.ContainsFunc(o.Zones[:i], func(p Zone) bool { return p.Name == z.Name || p.Cluster == z.Cluster }) {
			return fmt.Errorf("zone %q with cluster %q is there twice: %w", z.Name, z.Cluster, errdefs.ErrInvalidArgument)
		}
	}
	names := map[string]Role{}
	for r, b := range builtin {
		name := b.name
		if o.Roles[r] != "" {
			name = o.Roles[r]
		}
		if other, ok := names[name]; ok {
			return fmt.Errorf("role %q stands for %s and for %s: one each, or they could not be told apart: %w", name, r, other, errdefs.ErrInvalidArgument)
		}
		names[name] = r
	}
	if o.ParentPool == "" {
		o.ParentPool = DefaultParent
	}
	if o.ParentFolder == "" {
		o.ParentFolder = DefaultParent
	}
	if o.PolicyInterval == 0 {
		o.PolicyInterval = defaultPolicyInterval
	}
	o.PolicyInterval = max(o.PolicyInterval, minPolicyInterval)
	return nil
}

// Run connects, watches and connects again, until ctx is done; then it logs out
// and returns nil. It is called once.
func (c *Client) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { c.settle(ctx) })
	wg.Go(func() { c.pollPolicies(ctx) })
	err := c.watch.Run(ctx)
	wg.Wait()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	c.cache.Lost(nil)
	c.tags.logout(ctx)
	c.session.Logout(ctx)
	return err
}

// observe tells whoever counts of a call; its error gets the class that callers
// see.
func (c *Client) observe(call vsphere.Call) {
	if c.options.Observe != nil {
		c.options.Observe(call.Method, call.Took, vsphere.Error(call.Method, call.Err))
	}
}

// settle looks after what was written and has not come back through the watch.
func (c *Client) settle(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wrote:
		}
		for c.cache.settle() {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
	}
}

// write notes what a call of ours made true.
func (c *Client) write(r ref, props map[string]any) {
	c.cache.write(r, props)
	select {
	case c.wrote <- struct{}{}:
	default:
	}
}

// Health makes no call.
func (c *Client) Health() Health {
	about := c.session.About()
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	h := Health{
		Connected: c.cache.synced, Since: c.cache.since, Err: c.cache.unsynced(c.session.Address()),
		Address: c.session.Address(), LastUpdate: c.watch.Heard(), Lag: c.cache.lag, PermissionsErr: c.cache.permsErr,
	}
	if c.cache.synced {
		h.Version, h.InstanceID = about.FullName, about.InstanceUuid
	}
	return h
}

// lock waits until nobody else works on what key names.
func (c *Client) lock(ctx context.Context, key string) (unlock func(), err error) {
	if unlock, err = c.locks.Lock(ctx, key); err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	return unlock, nil
}
