// Package netplugin defines how a pod VM gets its network: a Network makes an
// Attachment for each sandbox. netplugin/tap routes persistent taps on a KVM
// host; later implementations use CNI plug-ins or vSphere port groups.
package netplugin

import (
	"context"
	"net"
	"net/netip"
)

// A Network gives sandboxes addresses and host-side interfaces. Errors wrap
// errdefs classes; ErrResourceExhausted when no address is left.
type Network interface {
	// Configure sets the range that addresses are taken from (the node's pod
	// CIDR). It may come after start-up and may come again with an equal
	// value; a different one, while attachments exist, is refused.
	Configure(ctx context.Context, podCIDRs []netip.Prefix) error
	// Ready is nil when Attach can succeed, else says what is missing.
	Ready(ctx context.Context) error
	// Attach makes the host side for the sandbox key, or returns the one that
	// is there: it is idempotent on Request.Key. When it fails it leaves
	// nothing behind.
	Attach(ctx context.Context, req Request) (Attachment, error)
	// Detach takes it back; detaching what is not there succeeds.
	Detach(ctx context.Context, key string) error
	// List returns every attachment on this host, rebuilt from the kernel
	// and disk, so that leftovers can be found after a crash.
	List(ctx context.Context) ([]Attachment, error)
}

// A Request asks for one attachment.
type Request struct {
	// Key names the sandbox (vmpod.ID.String) and the attachment.
	Key string
	// Namespace and Name of the pod, for people who look at the host.
	Namespace, Name string
	// HostPorts are forwarded from the node to the pod.
	HostPorts []HostPort
}

// A HostPort forwards one port of the node to the pod.
type HostPort struct {
	Protocol      string // tcp, udp or sctp
	HostIP        netip.Addr
	HostPort      uint16
	ContainerPort uint16
}

// An Attachment is one pod's place in the network. The guest configures
// Addresses and Routes on the interface with MAC.
type Attachment struct {
	Key string `json:"key"`
	// Tap is the host's interface, persistent, owned by Owner's uid.
	Tap       string           `json:"tap"`
	MAC       net.HardwareAddr `json:"mac"`
	MTU       int              `json:"mtu"`
	Addresses []netip.Prefix   `json:"addresses"`
	Routes    []Route          `json:"routes"`
	HostPorts []HostPort       `json:"hostPorts,omitempty"`
}

// A Route is one route inside the guest.
type Route struct {
	Destination netip.Prefix `json:"destination"`
	// Gateway is invalid (the zero Addr) for an on-link route.
	Gateway netip.Addr `json:"gateway"`
}
