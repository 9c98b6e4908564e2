package vc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/pbm"
	"github.com/vmware/govmomi/pbm/methods"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/vim25/soap"

	"github.com/openatoll/atoll/internal/vsphere"
)

// placementEvery so many readings, where a policy fits is asked again: that is
// a call a policy, and changes with tags on datastores, unseen.
const placementEvery = 6

// policies are the last reading.
type policies struct {
	mu   sync.Mutex
	list []Policy
	at   time.Time
	err  error
	poke chan struct{}

	// of the poll alone
	content *pbmtypes.PbmServiceInstanceContent
	reading int
	fits    map[string]fit // by policy id
}

// A fit is where a policy of some generation may place.
type fit struct {
	generation int64
	datastores []ref
}

func (p *policies) wake() {
	select {
	case p.poke <- struct{}{}:
	default:
	}
}

// Policies is the last reading of the storage policies, by name, and when it
// was made. It makes no call.
func (c *Client) Policies() ([]Policy, time.Time, error) {
	c.policies.mu.Lock()
	defer c.policies.mu.Unlock()
	switch {
	case c.policies.err != nil:
		return nil, c.policies.at, c.policies.err
	case c.policies.at.IsZero():
		return nil, time.Time{}, fmt.Errorf("vCenter %s: its storage policies have not been read yet: %w", c.session.Address(), errdefs.ErrUnavailable)
	}
	return slices.Clone(c.policies.list), c.policies.at, nil
}

// pollPolicies reads policies, permissions and tags every PolicyInterval, and
// when the connection was made anew.
func (c *Client) pollPolicies(ctx context.Context) {
	for {
		timer := time.NewTimer(c.options.PolicyInterval + rand.N(c.options.PolicyInterval/10))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-c.policies.poke:
		case <-timer.C:
		}
		timer.Stop()
		c.cache.mu.Lock()
		synced := c.cache.synced
		c.cache.mu.Unlock()
		if !synced {
			continue
		}
		list, err := c.readPolicies(ctx)
		if ctx.Err() != nil {
			return
		}
		perms := c.readPermissions(ctx)
		_ = c.readTags(ctx) // what is known of them stays, and the next poll asks again
		if ctx.Err() != nil {
			return
		}
		c.cache.mu.Lock()
		c.cache.permsErr = perms
		c.cache.mu.Unlock()
		c.policies.mu.Lock()
		before, failed := c.policies.list, c.policies.err
		c.policies.list, c.policies.err = list, err
		if err == nil {
			c.policies.at = time.Now()
		} else {
			c.policies.list = before
		}
		c.policies.mu.Unlock()
		changed := err == nil && !slices.EqualFunc(before, list, samePolicy) || (err == nil) != (failed == nil)
		if changed && c.options.Notify.Policies != nil {
			c.options.Notify.Policies()
		}
	}
}

// samePolicy does not mind how much is free.
func samePolicy(a, b Policy) bool {
	return a.ID == b.ID && a.Name == b.Name && a.Description == b.Description && a.Capacity == b.Capacity &&
		slices.EqualFunc(a.Datastores, b.Datastores, func(x, y Datastore) bool { return x.ID == y.ID && x.Name == y.Name })
}

