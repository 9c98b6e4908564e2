package tap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nodeLinkAlias marks the links that EnsureNodeLink made.
const nodeLinkAlias = "atoll: node addresses"

// EnsureNodeLink makes the interface name (such as "atoll0") with exactly
// these addresses, or brings one that it made before in line. It is a bridge
// without ports, since the dummy driver is missing from some hosts' kernels;
// what matters is that it holds addresses that are no other interface's. The
// addresses should be /32: a wider one routes its whole range into nothing.
// An interface of that name that somebody else made is ErrAlreadyExists.
//
// routed are ranges that are nobody's address but must have a way to be sent,
// for nftables to redirect them: the Services'. Without a default route the
// node itself could not even try to connect to them.
func EnsureNodeLink(ctx context.Context, name string, addrs []netip.Prefix, routed ...netip.Prefix) error {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("interface %s: netlink: %w", name, err)
	}
	defer nl.Close()
	if err := ctx.Err(); err != nil {
		return err
	}
	link, err := nodeLink(nl, name)
	if errdefs.IsNotFound(err) {
		bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
		bridge.Name = name
		if err := nl.LinkAdd(bridge); err != nil {
			return fmt.Errorf("interface %s: make a bridge: %w (load the kernel module bridge, run as root)", name, err)
		}
		if err := nl.LinkSetAlias(bridge, nodeLinkAlias); err != nil {
			return errors.Join(fmt.Errorf("interface %s: alias: %w", name, err), nl.LinkDel(bridge))
		}
		link, err = nodeLink(nl, name)
	}
	if err != nil {
		return err
	}
	if err := nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("interface %s: up: %w", name, err)
	}
	if err := setAddresses(nl, link, addrs); err != nil {
		return err
	}
	for _, p := range routed {
		p = p.Masked()
		route := &netlink.Route{
			LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		}
		if len(addrs) > 0 {
			route.Src = addrs[0].Addr().AsSlice()
		}
		if err := nl.RouteReplace(route); err != nil {
			return fmt.Errorf("interface %s: route to %s: %w", name, p, err)
		}
	}
	return nil
}

func setAddresses(nl *netlink.Handle, link netlink.Link, addrs []netip.Prefix) error {
	name := link.Attrs().Name
	have, err := nl.AddrList(link, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("interface %s: addresses: %w", name, err)
	}
	want := map[string]bool{}
	for _, p := range addrs {
		want[p.String()] = true
		ip := net.IP(p.Addr().AsSlice())
		err := nl.AddrReplace(link, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}})
		if err != nil {
			return fmt.Errorf("interface %s: address %s: %w", name, p, err)
		}
	}
	for _, a := range have {
		if !want[a.IPNet.String()] {
			if err := nl.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return fmt.Errorf("interface %s: remove address %s: %w", name, a.IPNet, err)
			}
		}
	}
	return nil
}

// RemoveNodeLink removes what EnsureNodeLink made. Removing what is not there
// succeeds; an interface that somebody else made stays and is an error.
func RemoveNodeLink(_ context.Context, name string) error {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("interface %s: netlink: %w", name, err)
	}
	defer nl.Close()
	link, err := nodeLink(nl, name)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := nl.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

// nodeLink finds our link of that name.
func nodeLink(nl *netlink.Handle, name string) (netlink.Link, error) {
	link, err := nl.LinkByName(name)
	if isLinkNotFound(err) {
		return nil, fmt.Errorf("interface %s: %w", name, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s: %w", name, err)
	}
	if link.Type() != "bridge" || link.Attrs().Alias != nodeLinkAlias {
		return nil, fmt.Errorf("interface %s is there, but Atoll did not make it: rename or remove it: %w", name, errdefs.ErrAlreadyExists)
	}
	return link, nil
}
