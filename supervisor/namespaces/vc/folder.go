package vc

import (
	"context"
	"errors"
	"fmt"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/vsphere"
)

// ensureFolder makes a namespace's VM folder, or mends it, as ensurePool does.
func (c *Client) ensureFolder(ctx context.Context, ns Namespace, have State) error {
	parent, err := c.ensureParentFolder(ctx)
	if err != nil {
		return err
	}
	f := have.Folder
	if f == nil {
		if taken, ok := c.taken(parent, ns.Name); ok {
			return c.foreign("VM folder", c.options.ParentFolder+"/"+ns.Name, taken)
		}
		id, err := c.createFolder(ctx, parent, c.cache.unfinished(ns.UID))
		if err != nil {
			return err
		}
		c.cache.mu.Lock()
		made := c.folderState(id, c.cache.objects[id])
		c.cache.mu.Unlock()
		f = &made
	}
	id, what := folderRef(f.ID), fmt.Sprintf("VM folder %q", f.Path)
	if err := c.claim(ctx, ns.Ref, id, what); err != nil {
		return err
	}
	var errs []error
	if !f.InPlace {
		c.cache.expect(id, map[string]any{propParent: parent})
		err := c.task(ctx, id, func(ctx context.Context) (ref, error) {
			res, err := methods.MoveIntoFolder_Task(ctx, c.session, &types.MoveIntoFolder_Task{This: parent, List: []ref{id}})
			if err != nil {
				return ref{}, err
			}
			return res.Returnval, nil
		})
		if err != nil {
			errs = append(errs, c.failed(id, "move "+what+" back to its parent", err))
		} else {
			c.write(id, map[string]any{propParent: parent})
		}
	}
	if f.Name != ns.Name {
		errs = append(errs, c.renameFolder(ctx, ns, id, what, parent))
	}
	return errors.Join(errs...)
}

func (c *Client) renameFolder(ctx context.Context, ns Namespace, id ref, what string, parent ref) error {
	name := c.options.ParentFolder + "/" + ns.Name
	if taken, ok := c.taken(parent, ns.Name); ok && taken != id {
		return c.foreign("VM folder", name, taken)
	}
	c.cache.expect(id, map[string]any{propName: ns.Name})
	seen, forget := c.cache.renaming(id, ns.Name)
	defer forget()
	err := c.taskUnlessSeen(ctx, id, seen, func(ctx context.Context) (ref, error) {
		res, err := methods.Rename_Task(ctx, c.session, &types.Rename_Task{This: id, NewName: ns.Name})
		if err != nil {
			return ref{}, err
		}
		return res.Returnval, nil
	})
	if err != nil {
		if taken, ok := vsphere.Duplicate(err); ok {
			c.cache.expect(id, nil)
			return c.foreign("VM folder", name, taken)
		}
		return c.failed(id, fmt.Sprintf("rename %s to %q", what, ns.Name), err)
	}
	c.write(id, map[string]any{propName: ns.Name})
	return nil
}

func (c *Client) createFolder(ctx context.Context, parent ref, name string) (ref, error) {
	known := map[string]any{propName: name, propParent: parent}
	res, err := methods.CreateFolder(ctx, c.session, &types.CreateFolder{This: parent, Name: name})
	if err != nil {
		if id, ok := vsphere.Duplicate(err); ok { // of a call of ours whose answer was lost
			c.write(id, known)
			return id, nil
		}
		return ref{}, c.failed(parent, fmt.Sprintf("create VM folder %q", name), err)
	}
	c.write(res.Returnval, known)
	return res.Returnval, nil
}

func (c *Client) ensureParentFolder(ctx context.Context) (ref, error) {
	find := func() (parent, vms ref, found bool, err error) {
		c.cache.mu.Lock()
		defer c.cache.mu.Unlock()
		dc, err := c.datacenter()
		if err != nil {
			return ref{}, ref{}, false, err
		}
		parent, found = c.parentFolder()
		return parent, c.cache.objects[dc].ref(propVMs), found, nil
	}
	if parent, _, found, err := find(); found || err != nil {
		return parent, err
	}
	unlock, err := c.lock(ctx, "parent folder")
	if err != nil {
		return ref{}, err
	}
	defer unlock()
	parent, vms, found, err := find()
	if found || err != nil {
		return parent, err
	}
	return c.createFolder(ctx, vms, c.options.ParentFolder)
}

// task runs one task on an object of ours.
func (c *Client) task(ctx context.Context, id ref, start func(context.Context) (ref, error)) error {
	return c.taskUnlessSeen(ctx, id, nil, start)
}

// taskUnlessSeen spares the call that asks how the task ended where the watch
// shows it first; see vsphere.Tasks.
func (c *Client) taskUnlessSeen(ctx context.Context, id ref, seen <-chan struct{}, start func(context.Context) (ref, error)) error {
	ctx, cancel := context.WithTimeout(ctx, taskTimeout)
	defer cancel()
	_, err := c.tasks.DoUnlessSeen(ctx, id, seen, start)
	return err
}
