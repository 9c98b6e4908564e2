package qemu

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

var _ vmpod.DiskResizer = (*Machine)(nil)

// Names of what a volume has inside QEMU beside a disk's node and device.
func formatName(id string) string { return "format-" + id } // the node below a throttle
func limitName(id string) string  { return "limit-" + id }
func keyName(id string) string    { return "key-" + id }

// checkVolume refuses what must not be plugged.
func checkVolume(d vmpod.Disk) error {
	v := d.Volume
	switch {
	case v.ID == "":
		return fmt.Errorf("disk %s: its volume has no ID", d.ID)
	case v.IOPS < 0 || v.BytesPerSecond < 0:
		return fmt.Errorf("disk %s: a limit is negative", d.ID)
	case len(v.Backing) > 0 && d.Format != "qcow2":
		return fmt.Errorf("disk %s: format %q has no files below it", d.ID, d.Format)
	case (d.Format == "luks") != (len(v.Key) > 0):
		return fmt.Errorf("disk %s: format %q and a key of %d bytes do not go together", d.ID, d.Format, len(v.Key))
	}
	switch d.Format {
	case "", "raw", "qcow2", "luks":
	default:
		return fmt.Errorf("disk %s: format %q: want raw, qcow2 or luks for a volume", d.ID, d.Format)
	}
	for _, b := range v.Backing {
		if !strings.HasPrefix(b.Path, "/") || b.Format != "raw" && b.Format != "qcow2" {
			return fmt.Errorf("disk %s: below it %q of format %q: want an absolute path, and raw or qcow2", d.ID, b.Path, b.Format)
		}
	}
	return nil
}

// keyless is a disk as it may be remembered.
func keyless(d vmpod.Disk) vmpod.Disk {
	if d.Volume != nil && d.Volume.Key != nil {
		v := *d.Volume
		v.Key = nil
		d.Volume = &v
	}
	return d
}

// addVolume hands a volume's files to QEMU and adds its nodes and device.
func addVolume(ctx context.Context, q *qmpConn, d vmpod.Disk, slot int) error {
	hand := func(path string, readOnly bool) (string, error) {
		f, err := openDisk(path, readOnly)
		if err != nil {
			return "", err
		}
		defer f.Close()
		var r struct {
			Set int `json:"fdset-id"`
		}
		err = q.run(ctx, "add-fd", map[string]any{"opaque": diskName(d.ID)}, &r, f)
		return fdsetPath(r.Set), err
	}
	path, err := hand(d.Path, d.ReadOnly)
	if err != nil {
		return err
	}
	var below []string
	for _, b := range d.Volume.Backing {
		p, err := hand(b.Path, true)
		if err != nil {
			return err
		}
		below = append(below, p)
	}
	node := volumeNode(d, path, below)
	if limits := throttleLimits(*d.Volume); limits != nil {
		if err := q.run(ctx, "object-add", map[string]any{"qom-type": "throttle-group", "id": limitName(d.ID), "limits": limits}, nil); err != nil {
			return err
		}
		node["node-name"] = formatName(d.ID)
		node = map[string]any{"driver": "throttle", "node-name": nodeName(d.ID), "throttle-group": limitName(d.ID), "file": node, "read-only": d.ReadOnly}
		if !d.Volume.Thick {
			node["discard"] = "unmap"
		}
	}
	if err := addVolumeNode(ctx, q, d, node); err != nil {
		return err
	}
	failpoint.Hit(failpoint.PlugVolumeNodeAdded)
	return q.run(ctx, "device_add", volumeDevice(d, slot), nil)
}

// addVolumeNode opens a volume in QEMU, which needs its key for that alone.
func addVolumeNode(ctx context.Context, q *qmpConn, d vmpod.Disk, node map[string]any) error {
	if d.Format != "luks" {
		return q.run(ctx, "blockdev-add", node, nil)
	}
	key := map[string]any{"id": keyName(d.ID)}
	_ = q.run(ctx, "object-del", key, nil) // one that a killed process left
	err := q.run(ctx, "object-add", map[string]any{"qom-type": "secret", "id": keyName(d.ID), "format": "raw", "data": string(d.Volume.Key)}, nil)
	if err != nil {
		return fmt.Errorf("QEMU does not take the key of disk %s: %w", d.ID, errdefs.ErrInvalidArgument) // its words may hold it
	}
	err = q.run(ctx, "blockdev-add", node, nil)
	// QEMU has derived its own from it.
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if derr := q.run(undo, "object-del", key, nil); err == nil {
		err = derr
	}
	var refused *qmpError
	if errors.As(err, &refused) && strings.Contains(refused.Desc, "Invalid password") {
		return fmt.Errorf("the key of disk %s does not open it: %w", d.ID, errdefs.ErrPermissionDenied)
	}
	return err
}

