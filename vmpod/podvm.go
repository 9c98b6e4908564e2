package vmpod

import (
	"net"

	"github.com/google/uuid"
)

// A PodVM tells which VM a pod has, for those who find one by the other.
type PodVM struct {
	ID    ID
	Owner Owner
	// CPUs and Memory (bytes) are how large the VM is now.
	CPUs   int
	Memory int64
	MAC    net.HardwareAddr
}

// DiskUUID names the writable disk of the machine. It follows from the
// machine's own UUID, as the disk does: the next attempt has another.
func (id ID) DiskUUID() uuid.UUID { return uuid.NewSHA1(id.UUID(), []byte("ephemeral-disk")) }
