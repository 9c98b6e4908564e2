package tap

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
)

// aliasPrefix begins the alias (`ip -d link`) of every link that we made; the
// instance follows, then the pod for people.
const aliasPrefix = "atoll/"

// ensureTap makes the record's tap, or completes one that is there.
func (n *Network) ensureTap(r record) error {
	name := r.tap()
	link, err := n.nl.LinkByName(name)
	if isLinkNotFound(err) {
		if err := createTap(name, n.cfg.UID, n.cfg.GID); err != nil {
			return err
		}
		failpoint.Hit(failpoint.AttachTapMade)
		link, err = n.nl.LinkByName(name)
	}
	if err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	if !isTap(link) {
		return fmt.Errorf("interface %s is there but is a %s, not a tap: remove it: %w", name, link.Type(), errdefs.ErrAlreadyExists)
	}
	if err := n.setUp(link, r); err != nil {
		return fmt.Errorf("interface %s: %w", name, err)
	}
	return nil
}

// setUp is idempotent; the order matters where a comment says so.
func (n *Network) setUp(link netlink.Link, r record) error {
	alias := aliasOf(n.instance, r)
	if link.Attrs().Alias != alias {
		if err := n.nl.LinkSetAlias(link, alias); err != nil {
			return fmt.Errorf("alias: %w", err)
		}
	}
	if link.Attrs().MTU != r.MTU {
		if err := n.nl.LinkSetMTU(link, r.MTU); err != nil {
			return fmt.Errorf("MTU %d: %w", r.MTU, err)
		}
	}
	if link.Attrs().HardwareAddr.String() != hostMAC.String() {
		if err := n.nl.LinkSetHardwareAddr(link, hostMAC); err != nil {
			return fmt.Errorf("address %s: %w", hostMAC, err)
		}
	}
	// Before the link is up, or it would already have an IPv6 address.
	if err := setLinkSysctls(r.tap(), len(r.HostPorts) > 0); err != nil {
		return err
	}
	if err := n.nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	// Scope link: it answers the pod, but is never chosen as the source of
	// anything that the node sends or masquerades.
	gateway := &netlink.Addr{IPNet: hostNet(Gateway.AsSlice()), Scope: unix.RT_SCOPE_LINK}
	if err := n.nl.AddrReplace(link, gateway); err != nil {
		return fmt.Errorf("gateway %s: %w", Gateway, err)
	}
	pod := net.IP(r.Address.AsSlice())
	// Permanent: the first packet need not wait for ARP, and a guest cannot
	// change who gets its packets.
	if err := n.nl.NeighSet(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT,
		IP: pod, HardwareAddr: macOf(r.Key),
	}); err != nil {
		return fmt.Errorf("neighbour %s: %w", pod, err)
	}
	err := n.nl.RouteReplace(&netlink.Route{
		LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
		Dst: hostNet(pod), Src: n.cfg.NodeIP.AsSlice(),
	})
	if errors.Is(err, unix.EINVAL) {
		if lerr := n.nodeIPIsLocal(); lerr != nil {
			return lerr
		}
	}
	if err != nil {
		return fmt.Errorf("route to %s: %w", pod, err)
	}
	return nil
}

func isTap(link netlink.Link) bool { return link.Type() == "tun" || link.Type() == "tuntap" }

// aliasOf is the mark and, for people, the pod. Names come from outside and
// end on a terminal.
func aliasOf(instance string, r record) string {
	clean := func(s string) string {
		s = strings.Map(func(c rune) rune {
			if c > ' ' && c < 0x7f {
				return c
			}
			return '?'
		}, s)
		return s[:min(len(s), 100)] // the kernel takes 255 bytes in all
	}
	return aliasPrefix + instance + " " + clean(r.Namespace) + "/" + clean(r.Name)
}

func hostNet(ip net.IP) *net.IPNet { return &net.IPNet{IP: ip, Mask: net.CIDRMask(32, 32)} }

// createTap makes a persistent tap that only uid and gid may open, with
// virtio headers, so that checksums and segmentation can be left to whoever
// does them last.
func createTap(name string, uid, gid int) error {
	// Not os.OpenFile: a tun descriptor cannot be polled before TUNSETIFF.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("tap %s: /dev/net/tun: %w (load the kernel module tun)", name, err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("tap %s: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("tap %s: make: %w", name, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid); err != nil {
		return fmt.Errorf("tap %s: owner %d: %w", name, uid, err)
	}
	if gid != 0 {
		if err := unix.IoctlSetInt(fd, unix.TUNSETGROUP, gid); err != nil {
			return fmt.Errorf("tap %s: group %d: %w", name, gid, err)
		}
	}
	// Last: until here the tap vanishes by itself when something fails.
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("tap %s: make it persistent: %w", name, err)
	}
	return nil
}

