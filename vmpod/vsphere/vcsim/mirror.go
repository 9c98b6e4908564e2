package vcsim

import (
	"net/netip"
)

// A Mirror is a pod VM of a KVM node, as the inventory shows it.
type Mirror struct {
	// UUID is the VM's instance UUID, in lower case; it identifies the mirror.
	UUID string
	// Name is the VM's, unique in its folder.
	Name string
	// CPUs and Memory (bytes) are the VM's size.
	CPUs   int
	Memory int64
	// On is its power state.
	On bool
	// IP is the pod's; invalid while it has none.
	IP netip.Addr
	// Host is the node's name, one of Config.Clusters.
	Host string
	// Pool and Folder are managed object ids ("resgroup-42", "group-v42");
	// empty: the host's cluster's root pool, the datacenter's VM folder.
	Pool, Folder string
	// Annotations become the VM's extra configuration (keys as they are), and
	// Notes its annotation.
	Annotations map[string]string
	Notes       string
}

// A PowerOp is what a user asked of a mirror.
type PowerOp string

// Power operations.
const (
	PowerOn       PowerOp = "on"
	PowerOff      PowerOp = "off"
	PowerReset    PowerOp = "reset"
	PowerSuspend  PowerOp = "suspend"
	GuestShutdown PowerOp = "shutdown"
	GuestReboot   PowerOp = "reboot"
)
