package vmdk

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	cnstypes "github.com/vmware/govmomi/cns/types"
	pbmmethods "github.com/vmware/govmomi/pbm/methods"
	pbmtypes "github.com/vmware/govmomi/pbm/types"

	"github.com/openatoll/atoll/storage"
)

// auditBatch is how many disks PBM is asked about at once.
const auditBatch = 100

// Compliance asks PBM whether a volume is kept as its policy says.
func (d *Disks) Compliance(ctx context.Context, id string) (storage.Compliance, error) {
	v, err := d.whole(ctx, id)
	if err != nil {
		return storage.Compliance{}, err
	}
	found, err := d.check(ctx, []*volume{v})
	return found[id], err
}

// Audit is Compliance of all volumes, by ID, with a call for a hundred of a
// policy. Volumes that go meanwhile are left out.
func (d *Disks) Audit(ctx context.Context) (map[string]storage.Compliance, error) {
	volumes, err := d.query(ctx, cnstypes.CnsQueryFilter{})
	if err != nil {
		return nil, err
	}
	byPolicy := map[string][]*volume{}
	for _, v := range volumes {
		if v.isWhole() {
			byPolicy[v.policyID] = append(byPolicy[v.policyID], v)
		}
	}
	all := map[string]storage.Compliance{}
	keep := func(of []*volume) error {
		found, err := d.check(ctx, of)
		for id, c := range found {
			all[id] = c
		}
		return err
	}
	for _, policy := range sorted(byPolicy) {
		for part := range slices.Chunk(byPolicy[policy], auditBatch) {
			err := keep(part)
			if notThere(err) { // one of them is gone
				for _, v := range part {
					if err = keep([]*volume{v}); notThere(err) {
						err = nil
					}
					if err != nil {
						break
					}
				}
			}
			if err != nil {
				return all, err
			}
		}
	}
	return all, nil
}

// check asks about volumes of one policy.
func (d *Disks) check(ctx context.Context, volumes []*volume) (map[string]storage.Compliance, error) {
	if _, err := d.readPolicies(ctx, false); err != nil { // and with them PBM's content
		return nil, err
	}
	policy := volumes[0].policy
	req := &pbmtypes.PbmCheckCompliance{This: d.policies.content.ComplianceManager, Profile: &pbmtypes.PbmProfileId{UniqueId: volumes[0].policyID}}
	all := map[string]storage.Compliance{}
	for _, v := range volumes {
		req.Entities = append(req.Entities, pbmtypes.PbmServerObjectRef{ObjectType: string(pbmtypes.PbmObjectTypeVirtualDiskUUID), Key: v.id, ServerUuid: d.session.About().InstanceUuid})
		all[v.id] = storage.Compliance{State: storage.ComplianceUnknown, At: now(), Message: "vCenter does not know whether the volume complies with storage policy " + policy}
	}
	res, err := pbmmethods.PbmCheckCompliance(ctx, d.services.pbm, req)
	if err != nil {
		return nil, wrap(fmt.Sprintf("ask whether %d of storage policy %s comply with it", len(volumes), policy), err)
	}
	for _, r := range res.Returnval {
		c, ok := all[r.Entity.Key]
		if !ok {
			return nil, fmt.Errorf("vCenter %s answers about disk %q, of which it was not asked: %w", d.session.Address(), r.Entity.Key, errdefs.ErrUnavailable)
		}
		c.At = r.CheckTime
		switch pbmtypes.PbmComplianceStatus(r.ComplianceStatus) {
		case pbmtypes.PbmComplianceStatusCompliant, pbmtypes.PbmComplianceStatusNotApplicable:
			c.State, c.Message = storage.Compliant, ""
		case pbmtypes.PbmComplianceStatusNonCompliant:
			c.State, c.Message = storage.NonCompliant, "the volume's datastore no longer offers what storage policy "+policy+" asks for"
		case pbmtypes.PbmComplianceStatusOutOfDate:
			c.State, c.Message = storage.NonCompliant, "storage policy "+policy+" was changed and not applied to the volume again"
		}
		all[r.Entity.Key] = c
	}
	return all, nil
}

// PolicyByID finds a storage policy by vSphere's id, also one that is new or
// fits no datastore.
func (d *Disks) PolicyByID(ctx context.Context, id string) (storage.Policy, error) {
	p, err := d.policy(ctx, id)
	return p.Policy, err
}
