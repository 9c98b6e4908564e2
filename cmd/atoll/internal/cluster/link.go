package cluster

import (
	"net/netip"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
)

// NodeLink carries the node's address.
const NodeLink = "atoll0"

func (l Layout) linkOwner() string { return "atoll " + l.ID() }

func (l Layout) ensureLink(netns string, addr netip.Prefix) (made bool, err error) {
	err = hostnet.Do(netns, func() error {
		made, err = hostnet.EnsureLink(NodeLink, l.linkOwner(), addr)
		return err
	})
	return made, err
}

func (l Layout) removeLink(netns string) error {
	return hostnet.Do(netns, func() error { return hostnet.RemoveLink(NodeLink, l.linkOwner()) })
}
