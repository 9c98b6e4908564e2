package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// EnsureLink makes a bridge without ports that carries a node's address,
// in the caller's network namespace, and reports whether it made it. The
// owner is written onto the link: one that another owner made is refused
// (ErrAlreadyExists).
func EnsureLink(name, owner string, addr netip.Prefix) (made bool, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, fmt.Errorf("link %s: %w", name, err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		if err := h.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return false, fmt.Errorf("make link %s: %w", name, err)
		}
		made = true
		link, err = h.LinkByName(name)
	}
	if err != nil {
		return made, fmt.Errorf("link %s: %w", name, err)
	}
	if !made && link.Attrs().Alias != owner {
		return false, fmt.Errorf("link %s was made by %q; take that cluster down, or use --isolated: %w", name, link.Attrs().Alias, errdefs.ErrAlreadyExists)
	}
	if err := configure(h, link, owner, addr); err != nil {
		if made {
			err = errors.Join(err, h.LinkDel(link))
		}
		return false, fmt.Errorf("link %s: %w", name, err)
	}
	return made, nil
}

func configure(h *netlink.Handle, link netlink.Link, owner string, addr netip.Prefix) error {
	if err := h.LinkSetAlias(link, owner); err != nil {
		return err
	}
	ip := &netlink.Addr{IPNet: &net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), 32)}}
	if err := h.AddrReplace(link, ip); err != nil {
		return fmt.Errorf("set address %s: %w", addr, err)
	}
	return h.LinkSetUp(link)
}

// RemoveLink removes a link that owner made. Removing what is gone, or what
// is another's, succeeds.
func RemoveLink(name, owner string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	if link.Attrs().Alias != owner {
		return nil
	}
	if err := h.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove link %s: %w", name, err)
	}
	return nil
}
