package qemu

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// A deviceTable is what a VM has now: at first what it was launched with, then
// devices.json. QEMU has the last word on it, see Machine.reconcile.
type deviceTable struct {
	Disks  []diskEntry  `json:"disks"`
	NICs   []nicEntry   `json:"nics"`
	Shares []shareEntry `json:"shares,omitempty"`
}

type diskEntry struct {
	vmpod.Disk
	Slot int `json:"slot"` // on plugBus
}

type nicEntry struct {
	vmpod.NIC
	// Slot is 0 for a NIC of the boot, which is not on plugBus.
	Slot int `json:"slot"`
}

func bootDevices(s vmpod.Spec) deviceTable {
	var t deviceTable
	for i, d := range s.Disks {
		t.Disks = append(t.Disks, diskEntry{d, i + 1})
	}
	for _, n := range s.NICs {
		t.NICs = append(t.NICs, nicEntry{n, 0})
	}
	return t
}

// spec returns s with the table's devices.
func (t deviceTable) spec(s vmpod.Spec) vmpod.Spec {
	s.Disks, s.NICs, s.Shares = nil, nil, nil
	for _, d := range t.Disks {
		s.Disks = append(s.Disks, d.Disk)
	}
	for _, n := range t.NICs {
		s.NICs = append(s.NICs, n.NIC)
	}
	for _, f := range t.Shares {
		s.Shares = append(s.Shares, f.Share)
	}
	return s
}

// freeSlot returns a slot without a device; ok is false if all are full.
func (t deviceTable) freeSlot() (slot int, ok bool) {
	used := map[int]bool{}
	for _, d := range t.Disks {
		used[d.Slot] = true
	}
	for _, n := range t.NICs {
		used[n.Slot] = true
	}
	for _, f := range t.Shares {
		used[f.Slot] = true
	}
	for i := 1; i <= plugSlots; i++ {
		if !used[i] {
			return i, true
		}
	}
	return 0, false
}

// without returns the table less the devices for which drop is true.
func (t deviceTable) without(drop func(name string) bool) deviceTable {
	var out deviceTable
	for _, d := range t.Disks {
		if !drop(diskName(d.ID)) {
			out.Disks = append(out.Disks, d)
		}
	}
	for _, n := range t.NICs {
		if !drop(nicName(n.ID)) {
			out.NICs = append(out.NICs, n)
		}
	}
	for _, f := range t.Shares {
		if !drop(shareName(f.ID)) {
			out.Shares = append(out.Shares, f)
		}
	}
	return out
}

// size is the number of devices.
func (t deviceTable) size() int { return len(t.Disks) + len(t.NICs) + len(t.Shares) }

// diskFaults counts the errors of the host's disks that a guest has met.
type diskFaults struct {
	count map[string]int // by disk ID
	last  string
	full  bool // the last one was for lack of space
	at    time.Time
	lost  map[string]string // by share ID: host directories whose servers have ended
}

// faultLasts is how long after its last error a disk is said to fail: a guest
// whose writes fail goes on to write, and QEMU tells of that once a second.
const faultLasts = time.Minute

// describe returns a CamelCase reason and a sentence, empty without faults.
func (f diskFaults) describe(now time.Time) (reason, message string) {
	if len(f.lost) > 0 {
		paths := slices.Compact(slices.Sorted(maps.Values(f.lost)))
		return vmpod.ReasonHostDirectoryLost, fmt.Sprintf("the server of host directory %s has ended: what of the pod uses it hangs until the pod is made anew", strings.Join(paths, ", "))
	}
	if len(f.count) == 0 || now.Sub(f.at) > faultLasts {
		return "", ""
	}
	total := 0
	for _, n := range f.count {
		total += n
	}
	if f.full {
		return vmpod.ReasonHostDiskFull, fmt.Sprintf("the host has no space left for disk %s of the pod: its writes fail (%d so far)", f.last, total)
	}
	return vmpod.ReasonHostDiskError, fmt.Sprintf("the host cannot read or write disk %s of the pod (%d errors so far)", f.last, total)
}

// onDiskError counts a BLOCK_IO_ERROR, which a guest can cause at any rate,
// and logs the first of each disk.
func (m *Machine) onDiskError(ev qmpEvent) {
	var d struct {
		Node      string `json:"node-name"`
		Device    string `json:"device"`
		Operation string `json:"operation"`
		Action    string `json:"action"`
		NoSpace   bool   `json:"nospace"`
		Reason    string `json:"reason"`
	}
	_ = json.Unmarshal(ev.Data, &d)
	// QEMU sets nospace only where it would have paused the guest for it.
	full := d.NoSpace || strings.EqualFold(d.Reason, unix.ENOSPC.Error()) || strings.EqualFold(d.Reason, unix.EDQUOT.Error())
	disk := strings.TrimPrefix(d.Node, nodeName(""))
	m.mu.Lock()
	if m.faults.count == nil {
		m.faults.count = map[string]int{}
	}
	m.faults.count[disk]++
	m.faults.last, m.faults.at = disk, time.Now()
	m.faults.full = full
	first := m.faults.count[disk] == 1
	m.mu.Unlock()
	if first {
		m.log.Error("host disk error", "disk", disk, "operation", d.Operation, "action", d.Action, "no_space", full, "err", d.Reason)
	}
}