// volumeNode describes a volume's content for blockdev-add. Writes are cached
// by the host until the guest flushes: then they are on the host's disk.
func volumeNode(d vmpod.Disk, path string, below []string) map[string]any {
	thin := !d.Volume.Thick
	node := blockNode(d, path)
	file := node["file"].(map[string]any)
	// QEMU's own locks, as a second wall: two must not have it open.
	if file["driver"] == "file" {
		file["locking"] = "on"
	}
	cache := map[string]any{"direct": false, "no-flush": false}
	node["cache"], file["cache"] = cache, cache
	switch {
	case !thin:
		node["discard"], file["discard"] = "ignore", "ignore"
	case d.Format != "luks" && !d.ReadOnly: // zeroes are not zero in there
		node["detect-zeroes"] = "unmap"
	}
	if d.Format == "luks" {
		node["key-secret"] = keyName(d.ID)
	}
	if d.Format == "qcow2" {
		// What the file says is below it is not believed.
		node["backing"] = backingNode(d.Volume.Backing, below)
	}
	return node
}

// backingNode nests the files below a qcow2 file, nil if there are none.
func backingNode(files []vmpod.DiskFile, paths []string) any {
	if len(files) == 0 {
		return nil
	}
	node := map[string]any{
		"driver":    files[0].Format,
		"read-only": true,
		"file":      map[string]any{"driver": fileDriver(files[0].Path), "filename": paths[0], "read-only": true, "aio": "threads"},
	}
	if files[0].Format == "qcow2" {
		node["backing"] = backingNode(files[1:], paths[1:])
	}
	return node
}

// throttleLimits are QEMU's ThrottleLimits, nil if there are none.
func throttleLimits(v vmpod.Volume) map[string]any {
	limits := map[string]any{}
	if v.IOPS > 0 {
		limits["iops-total"] = v.IOPS
	}
	if v.BytesPerSecond > 0 {
		limits["bps-total"] = v.BytesPerSecond
	}
	if len(limits) == 0 {
		return nil
	}
	return limits
}

// volumeDevice pauses the guest when the host has no room for a write, instead
// of failing it: docs/decisions/0002-disk-errors.md.
func volumeDevice(d vmpod.Disk, slot int) map[string]any {
	m := diskDevice(d, slot)
	m["werror"] = "enospc"
	return m
}

// dropVolume takes back what was added for a volume beside node and device.
func dropVolume(ctx context.Context, q *qmpConn, d vmpod.Disk) {
	if d.Volume == nil {
		return
	}
	for _, name := range []string{limitName(d.ID), keyName(d.ID)} {
		_ = q.run(ctx, "object-del", map[string]any{"id": name}, nil) // may not have been added
	}
}

// ResizeDisk implements vmpod.DiskResizer.
func (m *Machine) ResizeDisk(ctx context.Context, diskID string, bytes int64) error {
	if err := m.resizeDisk(ctx, diskID, bytes); err != nil {
		return fmt.Errorf("pod VM %s: resize disk %q to %d bytes: %w", m.id, diskID, bytes, err)
	}
	return nil
}