// removeTap takes addresses, neighbours and routes with it.
func (n *Network) removeTap(name string) error { return removeTapOf(n.nl, n.instance, name) }

// removeTapOf removes the tap unless it is somebody else's: another kind of
// interface, or one with another mark. Without any mark it is ours, from a
// process that died before it could set it.
func removeTapOf(nl *netlink.Handle, instance, name string) error {
	link, err := nl.LinkByName(name)
	if isLinkNotFound(err) {
		return nil
	}
	if err == nil {
		alias := link.Attrs().Alias
		if !isTap(link) || alias != "" && !strings.HasPrefix(alias, aliasPrefix+instance+" ") {
			return nil
		}
		err = nl.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

// markedTaps returns the names of the taps that bear the instance's mark.
func markedTaps(nl *netlink.Handle, instance string) ([]string, error) {
	links, err := nl.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var names []string
	for _, l := range links {
		a := l.Attrs()
		if strings.HasPrefix(a.Name, "atl") && strings.HasPrefix(a.Alias, aliasPrefix+instance+" ") {
			names = append(names, a.Name)
		}
	}
	return names, nil
}

// forgetConnections drops what connection tracking remembers of a pod that had
// UDP host ports: such a flow goes on for as long as its client sends, and
// would go on being sent to an address that is nobody's.
func (n *Network) forgetConnections(ctx context.Context, r record) {
	udp := false
	for _, p := range r.HostPorts {
		udp = udp || p.Protocol == "udp"
	}
	if !udp {
		return
	}
	filter := &netlink.ConntrackFilter{}
	if err := filter.AddIP(netlink.ConntrackReplySrcIP, r.Address.AsSlice()); err != nil {
		return
	}
	if _, err := n.nl.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, filter); err != nil {
		n.log.WarnContext(ctx, "pod network: connections could not be forgotten", "key", r.Key, "address", r.Address, "error", err)
	}
}

// mtu is the configured one, or that of the way out.
func (n *Network) mtu() (int, error) {
	if n.cfg.MTU != 0 {
		return n.cfg.MTU, nil
	}
	routes, err := n.nl.RouteList(nil, unix.AF_INET)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return 0, fmt.Errorf("pod network: routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() != "0.0.0.0/0" || r.LinkIndex == 0 {
			continue
		}
		if link, err := n.nl.LinkByIndex(r.LinkIndex); err == nil {
			return link.Attrs().MTU, nil
		}
	}
	return 1500, nil
}

func (n *Network) nodeIPIsLocal() error {
	addrs, err := n.nl.AddrList(nil, unix.AF_INET)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("pod network: addresses: %w", err)
	}
	for _, a := range addrs {
		if a.IP.Equal(n.cfg.NodeIP.AsSlice()) {
			return nil
		}
	}
	return fmt.Errorf("pod network: the node's address %s is on no interface of this host: set nodeIP to one that is: %w", n.cfg.NodeIP, errdefs.ErrFailedPrecondition)
}

func isLinkNotFound(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound)
}

// setLinkSysctls makes the tap's kernel settings those of a link to something
// untrusted.
func setLinkSysctls(name string, hostPorts bool) error {
	// Ports of the node are forwarded for the host's own 127.0.0.1, too. That
	// nothing of such a pod gets there is up to the packet filter alone; for
	// all others it is up to the kernel as well.
	localnet := "0"
	if hostPorts {
		localnet = "1"
	}
	for key, value := range map[string]string{
		// Strict: a packet is dropped unless its source is routed back over
		// the same tap. Ours always is, so this holds whatever the host's
		// default is. The packet filter checks the same, and the MAC.
		"ipv4/conf/" + name + "/rp_filter":        "1",
		"ipv4/conf/" + name + "/accept_redirects": "0",
		"ipv4/conf/" + name + "/send_redirects":   "0",
		"ipv4/conf/" + name + "/route_localnet":   localnet,
		// Pods have no IPv6 yet, and the host must not take router
		// advertisements from a guest.
		"ipv6/conf/" + name + "/disable_ipv6": "1",
	} {
		path := filepath.Join("/proc/sys/net", key)
		err := os.WriteFile(path, []byte(value), 0)
		if errors.Is(err, os.ErrNotExist) && strings.HasPrefix(key, "ipv6/") {
			continue // a host without IPv6
		}
		if err != nil {
			return fmt.Errorf("sysctl net/%s: %w", key, err)
		}
	}
	return nil
}
