package podinit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// setInterfaces brings up lo and every interface of the pod.
func setInterfaces(ctx context.Context, interfaces []*agentapi.Interface) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	for _, i := range interfaces {
		if err := setInterface(ctx, h, i); err != nil {
			return fmt.Errorf("interface %s (%s): %w", i.Name, i.Mac, err)
		}
	}
	return nil
}

func setInterface(ctx context.Context, h *netlink.Handle, i *agentapi.Interface) error {
	mac, err := net.ParseMAC(i.Mac)
	if err != nil || !only(i.Name, 15, "_.-") || i.Name == "." || i.Name == ".." {
		return fmt.Errorf("want a MAC and a name of 1 to 15 characters: %w", errdefs.ErrInvalidArgument)
	}
	link, err := linkByMAC(ctx, h, mac)
	if err != nil {
		return err
	}
	if link.Attrs().Name != i.Name {
		if err := h.LinkSetDown(link); err != nil {
			return err
		}
		if err := h.LinkSetName(link, i.Name); err != nil {
			return fmt.Errorf("rename %s: %w", link.Attrs().Name, err)
		}
	}
	if i.Mtu > 0 {
		if err := h.LinkSetMTU(link, int(i.Mtu)); err != nil {
			return fmt.Errorf("MTU %d: %w", i.Mtu, err)
		}
	}
	if !hasIPv6(i) {
		// Nobody asked for it: no router solicitations into the fabric.
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+i.Name+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return err
	}
	for _, s := range i.Addresses {
		addr, err := netlink.ParseAddr(s)
		if err != nil {
			return fmt.Errorf("address %q: %v: %w", s, err, errdefs.ErrInvalidArgument)
		}
		if addr.IP.To4() == nil {
			addr.Flags |= unix.IFA_F_NODAD // the host gave it to nobody else
		}
		if err := h.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("address %s: %w", s, err)
		}
	}
	for _, r := range i.Routes {
		if err := addRoute(h, link.Attrs().Index, r); err != nil {
			return fmt.Errorf("route to %s by %s: %w", r.Destination, r.Gateway, err)
		}
	}
	return nil
}

func hasIPv6(i *agentapi.Interface) bool {
	for _, a := range i.Addresses {
		if strings.Contains(a, ":") {
			return true
		}
	}
	return false
}

// linkByMAC waits for the interface, which may just be being plugged. One that
// stands for it is given its address.
func linkByMAC(ctx context.Context, h *netlink.Handle, mac net.HardwareAddr) (netlink.Link, error) {
	var found netlink.Link
	err := waitDevice(ctx, "NIC "+mac.String(), deviceTimeout, func() (bool, error) {
		links, err := h.LinkList()
		if err != nil {
			return false, err
		}
		for _, l := range links {
			if l.Attrs().HardwareAddr.String() == mac.String() {
				found = l
				return true, nil
			}
		}
		for _, l := range links {
			if l.Attrs().HardwareAddr.String() == agentapi.PlaceholderMAC {
				found = l
				return true, h.LinkSetHardwareAddr(l, mac)
			}
		}
		return false, nil
	})
	return found, err
}

// addRoute adds a route. A gateway need not be in any of the interface's
// subnets: pods have a single address and a link-local gateway.
func addRoute(h *netlink.Handle, index int, r *agentapi.Route) error {
	_, dst, err := net.ParseCIDR(r.Destination)
	if err != nil {
		return fmt.Errorf("%v: %w", err, errdefs.ErrInvalidArgument)
	}
	route := &netlink.Route{LinkIndex: index, Dst: dst, Scope: netlink.SCOPE_LINK}
	if r.Gateway != "" {
		if route.Gw = net.ParseIP(r.Gateway); route.Gw == nil {
			return fmt.Errorf("the gateway is no address: %w", errdefs.ErrInvalidArgument)
		}
		route.Scope = netlink.SCOPE_UNIVERSE
		route.Flags = int(netlink.FLAG_ONLINK)
	}
	return h.RouteReplace(route)
}
