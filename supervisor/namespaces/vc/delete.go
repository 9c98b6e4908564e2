package vc

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// Delete removes the namespace's pools and folder, which bear its mark and hold
// no VM, child pool or folder (else ErrFailedPrecondition, which names one). It
// is idempotent: nil when vCenter has confirmed that nothing is left. VMs'
// files are never deleted.
func (c *Client) Delete(ctx context.Context, r Ref) error {
	unlock, err := c.lock(ctx, "namespace "+r.UID)
	if err != nil {
		return err
	}
	defer unlock()
	c.cache.mu.Lock()
	err = c.known()
	var objects []ref
	for id := range c.cache.owned[r.UID] {
		objects = append(objects, id)
	}
	c.cache.mu.Unlock()
	if err != nil {
		return fmt.Errorf("delete namespace %s: %w", r.Name, err)
	}
	if err := c.confirmGone(ctx, r); err != nil {
		return fmt.Errorf("delete namespace %s: %w", r.Name, err)
	}
	if len(objects) == 0 {
		return nil
	}
	if objects, err = c.empty(ctx, r, objects); err != nil {
		return fmt.Errorf("delete namespace %s: %w", r.Name, err)
	}
	var wg sync.WaitGroup
	errs := make([]error, len(objects))
	for i, id := range objects {
		if id.Type == "ResourcePool" {
			wg.Go(func() { errs[i] = c.destroy(ctx, id) })
		}
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete namespace %s: %w", r.Name, err)
	}
	for i, id := range objects {
		if id.Type != "ResourcePool" {
			errs[i] = c.destroy(ctx, id)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete namespace %s: %w", r.Name, err)
	}
	return nil
}

// confirmGone asks vCenter about objects that left the watch: one that our
// account may no longer see has left it too, and is not gone.
func (c *Client) confirmGone(ctx context.Context, r Ref) error {
	c.cache.mu.Lock()
	var lost []ref
	for id := range c.cache.lost[r.UID] {
		if _, again := c.cache.owned[r.UID][id]; !again {
			lost = append(lost, id)
		}
	}
	c.cache.mu.Unlock()
	for _, id := range lost {
		if err := c.gone(ctx, r, id); err != nil {
			return err
		}
	}
	return nil
}

// gone asks vCenter whether an object that is not seen is not there, nil then.
func (c *Client) gone(ctx context.Context, r Ref, id ref) error {
	there, err := c.session.Exists(ctx, id)
	if err != nil {
		return vsphere.Error(fmt.Sprintf("see whether %s %s of namespace %s is gone", id.Type, id.Value, r.Name), err)
	}
	if there {
		return fmt.Errorf("%s %s of namespace %s is there, and its mark may not be read: see that the vCenter user has System.Read on it: %w", id.Type, id.Value, r.Name, errdefs.ErrPermissionDenied)
	}
	c.cache.gone(id)
	return nil
}

// removePool deletes one pool that is too many, if it is empty.
func (c *Client) removePool(ctx context.Context, r Ref, id ref) error {
	objects, err := c.empty(ctx, r, []ref{id})
	if err != nil || len(objects) == 0 {
		return err
	}
	return c.destroy(ctx, id)
}

// empty asks vCenter now, not the watch, whether objects still bear the mark
// and hold nothing. It returns those that are still there.
func (c *Client) empty(ctx context.Context, r Ref, objects []ref) ([]ref, error) {
	want := map[ref][]string{}
	for _, id := range objects {
		if id.Type == "ResourcePool" {
			want[id] = []string{"name", "customValue", "vm", "resourcePool"}
		} else {
			want[id] = []string{"name", "customValue", "childEntity"}
		}
	}
	found, err := c.session.Retrieve(ctx, want)
	if err != nil {
		return nil, vsphere.Error(fmt.Sprintf("see whether the pools and the folder of %s are empty", r.Name), err)
	}
	var there []ref
	var errs []error
	for _, id := range objects {
		props, ok := found[id]
		if !ok {
			errs = append(errs, c.gone(ctx, r, id))
			continue
		}
		errs = append(errs, c.removable(r, id, props))
		there = append(there, id)
	}
	return there, errors.Join(errs...)
}

func (c *Client) removable(r Ref, id ref, props map[string]types.AnyType) error {
	if props["name"] == nil {
		return fmt.Errorf("%s %s may not be read: the vCenter user lacks System.Read on it: %w", id.Type, id.Value, errdefs.ErrPermissionDenied)
	}
	o := &object{props: normalize(props)}
	c.cache.mu.Lock()
	owner, ours := c.cache.owner(id, o)
	c.cache.mu.Unlock()
	if !ours || owner.UID != r.UID {
		return fmt.Errorf("%s %q (%s) no longer bears the mark of namespace %s, and stays: %w", id.Type, o.str(propName), id.Value, r.Name, errdefs.ErrFailedPrecondition)
	}
	for _, prop := range []string{"vm", "resourcePool", "childEntity"} {
		if held, ok := props[prop].(types.ArrayOfManagedObjectReference); ok && len(held.ManagedObjectReference) > 0 {
			first := held.ManagedObjectReference[0]
			return fmt.Errorf("%s %q (%s) still holds %d objects, as %s %s: move or delete them: %w", id.Type, o.str(propName), id.Value,
				len(held.ManagedObjectReference), first.Type, first.Value, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// destroy removes a pool or a folder. A VM that came into a folder at the last
// moment is unregistered with it, not deleted as Destroy_Task would; one that
// came into a pool moves to the parent pool.
func (c *Client) destroy(ctx context.Context, id ref) error {
	err := c.task(ctx, id, func(ctx context.Context) (ref, error) {
		if id.Type == "Folder" {
			res, err := methods.UnregisterAndDestroy_Task(ctx, c.session, &types.UnregisterAndDestroy_Task{This: id})
			if err != nil {
				return ref{}, err
			}
			return res.Returnval, nil
		}
		res, err := methods.Destroy_Task(ctx, c.session, &types.Destroy_Task{This: id})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if err != nil && !vsphere.IsNotFound(err) {
		return vsphere.Error(fmt.Sprintf("delete %s %s", id.Type, id.Value), err)
	}
	c.cache.gone(id)
	return nil
}

// ownerProp is the property that holds an object's mark.
func (c *cache) ownerProp() string { return propAttr + strconv.Itoa(int(c.ownerKey)) }
