package vmdk

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/pbm"
	pbmmethods "github.com/vmware/govmomi/pbm/methods"
	pbmtypes "github.com/vmware/govmomi/pbm/types"

	"github.com/openatoll/atoll/storage"
)

const (
	// policyTTL is how old an answer about policies may be: each costs a call a
	// policy.
	policyTTL = 30 * time.Second
	// maxMiB is vSphere's largest virtual disk, 62 TiB (vSphere Configuration
	// Maximums).
	maxMiB = 62 << 20
)

// A policy is a storage policy and where it fits.
type policy struct {
	storage.Policy
	id string
}

type policyCache struct {
	mu      sync.Mutex // held while they are read
	list    []policy
	at      time.Time
	content *pbmtypes.PbmServiceInstanceContent
}

// readPolicies returns the storage policies, sorted by name, read within
// policyTTL, or now if fresh.
func (d *Disks) readPolicies(ctx context.Context, fresh bool) ([]policy, error) {
	c := &d.policies
	c.mu.Lock()
	defer c.mu.Unlock()
	if !fresh && !c.at.IsZero() && time.Since(c.at) < policyTTL {
		return c.list, nil
	}
	fail := func(what string, err error) error { return wrap(what+" of vCenter "+d.session.Address(), err) }
	if c.content == nil {
		res, err := pbmmethods.PbmRetrieveServiceContent(ctx, d.services.pbm, &pbmtypes.PbmRetrieveServiceContent{This: pbm.ServiceInstance})
		if err != nil {
			return nil, fail("reach the storage policies", err)
		}
		c.content = &res.Returnval
	}
	client := &pbm.Client{Client: d.services.pbmClient, RoundTripper: d.services.pbm, ServiceContent: *c.content}
	kind := pbmtypes.PbmProfileResourceType{ResourceType: string(pbmtypes.PbmProfileResourceTypeEnumSTORAGE)}
	ids, err := client.QueryProfile(ctx, kind, string(pbmtypes.PbmProfileCategoryEnumREQUIREMENT))
	if err != nil {
		return nil, fail("list the storage policies", err)
	}
	var profiles []pbmtypes.BasePbmProfile
	if len(ids) > 0 {
		if profiles, err = client.RetrieveContent(ctx, ids); err != nil {
			return nil, fail("read the storage policies", err)
		}
	}
	stores, err := d.stores.list(ctx)
	if err != nil {
		return nil, err
	}
	var list []policy
	taken := map[string]bool{}
	for _, profile := range profiles {
		base := profile.GetPbmProfile()
		p := policy{id: base.ProfileId.UniqueId}
		p.ID, p.Name, p.Description = p.id, d.policyName(p.id, base.Name, taken), base.Description
		fits, err := client.CheckRequirements(ctx, nil, nil, []pbmtypes.BasePbmPlacementRequirement{&pbmtypes.PbmPlacementCapabilityProfileRequirement{ProfileId: base.ProfileId}})
		if err != nil {
			return nil, fail("ask where storage policy "+base.Name+" fits", err)
		}
		for _, hub := range fits.CompatibleDatastores() {
			p.Datastores = append(p.Datastores, hub.HubId)
		}
		d.placed(&p, stores)
		list = append(list, p)
	}
	slices.SortFunc(list, func(a, b policy) int { return strings.Compare(a.Name, b.Name) })
	c.list, c.at = list, time.Now()
	return list, nil
}

// placed says where a policy's volumes can be.
func (d *Disks) placed(p *policy, stores []store) {
	var ids []string
	p.Shared = true
	for _, at := range stores {
		if !slices.Contains(p.Datastores, at.id) {
			continue
		}
		t := d.stores.topology(at)
		p.Shared = p.Shared && t.Host == ""
		ids, p.Topology = append(ids, at.id), append(p.Topology, t)
	}
	slices.Sort(ids)
	p.Datastores = ids
	p.Shared = p.Shared && len(ids) > 0
}

// policyName is a storage policy's name in Kubernetes.
func (d *Disks) policyName(id, name string, taken map[string]bool) (out string) {
	if d.options.PolicyName != nil {
		out = d.options.PolicyName(id, name)
	}
	if out == "" {
		out = label(name)
	}
	if taken[out] || out == "" {
		out = strings.TrimLeft(strings.TrimRight(out[:min(len(out), 54)], "-")+"-"+id[:min(len(id), 8)], "-")
	}
	taken[out] = true
	return out
}

