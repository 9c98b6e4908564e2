package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/vmpod"
)

// Plug implements vmpod.Plugger.
func (m *Machine) Plug(ctx context.Context, dev vmpod.Device) error {
	if err := m.plug(ctx, dev); err != nil {
		return fmt.Errorf("pod VM %s: plug: %w", m.id, err)
	}
	return nil
}

func (m *Machine) plug(ctx context.Context, dev vmpod.Device) error {
	n := 0
	var err error
	if dev.Disk != nil {
		n, err = n+1, checkDisk(*dev.Disk)
	}
	if dev.NIC != nil {
		n, err = n+1, checkNIC(*dev.NIC)
	}
	if dev.Share != nil {
		n, err = n+1, checkShare(*dev.Share)
	}
	if n != 1 {
		return fmt.Errorf("want exactly one disk, NIC or share: %w", errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	m.plugging.Lock()
	defer m.plugging.Unlock()
	q, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	there, err := m.has(dev)
	if there || err != nil {
		return err
	}
	before := m.table()
	slot, ok := before.freeSlot()
	if !ok {
		return fmt.Errorf("all %d slots are in use: %w", plugSlots, errdefs.ErrResourceExhausted)
	}
	after := before
	switch {
	case dev.Disk != nil:
		after.Disks = append(after.Disks[:len(after.Disks):len(after.Disks)], diskEntry{keyless(*dev.Disk), slot})
	case dev.NIC != nil:
		after.NICs = append(after.NICs[:len(after.NICs):len(after.NICs)], nicEntry{*dev.NIC, slot})
	default:
		after.Shares = append(after.Shares[:len(after.Shares):len(after.Shares)], shareEntry{Share: *dev.Share, Slot: slot})
	}
	if err := m.setTable(after); err != nil { // the intent, before the act
		return err
	}
	failpoint.Hit(failpoint.PlugRecorded)
	switch {
	case dev.Disk != nil:
		err = addDisk(ctx, q, *dev.Disk, slot)
	case dev.NIC != nil:
		err = addNIC(ctx, q, *dev.NIC, slot)
	default:
		err = m.addShare(ctx, q, *dev.Share, slot)
	}
	if err != nil {
		// Undoing must happen also when ctx is what ended.
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.d.cfg.Deadline)
		defer cancel()
		if rerr := m.reconcile(undo, q); rerr != nil {
			m.log.Error("failed plug cannot be undone", "err", rerr)
		}
	}
	return err
}

// has says whether an equal device is there; a different one of the same ID
// is an error.
func (m *Machine) has(dev vmpod.Device) (bool, error) {
	t := m.table()
	for _, d := range t.Disks {
		if dev.Disk != nil && d.ID == dev.Disk.ID {
			if !d.Disk.Equal(*dev.Disk) {
				return false, fmt.Errorf("disk %s is there with other properties: unplug it first: %w", d.ID, errdefs.ErrAlreadyExists)
			}
			return true, nil
		}
	}
	for _, n := range t.NICs {
		if dev.NIC != nil && n.ID == dev.NIC.ID {
			if !reflect.DeepEqual(n.NIC, *dev.NIC) {
				return false, fmt.Errorf("NIC %s is there with other properties: unplug it first: %w", n.ID, errdefs.ErrAlreadyExists)
			}
			return true, nil
		}
	}
	for _, f := range t.Shares {
		if dev.Share != nil && f.ID == dev.Share.ID {
			if f.Share != *dev.Share {
				return false, fmt.Errorf("share %s is there with other properties: unplug it first: %w", f.ID, errdefs.ErrAlreadyExists)
			}
			return true, nil
		}
	}
	return false, nil
}

func (m *Machine) table() deviceTable {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.devices
}

// setTable records the devices, on disk first.
func (m *Machine) setTable(t deviceTable) error {
	if err := m.dir.write(devicesFile, t); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices = t
	return nil
}

// addDisk hands a disk's files to QEMU and adds node and device.
func addDisk(ctx context.Context, q *qmpConn, d vmpod.Disk, slot int) error {
	if d.Volume != nil {
		return addVolume(ctx, q, d, slot)
	}
	path, err := openImage(d, func(f *os.File) (string, error) {
		defer f.Close()
		var r struct {
			Set int `json:"fdset-id"`
		}
		err := q.run(ctx, "add-fd", map[string]any{"opaque": diskName(d.ID)}, &r, f)
		return fdsetPath(r.Set), err
	})
	if err != nil {
		return err
	}
	if err := q.run(ctx, "blockdev-add", blockNode(d, path), nil); err != nil {
		return err
	}
	failpoint.Hit(failpoint.PlugNodeAdded)
	err = q.run(ctx, "device_add", diskDevice(d, slot), nil)
	failpoint.Hit(failpoint.PlugDeviceAdded)
	return err
}

func addNIC(ctx context.Context, q *qmpConn, n vmpod.NIC, slot int) error {
	tap, err := openTap(n.Tap)
	if err != nil {
		return err
	}
	defer tap.Close()
	fdName := "tap-" + n.ID
	if err := q.run(ctx, "getfd", map[string]any{"fdname": fdName}, nil, tap); err != nil {
		return err
	}
	if err := q.run(ctx, "netdev_add", map[string]any{"type": "tap", "id": netdevName(n.ID), "fd": fdName}, nil); err != nil {
		_ = q.run(ctx, "closefd", map[string]any{"fdname": fdName}, nil)
		return err
	}
	return q.run(ctx, "device_add", nicDevice(n, slot), nil)
}

// Unplug implements vmpod.Plugger. A disk that the guest still uses (mounted)
// goes away under it: the caller has the guest let go first. An ID is looked
// up among NICs, disks, then shares. NICs of the boot cannot be unplugged.
func (m *Machine) Unplug(ctx context.Context, id string) error {
	if err := m.unplug(ctx, id); err != nil {
		return fmt.Errorf("pod VM %s: unplug %q: %w", m.id, id, err)
	}
	return nil
}

func (m *Machine) unplug(ctx context.Context, id string) error {
	m.plugging.Lock()
	for m.copying(id) != nil {
		m.plugging.Unlock() // the copy may be about to begin
		if err := m.stopCopy(ctx, id); err != nil {
			return err
		}
		m.plugging.Lock()
	}
	defer m.plugging.Unlock()
	name := ""
	t := m.table()
	for _, n := range t.NICs {
		if n.ID == id {
			name = nicName(id)
			if n.Slot == 0 {
				return fmt.Errorf("a NIC of the boot stays: %w", errdefs.ErrFailedPrecondition)
			}
		}
	}
	for _, d := range t.Disks {
		if d.ID == id {
			name = diskName(id)
		}
	}
	for _, f := range t.Shares {
		if f.ID == id && name == "" {
			name = shareName(id)
		}
	}
	if name == "" {
		return nil
	}
	q, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	if err := m.endCopy(ctx, q, id); err != nil { // a killed process's
		return err
	}
	if err := removeDevice(ctx, q, name); err != nil {
		return err
	}
	return m.reconcile(ctx, q)
}

// removeDevice asks the guest to give a device back and waits until it has.
func removeDevice(ctx context.Context, q *qmpConn, name string) error {
	events, unwatch := q.watch("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR")
	defer unwatch()
	err := q.run(ctx, "device_del", map[string]any{"id": name}, nil)
	var refused *qmpError
	switch {
	case errors.As(err, &refused) && refused.Class == "DeviceNotFound":
		return nil
	case errors.As(err, &refused) && strings.Contains(refused.Desc, "already in the process of unplug"):
		// An earlier call gave up waiting; we go on with it.
	case err != nil:
		return err
	}
	for {
		select {
		case ev := <-events:
			var d struct {
				Device string `json:"device"`
			}
			if err := json.Unmarshal(ev.Data, &d); err != nil || d.Device != name {
				continue
			}
			if ev.Name == "DEVICE_DELETED" {
				return nil
			}
			return fmt.Errorf("the guest refuses to give the device back: %w", errdefs.ErrFailedPrecondition)
		case <-q.done:
			return fmt.Errorf("QEMU is gone: %w", errdefs.ErrUnavailable)
		case <-ctx.Done():
			return fmt.Errorf("the guest has not let go of the device: %w", ctx.Err())
		}
	}
}

// reconcile makes the table and QEMU agree after a plug failed half-way, an
// unplug was completed, or another process may have left either: a device that
// QEMU does not have is dropped with all that was added for it.
func (m *Machine) reconcile(ctx context.Context, q *qmpConn) error {
	var there []struct {
		Name string `json:"name"`
	}
	if err := q.run(ctx, "qom-list", map[string]any{"path": "/machine/peripheral"}, &there); err != nil {
		return err
	}
	has := map[string]bool{}
	for _, d := range there {
		has[d.Name] = true
	}
	before := m.table()
	after := before.without(func(name string) bool { return !has[name] })
	if after.size() == before.size() {
		return nil
	}
	for _, d := range before.Disks {
		if !has[diskName(d.ID)] {
			_ = q.run(ctx, "blockdev-del", map[string]any{"node-name": nodeName(d.ID)}, nil) // may not have been added
			dropVolume(ctx, q, d.Disk)
			if err := dropFDs(ctx, q, diskName(d.ID)); err != nil {
				return err
			}
		}
	}
	for _, n := range before.NICs {
		if !has[nicName(n.ID)] {
			_ = q.run(ctx, "netdev_del", map[string]any{"id": netdevName(n.ID)}, nil)
		}
	}
	for _, f := range before.Shares {
		if !has[shareName(f.ID)] {
			if err := m.dropShare(ctx, q, f); err != nil {
				return err
			}
		}
	}
	return m.setTable(after)
}

// A namedFDs is a set of descriptors that QEMU has, and how it was called when
// it was handed over.
type namedFDs struct {
	id     int
	opaque string
}

func fdsets(ctx context.Context, q *qmpConn) ([]namedFDs, error) {
	var sets []struct {
		ID  int `json:"fdset-id"`
		FDs []struct {
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := q.run(ctx, "query-fdsets", nil, &sets); err != nil {
		return nil, err
	}
	var found []namedFDs
	for _, s := range sets {
		if len(s.FDs) > 0 {
			found = append(found, namedFDs{s.ID, s.FDs[0].Opaque})
		}
	}
	return found, nil
}

// dropFDs takes back the descriptors that were handed over under a name.
func dropFDs(ctx context.Context, q *qmpConn, opaque string) error {
	sets, err := fdsets(ctx, q)
	if err != nil {
		return err
	}
	for _, s := range sets {
		if s.opaque == opaque {
			if err := q.run(ctx, "remove-fd", map[string]any{"fdset-id": s.id}, nil); err != nil {
				return err
			}
		}
	}
	return nil
}