func (m *Machine) resizeDisk(ctx context.Context, diskID string, bytes int64) error {
	m.plugging.Lock()
	defer m.plugging.Unlock()
	var disk *vmpod.Disk
	for _, e := range m.table().Disks {
		if e.ID == diskID {
			disk = &e.Disk
		}
	}
	switch {
	case disk == nil:
		return fmt.Errorf("there is none: %w", errdefs.ErrNotFound)
	case disk.Volume == nil:
		return fmt.Errorf("it is no volume: %w", errdefs.ErrInvalidArgument)
	case disk.ReadOnly:
		return fmt.Errorf("it is read-only: its size shows when it is plugged again: %w", errdefs.ErrFailedPrecondition)
	case bytes <= 0 || bytes%512 != 0:
		return fmt.Errorf("want whole sectors: %w", errdefs.ErrInvalidArgument)
	}
	if m.copying(diskID) != nil {
		return fmt.Errorf("it is being copied for a snapshot or a clone: it is resized when that is done: %w", errdefs.ErrUnavailable)
	}
	q, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	// QEMU ends with an assertion when a node is resized above one that it copies
	// (bdrv_dirty_bitmap_truncate): what a killed process left must be gone.
	if err := m.endCopy(ctx, q, diskID); err != nil {
		return err
	}
	has, err := nodeSize(ctx, q, nodeName(diskID))
	if err != nil || has >= bytes {
		return err
	}
	err = q.run(ctx, "block_resize", map[string]any{"node-name": nodeName(diskID), "size": bytes}, nil)
	var refused *qmpError
	if errors.As(err, &refused) && strings.Contains(strings.ToLower(refused.Desc), unix.ENOSPC.Error()) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

// nodeSize asks QEMU how large a node is that is there.
func nodeSize(ctx context.Context, q *qmpConn, name string) (int64, error) {
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := q.run(ctx, "query-named-block-nodes", map[string]any{"flat": true}, &nodes); err != nil {
		return 0, err
	}
	for _, n := range nodes {
		if n.Name == name {
			return n.Image.Size, nil
		}
	}
	return 0, fmt.Errorf("QEMU has no node %s: %w", name, errdefs.ErrNotFound)
}

// roomPoll is how often a full datastore is looked at, and roomAtLeast what
// must be free there for its VMs to go on, in bytes.
const (
	roomPoll    = 2 * time.Second
	roomAtLeast = 16 << 20
)

// awaitRoom has a VM go on that a full datastore has paused, once there is room
// in all that its volumes are on. It ends when that is so, or the VM has ended.
func (m *Machine) awaitRoom() {
	m.mu.Lock()
	m.stalls++
	seen, already := m.stalls, m.awaiting
	m.awaiting = true
	disk := m.faults.last
	m.mu.Unlock()
	if already {
		return
	}
	m.log.Error("pod VM is paused: the host has no room for a volume's write", "disk", disk)
	tick := time.NewTicker(roomPoll)
	defer tick.Stop()
	for {
		select {
		case <-m.d.life.Done():
			return
		case <-m.gone:
			return
		case <-tick.C:
		}
		if !m.roomForVolumes() || !m.goOn() {
			continue
		}
		m.mu.Lock()
		over := seen == m.stalls // else it has stopped again since
		seen, m.awaiting = m.stalls, !over
		m.mu.Unlock()
		if over {
			return
		}
	}
}

// roomForVolumes says whether every volume's file system has room again.
func (m *Machine) roomForVolumes() bool {
	for _, e := range m.table().Disks {
		var st unix.Statfs_t
		if e.Volume == nil || e.ReadOnly {
			continue
		}
		if err := unix.Statfs(e.Path, &st); err != nil || int64(st.Bavail)*st.Bsize < roomAtLeast {
			return false
		}
	}
	return true
}

// goOn continues a VM that stands still for lack of room; false: it still does.
func (m *Machine) goOn() bool {
	ctx, cancel := context.WithTimeout(m.d.life, m.d.cfg.Deadline)
	defer cancel()
	q, err := m.monitor(ctx)
	if err != nil {
		return false
	}
	var s struct {
		Status string `json:"status"`
	}
	if err := q.run(ctx, "query-status", nil, &s); err != nil {
		return false
	}
	if s.Status != ioErrorState {
		return true
	}
	if err := q.run(ctx, "cont", nil, nil); err != nil {
		return false
	}
	m.log.Info("pod VM goes on: there is room again")
	return false // it may be full again at once; the next look tells
}

// ioErrorState is QEMU's run state of a VM that stands still for lack of room.
const ioErrorState = "io-error"

// errDatastoreFull is why such a VM does not answer.
var errDatastoreFull = errors.New("a volume's datastore is full")
