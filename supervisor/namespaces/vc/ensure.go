package vc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/types"
)

// maxName is vSphere's limit for names, in bytes.
const maxName = 80

// Ensure makes vSphere as ns says, and returns what then is. It is idempotent,
// one at a time a namespace. With nothing to change it makes no call; changed
// limits are one call a pool. After a crash at any point the next Ensure finds
// what was made: never a duplicate. Pools of zones that are no longer asked for
// go when they are empty.
//
// It mends every Drift: to adopt instead, change ns first. On an error the
// State is what was reached, and the others of ns' objects were still tried.
func (c *Client) Ensure(ctx context.Context, ns Namespace) (State, error) {
	if err := ns.validate(c.options); err != nil {
		return State{Ref: ns.Ref}, err
	}
	unlock, err := c.lock(ctx, "namespace "+ns.UID)
	if err != nil {
		return State{Ref: ns.Ref}, err
	}
	defer unlock()
	have, err := c.State(ns.Ref)
	if err != nil {
		return State{Ref: ns.Ref}, fmt.Errorf("namespace %s: %w", ns.Name, err)
	}
	tags, err := c.missingTags(ctx, ns, have)
	drift := Diff(ns, have)
	if err == nil && len(tags) == 0 && len(drift) == 0 && c.marked(have) {
		return have, nil
	}
	errs := []error{err}
	if len(drift) > 0 || !c.marked(have) {
		errs = append(errs, c.mend(ctx, ns, have, drift))
	}
	have, err = c.State(ns.Ref)
	if err != nil {
		errs = append(errs, err)
	} else if len(tags) > 0 {
		errs = append(errs, c.attachTags(ctx, ns, have))
	}
	if err := errors.Join(errs...); err != nil {
		return have, fmt.Errorf("namespace %s: %w", ns.Name, err)
	}
	return have, nil
}

// mend makes or changes what drift says.
func (c *Client) mend(ctx context.Context, ns Namespace, have State, drift []Drift) error {
	if slices.ContainsFunc(drift, func(d Drift) bool { return d.Field == FieldMissing }) {
		if err := c.confirmGone(ctx, ns.Ref); err != nil {
			return err
		}
	}
	var wg sync.WaitGroup
	errs := make([]error, len(ns.Pools)+1)
	for i, want := range ns.Pools {
		wg.Go(func() { errs[i] = c.ensurePool(ctx, ns, want, have) })
	}
	wg.Go(func() { errs[len(ns.Pools)] = c.ensureFolder(ctx, ns, have) })
	wg.Wait()
	for _, d := range drift {
		if d.Field == FieldExtra {
			errs = append(errs, c.removePool(ctx, ns.Ref, poolRef(d.Have)))
		}
	}
	errs = append(errs, about(FieldAccess, c.ensureAccess(ctx, ns)))
	return errors.Join(errs...)
}

// marked tells whether everything of a namespace bears its mark: what was made
// just before a crash does not.
func (c *Client) marked(s State) bool {
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	for id := range c.cache.owned[s.UID] {
		if !c.cache.bears(id, s.Ref) {
			return false
		}
	}
	return true
}

// claim gives a pool or folder of a namespace's its mark, where it lacks it.
func (c *Client) claim(ctx context.Context, r Ref, id ref, what string) error {
	c.cache.mu.Lock()
	marked := c.cache.bears(id, r)
	c.cache.mu.Unlock()
	if marked {
		return nil
	}
	return c.setField(ctx, id, what, AttributeOwner, c.cache.mark(r, id))
}

// bears tells whether an object has a namespace's mark. It wants mu held.
func (c *cache) bears(id ref, r Ref) bool {
	o := c.objects[id]
	return o != nil && o.str(c.ownerProp()) == c.mark(r, id)
}

func poolRef(id string) ref   { return ref{Type: "ResourcePool", Value: id} }
func folderRef(id string) ref { return ref{Type: "Folder", Value: id} }

