package vmdk

import (
	"context"
	"slices"

	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/vim25/types"
	vslmmethods "github.com/vmware/govmomi/vslm/methods"
	vslmtypes "github.com/vmware/govmomi/vslm/types"

	"github.com/openatoll/atoll/storage"
)

// usedBatch is how many disks VSLM is asked about at once.
const usedBatch = 100

// Inventory lists all volumes, by ID, also those that are not whole or are there
// for their snapshots alone. How much they take is asked with a call for each
// hundred, and is -1 where vCenter does not say. The holder is whom CNS names. Why
// one is not to be used is in Unfinished.
func (d *Disks) Inventory(ctx context.Context) ([]storage.Item, error) {
	volumes, err := d.query(ctx, cnstypes.CnsQueryFilter{})
	if err != nil {
		return nil, err
	}
	used, err := d.usedBy(ctx, volumes)
	if err != nil {
		// What is known of them is no less for that.
		d.log.Warn("what volumes take of their datastores is not known", "vcenter", d.session.Address(), "err", err)
	}
	all := make([]storage.Item, 0, len(volumes))
	for _, v := range volumes {
		item := storage.Item{Used: -1, Holder: v.holder}
		if item.Volume, err = d.show(ctx, v); err != nil {
			item.Volume, item.Unfinished = v.shown(storage.Topology{}, v.url), err.Error()
		}
		if n, ok := used[v.id]; ok {
			item.Used = n
		}
		switch {
		case v.deleted:
			item.Unfinished = "it is deleted, and its disk stays until its last snapshot goes"
		case !v.isWhole():
			item.Unfinished = "it is being made"
		}
		all = append(all, item)
	}
	return all, nil
}

// usedBy is what disks take, in bytes, by ID.
func (d *Disks) usedBy(ctx context.Context, volumes []*volume) (map[string]int64, error) {
	this, err := d.services.manager(ctx)
	if err != nil {
		return nil, err
	}
	all := map[string]int64{}
	for part := range slices.Chunk(volumes, usedBatch) {
		req := &vslmtypes.VslmRetrieveVStorageObjects{This: this}
		for _, v := range part {
			req.Ids = append(req.Ids, types.ID{Id: v.id})
		}
		res, err := vslmmethods.VslmRetrieveVStorageObjects(ctx, d.services.vslm, req)
		if err != nil {
			return all, wrap("look at disks", err)
		}
		for _, r := range res.Returnval {
			if r.Error == nil {
				all[r.Id.Id] = r.UsedCapacityInMB * mib
			}
		}
	}
	return all, nil
}
