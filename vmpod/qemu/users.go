package qemu

import (
	"fmt"
	"hash/fnv"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

// A userTable gives each VM a user of its own, so that a guest that has taken
// over its QEMU meets nothing of other VMs: one user's processes may read each
// other's memory and descriptors.
type userTable struct {
	first, count uint32
	byVM         map[vmpod.ID]uint32
	taken        map[uint32]int // users of VMs adopted from another range may be shared
}

func newUserTable(first, count uint32) *userTable {
	return &userTable{first: first, count: max(count, 1), byVM: map[vmpod.ID]uint32{}, taken: map[uint32]int{}}
}

// claim chooses a user. It begins where the VM's name says, so that drivers
// that share a range seldom meet.
func (t *userTable) claim(id vmpod.ID) (uint32, error) {
	if t.count == 1 {
		return t.first, nil
	}
	t.release(id)
	h := fnv.New32a()
	h.Write([]byte(id.String()))
	start := h.Sum32() % t.count
	for i := range t.count {
		uid := t.first + (start+i)%t.count
		if t.taken[uid] == 0 {
			t.hold(id, uid)
			return uid, nil
		}
	}
	return 0, fmt.Errorf("all %d users of pod VMs are in use: %w", t.count, errdefs.ErrResourceExhausted)
}

// hold notes what an adopted VM runs as.
func (t *userTable) hold(id vmpod.ID, uid uint32) {
	t.release(id)
	t.byVM[id] = uid
	t.taken[uid]++
}

// release gives a VM's user back; QEMU has ended.
func (t *userTable) release(id vmpod.ID) {
	if uid, ok := t.byVM[id]; ok {
		delete(t.byVM, id)
		if t.taken[uid]--; t.taken[uid] == 0 {
			delete(t.taken, uid)
		}
	}
}