// label makes a DNS label of a name: "vSAN Default" becomes vsan-default.
func label(name string) string {
	words := strings.FieldsFunc(strings.ToLower(name), func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') })
	out := strings.Join(words, "-")
	return strings.TrimRight(out[:min(len(out), 63)], "-")
}

// policy finds one by name, or by vSphere's id. One that is new is looked for.
func (d *Disks) policy(ctx context.Context, name string) (policy, error) {
	for _, fresh := range []bool{false, true} {
		list, err := d.readPolicies(ctx, fresh)
		if err != nil {
			return policy{}, err
		}
		for _, p := range list {
			if p.Name == name || p.id == name {
				return p, nil
			}
		}
	}
	return policy{}, fmt.Errorf("vCenter %s has no storage policy %q: %w", d.session.Address(), name, errdefs.ErrNotFound)
}

// Policies returns those that fit some datastore.
func (d *Disks) Policies(ctx context.Context) ([]storage.Policy, error) {
	list, err := d.readPolicies(ctx, false)
	if err != nil {
		return nil, err
	}
	var all []storage.Policy
	for _, p := range list {
		if len(p.Datastores) > 0 {
			all = append(all, p.Policy)
		}
	}
	return all, nil
}

// Capacity is what the policy's datastores have, those left out that are in
// maintenance or cannot be reached.
func (d *Disks) Capacity(ctx context.Context, name string, at storage.Topology) (storage.Capacity, error) {
	p, err := d.policy(ctx, name)
	if err != nil {
		return storage.Capacity{}, err
	}
	stores, err := d.candidates(ctx, p, at, "")
	var c storage.Capacity
	for _, s := range stores {
		c.Total += s.capacity
		c.Available += s.free
		c.MaxVolume = max(c.MaxVolume, min(s.free/mib, maxMiB)*mib)
	}
	return c, err
}

// candidates are the datastores of a policy at a place, the freest first; url
// narrows them to one.
func (d *Disks) candidates(ctx context.Context, p policy, at storage.Topology, url string) ([]store, error) {
	stores, err := d.stores.list(ctx)
	if err != nil {
		return nil, err
	}
	stores = slices.DeleteFunc(stores, func(s store) bool {
		return s.lost || s.resting || !slices.Contains(p.Datastores, s.id) || !d.stores.topology(s).Fits(at) || url != "" && s.url != url
	})
	slices.SortStableFunc(stores, func(a, b store) int { return int(min(max(b.free-a.free, -1), 1)) })
	return stores, nil
}

// place picks the datastore of a new volume: at the first of the places wished
// for that has one with room.
func (d *Disks) place(ctx context.Context, p policy, wishes []storage.Topology, size int64, url string) (store, error) {
	if len(wishes) == 0 {
		wishes = []storage.Topology{{}}
	}
	var largest int64
	var there []store
	for _, at := range wishes {
		stores, err := d.candidates(ctx, p, at, url)
		if err != nil {
			return store{}, err
		}
		for _, s := range stores {
			largest = max(largest, s.capacity)
			if s.capacity >= size*mib && s.free >= size*mib && size <= maxMiB {
				return s, nil
			}
		}
		there = append(there, stores...)
	}
	switch {
	case len(there) == 0 && len(p.Datastores) == 0:
		return store{}, fmt.Errorf("storage policy %s fits no datastore of vCenter %s: %w", p.Name, d.session.Address(), errdefs.ErrOutOfRange)
	case len(there) == 0 && url != "":
		return store{}, fmt.Errorf("the source is on a datastore that storage policy %s, or where the claim wants to be, does not allow, and vSphere copies no disk to another: %w", p.Name, errdefs.ErrInvalidArgument)
	case len(there) == 0:
		return store{}, fmt.Errorf("no datastore of storage policy %s is where the claim wants to be: %w", p.Name, errdefs.ErrInvalidArgument)
	case size*mib > largest || size > maxMiB:
		return store{}, fmt.Errorf("%d MiB are more than any datastore of storage policy %s has (%d MiB), or than vSphere's 62 TiB: %w", size, p.Name, largest/mib, errdefs.ErrOutOfRange)
	}
	return store{}, fmt.Errorf("no datastore of storage policy %s has %d MiB free now (the freest, %s, has %d MiB): free some space, or add a datastore: %w", p.Name, size, there[0].name, there[0].free/mib, errdefs.ErrResourceExhausted)
}

// roomAt is nil if a datastore has so many MiB more for a disk that is then of
// some size.
func (d *Disks) roomAt(ctx context.Context, id string, more, size int64) error {
	stores, err := d.stores.list(ctx)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(stores, func(s store) bool { return s.id == id })
	switch {
	case i < 0:
		return fmt.Errorf("vCenter shows no datastore %s: %w", id, errdefs.ErrUnavailable)
	case size > maxMiB || size*mib > stores[i].capacity:
		return fmt.Errorf("datastore %s has %d MiB, and a disk 62 TiB at most: %w", stores[i].name, stores[i].capacity/mib, errdefs.ErrOutOfRange)
	case more*mib > stores[i].free:
		return fmt.Errorf("datastore %s has %d MiB left: %w", stores[i].name, stores[i].free/mib, errdefs.ErrResourceExhausted)
	}
	return nil
}