func (n Namespace) validate(o Options) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("namespace %q: %s: %w", n.Name, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	switch {
	case n.Name == "" || len(n.Name) > maxName || strings.ContainsAny(n.Name, "/\\%"):
		return bad("a name has 1 to %d bytes, without / \\ %%", maxName)
	case strings.HasPrefix(n.Name, unfinishedPrefix):
		return bad("names that start with %q are taken", unfinishedPrefix)
	case n.UID == "" || strings.ContainsAny(n.UID, "/.") || len(n.UID) > 40:
		return bad("its uid %q is none", n.UID)
	case len(n.Pools) == 0:
		return bad("it asks for no zone")
	}
	for i, p := range n.Pools {
		if slices.ContainsFunc(n.Pools[:i], func(q Pool) bool { return q.Zone == p.Zone }) {
			return bad("zone %q is there twice", p.Zone)
		}
		if !slices.ContainsFunc(o.Zones, func(z Zone) bool { return z.Name == p.Zone }) {
			return bad("the supervisor has no zone %q", p.Zone)
		}
		if err := p.CPU.validate(); err != nil {
			return about(FieldCPU, bad("CPU%s: %v", inZone(p.Zone), err))
		}
		if err := p.Memory.validate(); err != nil {
			return about(FieldMemory, bad("memory%s: %v", inZone(p.Zone), err))
		}
	}
	for _, a := range n.Access {
		if _, ok := builtin[a.Role]; !ok || a.Subject == "" || strings.ContainsAny(a.Subject+a.Domain, "\\@\t\n") {
			return about(FieldAccess, bad("access of %q in domain %q as %q: a subject, its domain, and owner, edit or view are wanted", a.Subject, a.Domain, a.Role))
		}
	}
	for name := range n.Attributes {
		if name == "" || strings.HasPrefix(name, attributePrefix) {
			return bad("attribute %q: names that start with %q are Atoll's", name, attributePrefix)
		}
	}
	return nil
}

func (a Allocation) validate() error {
	switch {
	case a.Limit == 0 || a.Limit < Unlimited:
		return fmt.Errorf("a limit of %d is none: more than 0, or %d for no limit", a.Limit, Unlimited)
	case a.Reservation < 0:
		return fmt.Errorf("a reservation of %d is less than nothing", a.Reservation)
	case a.Limit > 0 && a.Reservation > a.Limit:
		return fmt.Errorf("the reservation of %d is more than the limit of %d", a.Reservation, a.Limit)
	}
	switch a.Shares.Level {
	case "", SharesLow, SharesNormal, SharesHigh:
	case SharesCustom:
		if a.Shares.Value < 1 {
			return fmt.Errorf("custom shares of %d are none", a.Shares.Value)
		}
	default:
		return fmt.Errorf("shares are low, normal, high or custom, not %q", a.Shares.Level)
	}
	return nil
}

// foreign says whose object has the name that a namespace wants.
func (c *Client) foreign(what, name string, id ref) error {
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	whose := "it bears no mark of Atoll"
	if o := c.cache.objects[id]; o != nil {
		mark := o.str(c.cache.ownerProp())
		if r, ours := c.cache.owner(id, o); ours {
			whose = fmt.Sprintf("it belongs to namespace %s with uid %s, which has to go first", r.Name, r.UID)
		} else if strings.HasPrefix(mark, c.cache.supervisor+"/") {
			whose = fmt.Sprintf("its attribute %s is that of another object, and makes it nobody's", AttributeOwner)
		} else if mark != "" {
			whose = "it belongs to another supervisor"
		}
	}
	return about(FieldName, fmt.Errorf("%s %q (%s) is there and is not this namespace's: %s: rename or remove it, or choose another name: %w", what, name, id.Value, whose, errdefs.ErrAlreadyExists))
}

// about says which field of a namespace an error is about.
func about(f Field, err error) error {
	if err == nil {
		return nil
	}
	return &PartError{Field: f, Err: err}
}

// limits says which allocation an error of a pool's is about, as far as vCenter
// tells.
func limits(fault types.BaseMethodFault, err error) error {
	switch f := fault.(type) {
	case *types.InsufficientCpuResourcesFault:
		return about(FieldCPU, err)
	case *types.InsufficientMemoryResourcesFault:
		return about(FieldMemory, err)
	case *types.InvalidArgument:
		if strings.Contains(f.InvalidProperty, "cpuAllocation") {
			return about(FieldCPU, err)
		}
		if strings.Contains(f.InvalidProperty, "memoryAllocation") {
			return about(FieldMemory, err)
		}
	}
	return err
}
