package vc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vapi/rest"
	vapi "github.com/vmware/govmomi/vapi/tags"

	"github.com/openatoll/atoll/internal/vsphere"
)

// tags are attached over REST, in a session that is made when the first tag is
// asked for. vCenter has no watch for tags: what has one is read when it is
// first asked for, and with the policies, a call a tag, so that one that an
// administrator takes away is missed within PolicyInterval.
type tags struct {
	mu      sync.Mutex
	client  *rest.Client
	byName  map[string]string          // "category/name" or id → id
	holders map[string]map[string]bool // tag's id → ids of pools
}

func (t *tags) logout(ctx context.Context) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.client != nil {
		_ = t.client.Logout(ctx) // vCenter ends idle sessions itself
	}
	t.client = nil
}

// missingTags are those of ns' tags that a pool of it lacks.
func (c *Client) missingTags(ctx context.Context, ns Namespace, have State) ([]string, error) {
	if len(ns.Tags) == 0 {
		return nil, nil
	}
	c.tags.mu.Lock()
	defer c.tags.mu.Unlock()
	var missing []string
	var errs []error
	for _, tag := range ns.Tags {
		holders, err := c.holders(ctx, tag)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all := len(have.Pools) >= len(ns.Pools)
		for _, p := range have.Pools {
			all = all && holders[p.ID]
		}
		if !all {
			missing = append(missing, tag)
		}
	}
	return missing, errors.Join(errs...)
}

// attachTags gives the tags to the pools that lack them.
func (c *Client) attachTags(ctx context.Context, ns Namespace, have State) error {
	c.tags.mu.Lock()
	defer c.tags.mu.Unlock()
	var errs []error
	for _, tag := range ns.Tags {
		for _, p := range have.Pools {
			holders, err := c.holders(ctx, tag)
			if err != nil {
				errs = append(errs, err)
				break
			}
			if holders[p.ID] {
				continue
			}
			err = c.tagging(ctx, func(m *vapi.Manager) error { return m.AttachTag(ctx, c.tags.byName[tag], poolRef(p.ID)) })
			if err != nil {
				errs = append(errs, about(FieldTag, tagError(fmt.Sprintf("attach tag %s to %s", tag, poolObject(p.Path)), err)))
				continue
			}
			holders[p.ID] = true
		}
	}
	return errors.Join(errs...)
}

// holders are the pools that have a tag. It wants tags.mu held.
func (c *Client) holders(ctx context.Context, tag string) (map[string]bool, error) {
	if held, ok := c.tags.holders[c.tags.byName[tag]]; ok {
		return held, nil
	}
	held := map[string]bool{}
	var id string
	err := c.tagging(ctx, func(m *vapi.Manager) error {
		found, err := findTag(ctx, m, tag)
		if err != nil {
			return err
		}
		id = found
		objects, err := m.ListAttachedObjects(ctx, id)
		for _, o := range objects {
			held[o.Reference().Value] = true
		}
		return err
	})
	if err != nil {
		return nil, about(FieldTag, tagError("find tag "+tag, err))
	}
	if c.tags.byName == nil {
		c.tags.byName, c.tags.holders = map[string]string{}, map[string]map[string]bool{}
	}
	c.tags.byName[tag], c.tags.holders[id] = id, held
	return held, nil
}

// readTags asks anew which pools have the tags that were asked for, and has the
// namespaces looked at whose pools have lost one.
func (c *Client) readTags(ctx context.Context) error {
	lost, err := c.lostTags(ctx)
	touched := map[Ref]bool{}
	c.cache.mu.Lock()
	for _, id := range lost {
		if o := c.cache.objects[poolRef(id)]; o != nil {
			c.cache.touched(poolRef(id), o, touched)
		}
	}
	c.cache.mu.Unlock()
	c.cache.tell(touched)
	return err
}

// lostTags are pools without a tag that they had.
func (c *Client) lostTags(ctx context.Context) (pools []string, err error) {
	c.tags.mu.Lock()
	defer c.tags.mu.Unlock()
	for id, held := range c.tags.holders {
		now := map[string]bool{}
		err := c.tagging(ctx, func(m *vapi.Manager) error {
			objects, err := m.ListAttachedObjects(ctx, id)
			for _, o := range objects {
				now[o.Reference().Value] = true
			}
			return err
		})
		gone := rest.IsStatusError(err, http.StatusNotFound)
		if err != nil && !gone {
			return pools, tagError("read what has tag "+id, err) // what is known stays
		}
		for pool := range held {
			if !now[pool] {
				pools = append(pools, pool)
			}
		}
		c.tags.holders[id] = now
		if gone { // whoever asks for it next is told
			delete(c.tags.holders, id)
			maps.DeleteFunc(c.tags.byName, func(_, other string) bool { return other == id })
		}
	}
	return pools, nil
}

func findTag(ctx context.Context, m *vapi.Manager, tag string) (string, error) {
	if category, name, ok := strings.Cut(tag, "/"); ok {
		t, err := m.GetTagForCategory(ctx, name, category)
		if err != nil {
			return "", err
		}
		return t.ID, nil
	}
	t, err := m.GetTag(ctx, tag)
	if err != nil {
		return "", err
	}
	return t.ID, nil
}

// tagging runs f in a REST session, once more in a new one if it was dropped.
// It wants tags.mu held.
func (c *Client) tagging(ctx context.Context, f func(*vapi.Manager) error) error {
	ctx, cancel := context.WithTimeout(ctx, vsphere.DefaultTimeout)
	defer cancel()
	for again := false; ; again = true {
		if c.tags.client == nil {
			client := rest.NewClient(c.session.Client())
			client.Transport = observed{client.Transport, c.observe}
			cred, err := c.options.Credentials(ctx)
			if err != nil {
				return fmt.Errorf("credentials: %w: %w", err, errdefs.ErrUnavailable)
			}
			if err := client.Login(ctx, url.UserPassword(cred.User, cred.Password)); err != nil {
				return fmt.Errorf("log in to vCenter %s for tags: %w", c.session.Address(), err)
			}
			c.tags.client = client
		}
		err := f(vapi.NewManager(c.tags.client))
		if again || !rest.IsStatusError(err, http.StatusUnauthorized) {
			return err
		}
		c.tags.client = nil
	}
}

func tagError(what string, err error) error {
	switch {
	case rest.IsStatusError(err, http.StatusForbidden):
		return fmt.Errorf("%s: the vCenter user lacks the privilege InventoryService.Tagging.AttachTag: give it a role that has it: %w", what, errdefs.ErrPermissionDenied)
	case rest.IsStatusError(err, http.StatusNotFound), err != nil && strings.Contains(err.Error(), "not found"):
		return fmt.Errorf("%s: there is no such tag: make it, or take it off the list: %w", what, errdefs.ErrInvalidArgument)
	}
	return vsphere.Error(what, err)
}

// observed counts what goes over REST.
type observed struct {
	http.RoundTripper
	observe func(vsphere.Call)
}

func (o observed) RoundTrip(r *http.Request) (*http.Response, error) {
	start := time.Now()
	res, err := o.RoundTripper.RoundTrip(r)
	o.observe(vsphere.Call{Method: "REST " + r.Method, Took: time.Since(start), Err: err})
	return res, err
}
