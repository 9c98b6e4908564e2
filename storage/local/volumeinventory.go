package local

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/openatoll/atoll/storage"
)

// Inventory implements storage.Inventory.
func (x *Disks) Inventory(ctx context.Context) ([]storage.Item, []storage.DatastoreState) {
	var items []storage.Item
	var states []storage.DatastoreState
	for _, c := range x.cfg.Datastores {
		state := storage.DatastoreState{Name: c.Name}
		d, err := x.stores.meet(c)
		if err == nil {
			state.ID = d.id
			var found []storage.Item
			found, err = x.inventoryOf(ctx, d)
			items = append(items, found...)
		}
		if err != nil {
			state.Problem = err.Error()
		}
		states = append(states, state)
	}
	slices.SortFunc(items, func(a, b storage.Item) int { return strings.Compare(a.ID+a.File, b.ID+b.File) })
	return items, states
}

func (x *Disks) inventoryOf(ctx context.Context, d *datastore) ([]storage.Item, error) {
	root, err := d.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// Before the records: each is written before its files, and goes after them.
	files, err := fs.ReadDir(root.FS(), disksDir)
	if err != nil {
		return nil, err
	}
	all, err := ids(root, "v")
	if err != nil {
		return nil, err
	}
	var items []storage.Item
	for _, id := range all {
		if ctx.Err() != nil {
			return items, ctx.Err()
		}
		if item, there := x.item(d, root, id); there {
			items = append(items, item)
		}
	}
	used, err := referenced(root, "")
	if err != nil {
		return items, nil // what else lies there is not known, and the damaged record is told of
	}
	return append(items, strays(d, root, files, used)...), nil
}

// item says all of one volume; false if it has gone meanwhile.
func (x *Disks) item(d *datastore, root *os.Root, id string) (storage.Item, bool) {
	item := storage.Item{Volume: storage.Volume{ID: id, At: d.at(), Datastore: d.Name}, Used: -1}
	r, err := readRecord(root, id)
	if err != nil {
		item.Damage = plain(err)
		item.Compliance = verdict(storage.NonCompliant, item.Damage)
		return item, true
	}
	if r == nil {
		return item, false
	}
	item.Volume, item.Encrypted = d.volume(*r), r.Encrypted
	if r.State != ready {
		item.Unfinished = string(r.State) + " by host " + r.By
		item.Compliance = verdict(storage.ComplianceUnknown, "")
		return item, true
	}
	item.Used = 0
	for _, f := range r.chain() {
		st, err := root.Lstat(f.path())
		if err != nil {
			item.Used = -1
			break
		}
		item.Used += st.Sys().(*syscall.Stat_t).Blocks * 512
	}
	held, _, err := x.holding(root, id)
	if err == nil && held != nil {
		item.Holder = &held.Holder
	}
	if err := errors.Join(err, check(root, *r)); err != nil {
		item.Damage = plain(err)
	}
	item.Compliance = x.audit(d, root, *r)
	return item, true
}

// strays are files of disks that no record stands for.
func strays(d *datastore, root *os.Root, files []fs.DirEntry, used map[string]bool) []storage.Item {
	var items []storage.Item
	for _, f := range files {
		if used[f.Name()] {
			continue
		}
		df := diskFile{Name: f.Name()}
		st, err := root.Lstat(df.path())
		if err != nil {
			continue // it has gone with its record
		}
		items = append(items, storage.Item{
			Volume: storage.Volume{At: d.at(), Datastore: d.Name, Bytes: st.Size(), CreatedAt: st.ModTime()},
			File:   df.path(), Used: st.Sys().(*syscall.Stat_t).Blocks * 512,
			Compliance: verdict(storage.ComplianceUnknown, ""),
		})
	}
	return items
}