func (c *Client) readPolicies(ctx context.Context) ([]Policy, error) {
	fail := func(what string, err error) error {
		return vsphere.Error(what+" of vCenter "+c.session.Address(), err)
	}
	p := &c.policies
	sc, rt := c.session.Service(pbm.Path, pbm.Namespace)
	client := &pbm.Client{Client: sc, RoundTripper: rt}
	if p.content == nil {
		res, err := methods.PbmRetrieveServiceContent(ctx, rt, &pbmtypes.PbmRetrieveServiceContent{This: pbm.ServiceInstance})
		if err != nil {
			return nil, fail("reach the storage policies", err)
		}
		p.content = &res.Returnval
	}
	client.ServiceContent = *p.content
	storage := pbmtypes.PbmProfileResourceType{ResourceType: string(pbmtypes.PbmProfileResourceTypeEnumSTORAGE)}
	ids, err := client.QueryProfile(ctx, storage, string(pbmtypes.PbmProfileCategoryEnumREQUIREMENT))
	if err != nil {
		return nil, fail("list the storage policies", err)
	}
	if len(ids) == 0 {
		return nil, nil
	}
	profiles, err := client.RetrieveContent(ctx, ids)
	if err != nil {
		return nil, fail("read the storage policies", err)
	}
	fits, err := c.placements(ctx, client, profiles)
	if err != nil {
		return nil, err
	}
	stores, err := c.readDatastores(ctx, fits)
	if err != nil {
		return nil, err
	}
	list := make([]Policy, 0, len(profiles))
	for _, profile := range profiles {
		base := profile.GetPbmProfile()
		policy := Policy{ID: base.ProfileId.UniqueId, Name: base.Name, Description: base.Description}
		for _, id := range fits[policy.ID].datastores {
			if d, ok := stores[id]; ok {
				policy.Datastores = append(policy.Datastores, d)
				policy.Capacity += d.Capacity
				policy.Free += d.Free
			}
		}
		slices.SortFunc(policy.Datastores, func(a, b Datastore) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
		list = append(list, policy)
	}
	slices.SortFunc(list, func(a, b Policy) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return list, nil
}

// placements asks where policies fit: those that changed, and now and then all.
func (c *Client) placements(ctx context.Context, client *pbm.Client, profiles []pbmtypes.BasePbmProfile) (map[string]fit, error) {
	p := &c.policies
	all := p.reading%placementEvery == 0
	fits := make(map[string]fit, len(profiles))
	var errs []error
	for _, profile := range profiles {
		base := profile.GetPbmProfile()
		id := base.ProfileId.UniqueId
		generation := base.LastUpdatedTime.UnixNano()
		if old, ok := p.fits[id]; ok && !all && old.generation == generation {
			fits[id] = old
			continue
		}
		result, err := client.CheckRequirements(ctx, nil, nil, []pbmtypes.BasePbmPlacementRequirement{
			&pbmtypes.PbmPlacementCapabilityProfileRequirement{ProfileId: base.ProfileId},
		})
		if err != nil {
			if soap.IsSoapFault(err) && !vsphere.NotAuthenticated(err) {
				// One policy that vCenter cannot judge does not hide the others.
				fits[id] = fit{generation: generation}
				continue
			}
			errs = append(errs, vsphere.Error(fmt.Sprintf("ask where storage policy %q fits", base.Name), err))
			break
		}
		f := fit{generation: generation}
		for _, hub := range result.CompatibleDatastores() {
			if hub.HubType == "Datastore" {
				f.datastores = append(f.datastores, ref{Type: hub.HubType, Value: hub.HubId})
			}
		}
		fits[id] = f
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	p.fits = fits
	p.reading++
	return fits, nil
}

func (c *Client) readDatastores(ctx context.Context, fits map[string]fit) (map[ref]Datastore, error) {
	want := map[ref][]string{}
	for _, f := range fits {
		for _, id := range f.datastores {
			want[id] = []string{"name", "summary.capacity", "summary.freeSpace"}
		}
	}
	if len(want) == 0 {
		return nil, nil
	}
	found, err := c.session.Retrieve(ctx, want)
	if err != nil {
		return nil, vsphere.Error("read the datastores of vCenter "+c.session.Address(), err)
	}
	stores := make(map[ref]Datastore, len(found))
	for id, props := range found {
		d := Datastore{ID: id.Value}
		d.Name, _ = props["name"].(string)
		d.Capacity, _ = props["summary.capacity"].(int64)
		d.Free, _ = props["summary.freeSpace"].(int64)
		stores[id] = d
	}
	return stores, nil
}
