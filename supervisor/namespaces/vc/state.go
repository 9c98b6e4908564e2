package vc

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// unsynced is why nothing is known, nil if it is. It wants mu held.
func (c *cache) unsynced(address string) error {
	switch {
	case c.synced:
		return nil
	case c.cause != nil && isClassed(c.cause):
		return c.cause
	case c.cause != nil:
		return fmt.Errorf("vCenter %s: %w: %w", address, c.cause, errdefs.ErrUnavailable)
	}
	return fmt.Errorf("vCenter %s: its inventory has not been read yet: %w", address, errdefs.ErrUnavailable)
}

// known is why nothing can be said of namespaces, nil if it can: a cluster that
// was there and is no longer seen takes its pools out of sight. It wants mu held.
func (c *Client) known() error {
	if err := c.cache.unsynced(c.session.Address()); err != nil {
		return err
	}
	if _, err := c.datacenter(); errdefs.IsUnavailable(err) || errdefs.IsPermissionDenied(err) {
		return err
	}
	return nil
}

func isClassed(err error) bool {
	return errors.Is(err, errdefs.ErrUnavailable) || errors.Is(err, errdefs.ErrPermissionDenied) || errors.Is(err, errdefs.ErrInvalidArgument)
}

// State is what the watch knows of a namespace, without a call. One that has
// nothing in vSphere is a State without pools and folder, not an error.
func (c *Client) State(r Ref) (State, error) {
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	if err := c.known(); err != nil {
		return State{}, err
	}
	return c.state(r), nil
}

// List has every namespace that has something with this supervisor's mark, by
// name: to find what was left behind. One whose making was interrupted may have
// no name.
func (c *Client) List() ([]Ref, error) {
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	if err := c.known(); err != nil {
		return nil, err
	}
	all := make([]Ref, 0, len(c.cache.owned))
	for uid, objects := range c.cache.owned {
		r := Ref{UID: uid}
		for _, owner := range objects {
			r.Name = cmp.Or(owner.Name, r.Name)
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b Ref) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID)) })
	return all, nil
}

