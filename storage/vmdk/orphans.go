package vmdk

import (
	"context"
	"fmt"

	cnstypes "github.com/vmware/govmomi/cns/types"
)

// An Orphan is something of ours that no volume or snapshot is: what an
// interrupted call left. It is told of and never deleted, since what is not
// known may be somebody's; the call that left it takes it up when it is made
// again.
type Orphan struct {
	// ID is a disk's, or a disk's and its snapshot's with a dot between.
	ID, Name string
	// Why is a sentence.
	Why string
}

// Orphans lists them, by disk.
func (d *Disks) Orphans(ctx context.Context) ([]Orphan, error) {
	volumes, err := d.query(ctx, cnstypes.CnsQueryFilter{})
	if err != nil {
		return nil, err
	}
	byName := map[string][]*volume{}
	for _, v := range volumes {
		byName[v.name] = append(byName[v.name], v)
	}
	snaps, err := d.snapshotsOf(ctx, volumes)
	if err != nil {
		return nil, err
	}
	kept := map[string]bool{}
	var all []Orphan
	for _, s := range snaps {
		kept[s.of.id] = true
		if s.Clone != "" {
			all = append(all, Orphan{s.snapshotID(), s.Name, "volume " + s.Clone + " was being made from it"})
		}
	}
	for _, name := range sorted(byName) {
		first, err := d.first(ctx, byName[name], name)
		if err != nil {
			return nil, err
		}
		for _, v := range byName[name] {
			switch {
			case v.deleted && !kept[v.id]:
				all = append(all, Orphan{v.id, v.name, "it is deleted, and its last snapshot is gone"})
			case v.deleted:
			case v != first:
				all = append(all, Orphan{v.id, v.name, "an older volume (" + first.id + ") has its name"})
			case v.mib < v.whole:
				all = append(all, Orphan{v.id, v.name, fmt.Sprintf("it has %d MiB of the %d that it is to have", v.mib, v.whole)})
			}
		}
	}
	return all, nil
}
