package vc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// ensurePool makes a namespace's pool in one zone, or mends it.
//
// It is made under a name that proves whose it is, marked, and then named: a
// crash in between leaves nothing that the next call would not find, and a pool
// that somebody else made under the namespace's name is never taken for ours.
func (c *Client) ensurePool(ctx context.Context, ns Namespace, want Pool, have State) error {
	parent, cluster, err := c.ensureParentPool(ctx, want.Zone)
	if err != nil {
		return err
	}
	p, _ := poolOf(have, want.Zone)
	if p == nil {
		if taken, ok := c.taken(parent, ns.Name); ok {
			return c.foreign("resource pool", c.options.ParentPool+"/"+ns.Name, taken)
		}
		id, err := c.createPool(ctx, parent, cluster, c.cache.unfinished(ns.UID), want)
		if err != nil {
			return err
		}
		c.cache.mu.Lock()
		made := c.poolState(id, c.cache.objects[id])
		c.cache.mu.Unlock()
		p = &made
	}
	return c.mendPool(ctx, ns, want, *p, parent)
}

// taken is what has a name under a parent.
func (c *Client) taken(parent ref, name string) (ref, bool) {
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	id, ok := c.cache.names[slot{parent, name}]
	return id, ok
}

func (c *Client) createPool(ctx context.Context, parent, cluster ref, name string, want Pool) (ref, error) {
	known := map[string]any{propName: name, propParent: parent, propOwner: cluster}
	res, err := methods.CreateResourcePool(ctx, c.session, &types.CreateResourcePool{This: parent, Name: name, Spec: poolSpec(want)})
	if err != nil {
		// An earlier call of ours whose answer was lost; what it made may be older
		// than want.
		if id, ok := vsphere.Duplicate(err); ok {
			c.write(id, known)
			return id, nil
		}
		return ref{}, limits(vsphere.Fault(err), c.failed(parent, fmt.Sprintf("create resource pool %q%s", name, inZone(want.Zone)), err))
	}
	known[propCPU], known[propMemory] = normal(want.CPU), normal(want.Memory)
	c.write(res.Returnval, known)
	return res.Returnval, nil
}

// mendPool makes a pool that is there as ns says.
func (c *Client) mendPool(ctx context.Context, ns Namespace, want Pool, have PoolState, parent ref) error {
	id, what := poolRef(have.ID), poolObject(have.Path)
	if err := c.claim(ctx, ns.Ref, id, what); err != nil {
		return err
	}
	var errs []error
	if !have.InPlace {
		c.cache.expect(id, map[string]any{propParent: parent})
		if _, err := methods.MoveIntoResourcePool(ctx, c.session, &types.MoveIntoResourcePool{This: parent, List: []ref{id}}); err != nil {
			errs = append(errs, c.failed(id, "move "+what+" back to its parent", err))
		} else {
			c.write(id, map[string]any{propParent: parent})
		}
	}
	errs = append(errs, c.configurePool(ctx, ns, want, have, parent))
	if have.Description != ns.Description {
		errs = append(errs, c.setField(ctx, id, what, AttributeDescription, ns.Description))
	}
	for _, name := range slices.Sorted(maps.Keys(ns.Attributes)) {
		if value := ns.Attributes[name]; value != have.Attributes[name] {
			errs = append(errs, c.setField(ctx, id, what, name, value))
		}
	}
	return errors.Join(errs...)
}

// configurePool sets name and allocations, in one call.
func (c *Client) configurePool(ctx context.Context, ns Namespace, want Pool, have PoolState, parent ref) error {
	id := poolRef(have.ID)
	req := &types.UpdateConfig{This: id}
	now := map[string]any{}
	var conflict error
	if have.Name != ns.Name {
		if taken, ok := c.taken(parent, ns.Name); ok && taken != id {
			conflict = c.foreign("resource pool", c.options.ParentPool+"/"+ns.Name, taken)
		} else {
			req.Name, now[propName] = ns.Name, ns.Name
		}
	}
	if normal(want.CPU) != normal(have.CPU) || normal(want.Memory) != normal(have.Memory) {
		spec := poolSpec(want)
		req.Config = &spec
		now[propCPU], now[propMemory] = normal(want.CPU), normal(want.Memory)
	}
	if len(now) == 0 {
		return conflict
	}
	c.cache.expect(id, now)
	if _, err := methods.UpdateConfig(ctx, c.session, req); err != nil {
		if taken, ok := vsphere.Duplicate(err); ok {
			c.cache.expect(id, nil)
			return errors.Join(conflict, c.foreign("resource pool", c.options.ParentPool+"/"+ns.Name, taken))
		}
		what := fmt.Sprintf("set %s to CPU %s and memory %s", poolObject(have.Path), want.CPU.text("MHz"), want.Memory.text("MiB"))
		return errors.Join(conflict, limits(vsphere.Fault(err), c.failed(id, what, err)))
	}
	c.write(id, now)
	return conflict
}

func poolSpec(p Pool) types.ResourceConfigSpec {
	return types.ResourceConfigSpec{CpuAllocation: allocationInfo(p.CPU), MemoryAllocation: allocationInfo(p.Memory)}
}

func allocationInfo(a Allocation) types.ResourceAllocationInfo {
	a = normal(a)
	expandable := !a.Fixed
	return types.ResourceAllocationInfo{
		Limit: &a.Limit, Reservation: &a.Reservation, ExpandableReservation: &expandable,
		Shares: &types.SharesInfo{Level: types.SharesLevel(a.Shares.Level), Shares: a.Shares.Value},
	}
}

// ensureParentPool finds a zone's parent pool, or makes it: expandable, normal
// shares, no limit.
func (c *Client) ensureParentPool(ctx context.Context, zone string) (parent, cluster ref, err error) {
	i := slices.IndexFunc(c.options.Zones, func(z Zone) bool { return z.Name == zone })
	find := func() (root ref, found bool, err error) {
		c.cache.mu.Lock()
		defer c.cache.mu.Unlock()
		if _, err := c.datacenter(); err != nil {
			return ref{}, false, err
		}
		if cluster, err = c.cluster(c.options.Zones[i]); err != nil {
			return ref{}, false, err
		}
		parent, found = c.parentPool(cluster)
		return c.cache.objects[cluster].ref(propRoot), found, nil
	}
	if _, found, err := find(); found || err != nil {
		return parent, cluster, err
	}
	unlock, err := c.lock(ctx, "parent pool of "+cluster.Value)
	if err != nil {
		return ref{}, ref{}, err
	}
	defer unlock()
	root, found, err := find()
	if found || err != nil {
		return parent, cluster, err
	}
	free := Allocation{Limit: Unlimited}
	parent, err = c.createPool(ctx, root, cluster, c.options.ParentPool, Pool{Zone: zone, CPU: free, Memory: free})
	return parent, cluster, err
}