// state wants mu held.
func (c *Client) state(r Ref) State {
	s := State{Ref: r}
	var perms []string
	for id := range c.cache.owned[r.UID] {
		o := c.cache.objects[id]
		switch id.Type {
		case "ResourcePool":
			s.Pools = append(s.Pools, c.poolState(id, o))
		case "Folder":
			if f := c.folderState(id, o); s.Folder == nil || f.InPlace {
				s.Folder = &f
			}
		default:
			continue
		}
		perms = append(perms, o.str(propPerms))
	}
	order := func(zone string) int {
		return slices.IndexFunc(c.options.Zones, func(z Zone) bool { return z.Name == zone })
	}
	slices.SortFunc(s.Pools, func(a, b PoolState) int {
		return cmp.Or(cmp.Compare(order(a.Zone), order(b.Zone)), compareBool(b.InPlace, a.InPlace), cmp.Compare(a.ID, b.ID))
	})
	slices.Sort(perms)
	for _, p := range slices.Compact(perms) {
		access := c.access(p)
		if !slices.ContainsFunc(s.AccessUneven, func(a []Access) bool { return SameAccess(a, access) }) {
			s.AccessUneven = append(s.AccessUneven, access)
		}
	}
	if len(s.AccessUneven) > 0 {
		s.Access = s.AccessUneven[0]
	}
	if len(s.AccessUneven) == 1 {
		s.AccessUneven = nil
	}
	return s
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

func (c *Client) poolState(id ref, o *object) PoolState {
	p := PoolState{ID: id.Value, Name: o.str(propName), Path: c.path(id), ParentID: o.ref(propParent).Value}
	p.CPU, _ = o.props[propCPU].(Allocation)
	p.Memory, _ = o.props[propMemory].(Allocation)
	for _, z := range c.options.Zones {
		if cluster, err := c.cluster(z); err == nil && cluster == o.ref(propOwner) {
			p.Zone = z.Name
			parent, ok := c.parentPool(cluster)
			p.InPlace = ok && parent == o.ref(propParent)
			break
		}
	}
	for k, v := range o.props {
		key, ok := strings.CutPrefix(k, propAttr)
		if !ok {
			continue
		}
		n, _ := strconv.ParseInt(key, 10, 32)
		switch name := c.fields.name(int32(n)); {
		case name == AttributeDescription:
			p.Description, _ = v.(string)
		case name != "" && !strings.HasPrefix(name, attributePrefix):
			if p.Attributes == nil {
				p.Attributes = map[string]string{}
			}
			p.Attributes[name], _ = v.(string)
		}
	}
	return p
}

func (c *Client) folderState(id ref, o *object) FolderState {
	f := FolderState{ID: id.Value, Name: o.str(propName), Path: c.path(id), ParentID: o.ref(propParent).Value}
	parent, ok := c.parentFolder()
	f.InPlace = ok && parent == o.ref(propParent)
	return f
}

// path is "/dc/host/cluster/Resources/Namespaces/team-a", without the root
// folder. It wants mu held.
func (c *Client) path(id ref) string {
	var names []string
	for range 32 { // no inventory is that deep; a loop would be
		o := c.cache.objects[id]
		if o == nil {
			break
		}
		names = append(names, o.str(propName))
		id = o.ref(propParent)
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}

// cluster finds a zone's cluster by id, path or name. It wants mu held.
func (c *Client) cluster(z Zone) (ref, error) {
	var found []ref
	for id, o := range c.cache.clusters {
		if id.Value == z.Cluster || o.str(propName) == z.Cluster || c.path(id) == z.Cluster {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 1:
		c.cache.resolved[z.Name] = true
		return found[0], nil
	case 0:
		if c.cache.resolved[z.Name] {
			return ref{}, fmt.Errorf("zone %q: vCenter %s no longer shows cluster %q: it was deleted or renamed, or the vCenter user may no longer read it: what is in it is unknown: %w", z.Name, c.session.Address(), z.Cluster, errdefs.ErrUnavailable)
		}
		return ref{}, fmt.Errorf("zone %q: vCenter %s shows no cluster %q: give its name, inventory path or id, and see that the vCenter user may read it: %w", z.Name, c.session.Address(), z.Cluster, errdefs.ErrInvalidArgument)
	}
	return ref{}, fmt.Errorf("zone %q: vCenter %s has %d clusters called %q: give the inventory path: %w", z.Name, c.session.Address(), len(found), z.Cluster, errdefs.ErrInvalidArgument)
}

// datacenter of the zones. It wants mu held.
func (c *Client) datacenter() (ref, error) {
	var dc ref
	for _, z := range c.options.Zones {
		id, err := c.cluster(z)
		if err != nil {
			return ref{}, err
		}
		for id.Type != "Datacenter" {
			o := c.cache.objects[id]
			if o == nil {
				return ref{}, fmt.Errorf("zone %q: the vCenter user may not read the datacenter of cluster %q: %w", z.Name, z.Cluster, errdefs.ErrPermissionDenied)
			}
			id = o.ref(propParent)
		}
		if dc != (ref{}) && dc != id {
			return ref{}, fmt.Errorf("zone %q is in another datacenter than %q: a supervisor's zones are in one: %w", z.Name, c.options.Zones[0].Name, errdefs.ErrInvalidArgument)
		}
		dc = id
	}
	return dc, nil
}

// parentPool of a cluster, if it is there. It wants mu held.
func (c *Client) parentPool(cluster ref) (ref, bool) {
	o := c.cache.objects[cluster]
	if o == nil {
		return ref{}, false
	}
	id, ok := c.cache.names[slot{o.ref(propRoot), c.options.ParentPool}]
	return id, ok && id.Type == "ResourcePool"
}

// parentFolder of the datacenter, if it is there. It wants mu held.
func (c *Client) parentFolder() (ref, bool) {
	dc, err := c.datacenter()
	if err != nil {
		return ref{}, false
	}
	id, ok := c.cache.names[slot{c.cache.objects[dc].ref(propVMs), c.options.ParentFolder}]
	return id, ok && id.Type == "Folder"
}

// Zones is what the watch knows of the clusters, in the order of Options.
func (c *Client) Zones() ([]ZoneState, error) {
	c.cache.mu.Lock()
	defer c.cache.mu.Unlock()
	if err := c.cache.unsynced(c.session.Address()); err != nil {
		return nil, err
	}
	var zones []ZoneState
	dc, err := c.datacenter()
	if err != nil {
		return nil, err
	}
	for _, z := range c.options.Zones {
		id, err := c.cluster(z)
		if err != nil {
			return nil, err
		}
		o := c.cache.objects[id]
		s := ZoneState{Zone: z, ID: id.Value, Path: c.path(id), Datacenter: c.cache.objects[dc].str(propName)}
		s.CPU, _ = o.props[propMHz].(int64)
		s.Cores, _ = o.props[propCores].(int32)
		s.Hosts, _ = o.props[propHosts].(int)
		bytes, _ := o.props[propBytes].(int64)
		s.Memory = bytes >> 20
		if s.Cores > 0 {
			s.MHzPerCore = s.CPU / int64(s.Cores)
		}
		if parent, ok := c.parentPool(id); ok {
			s.ParentPool = parent.Value
		}
		zones = append(zones, s)
	}
	return zones, nil
}
