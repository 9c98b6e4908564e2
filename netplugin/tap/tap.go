// Package tap gives each pod VM on this host a tap of its own and routes to it.
//
// There is no bridge. A pod has a /32 address and sends everything to the
// gateway 169.254.1.1, which is the host's end of its own tap; the host has a
// route for each pod address. So every packet passes the host's forwarding
// path, where nftables does Services, host ports and policy. See
// docs/decisions/0004-routed-taps.md.
//
// What is stored is one JSON record an attachment, written before anything is
// made in the kernel; all else (link, address, neighbour, route, packet filter)
// is derived from it and repaired from it.
//
// All of it happens in the network namespace of the calling process: the
// process as a whole must be in it, since interfaces, sysctls and the nft
// program follow the calling thread.
package tap

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/netplugin/ipam"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Config says where and for whom the taps are made.
type Config struct {
	// StateDir holds the records; it is made if need be. Its path is the
	// identity of this Network: what it makes in the kernel is marked with a
	// hash of it, and nothing without that mark is ever removed.
	StateDir string
	// UID and GID may open the taps: QEMU's. A GID of 0 is not checked.
	UID, GID int
	// NodeIP is the source address that pods see when the node talks to them.
	// It must be on an interface of this host.
	NodeIP netip.Addr
	// ClusterCIDRs are the ranges of all pods, Services and nodes: traffic
	// from pods to anywhere else leaves with the node's address.
	ClusterCIDRs []netip.Prefix
	// MTU of the pods' interfaces, in bytes; 0 takes that of the interface
	// with the default route, or 1500 without one.
	MTU int
	// Logger defaults to slog.Default().
	Logger *slog.Logger
}

// MasqueradeMark is the bit of the packet mark by which kube-proxy asks for
// masquerading (its default bit, 14). Where such a packet goes to a pod of
// this node it gets the node's address as its source.
const MasqueradeMark = 0x4000

// Gateway is the address that every pod sends to: the host's end of its tap.
var Gateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})

// hostMAC is the same on every tap, so that what a guest remembers of its
// gateway stays true when it is restored elsewhere. The octets after the
// locally administered 02 spell "atoll".
var hostMAC = net.HardwareAddr{0x02, 'a', 't', 'o', 'l', 'l'}

// Network is a netplugin.Network of routed taps.
type Network struct {
	cfg      Config
	log      *slog.Logger
	instance string
	nl       *netlink.Handle
	fw       *firewall
	store    store

	mu      sync.Mutex
	podCIDR netip.Prefix
	records map[string]record // by key
	last    netip.Addr        // the address given out last
}

var _ netplugin.Network = (*Network)(nil)

// New opens the Network of cfg.StateDir. It brings the kernel in line with the
// records: taps that bear our mark but have no record are removed, and what is
// missing for a record is made again. A failure to repair one attachment is
// logged and left to the next Attach of its key.
func New(cfg Config) (*Network, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	fw, err := newFirewall(instanceOf(cfg.StateDir), cfg)
	if err != nil {
		return nil, err
	}
	n := &Network{cfg: cfg, log: cfg.Logger, instance: instanceOf(cfg.StateDir), fw: fw, store: store{dir: filepath.Join(cfg.StateDir, "attachments")}}
	if n.records, err = n.store.load(); err != nil {
		return nil, err
	}
	var newest uint64
	for _, r := range n.records {
		if r.Sequence >= newest {
			newest, n.last = r.Sequence, r.Address
		}
	}
	if n.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER); err != nil {
		return nil, fmt.Errorf("pod network: netlink: %w", err)
	}
	if err := n.repair(context.Background()); err != nil {
		n.nl.Close()
		return nil, err
	}
	return n, nil
}

func (c Config) complete() (Config, error) {
	if c.StateDir == "" || !c.NodeIP.Is4() || c.NodeIP.IsUnspecified() {
		return c, fmt.Errorf("pod network: StateDir and an IPv4 NodeIP must be set (got %q, %s): %w", c.StateDir, c.NodeIP, errdefs.ErrInvalidArgument)
	}
	for _, p := range c.ClusterCIDRs {
		if !p.IsValid() || !p.Addr().Is4() {
			return c, fmt.Errorf("pod network: cluster CIDR %s is not an IPv4 prefix: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	if c.MTU != 0 && (c.MTU < 576 || c.MTU > 65521) {
		return c, fmt.Errorf("pod network: MTU %d is not between 576 and 65521: %w", c.MTU, errdefs.ErrInvalidArgument)
	}
	dir, err := filepath.Abs(c.StateDir)
	if err != nil {
		return c, err
	}
	c.StateDir = dir
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c, nil
}

// instanceOf marks what belongs to one state directory: 8 hex digits.
func instanceOf(stateDir string) string { return shortHash("instance", stateDir, 8) }

// tapName is "atl" and 11 hex digits, 14 of the 15 bytes of an interface name.
func tapName(key string) string { return "atl" + shortHash("tap", key, 11) }

// macOf is the guest's address: derived, so that it survives everything.
func macOf(key string) net.HardwareAddr {
	sum := sha256.Sum256([]byte("mac\x00" + key))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^0x01 | 0x02 // unicast, locally administered
	return mac
}

func shortHash(what, text string, digits int) string {
	sum := sha256.Sum256([]byte(what + "\x00" + text))
	return hex.EncodeToString(sum[:])[:digits]
}

// Close releases the netlink sockets. Taps and routes stay: VMs outlive the
// process that made them. Cleanup removes them.
func (n *Network) Close() error {
	n.nl.Close()
	return nil
}

// Configure implements netplugin.Network. One IPv4 range is supported.
func (n *Network) Configure(ctx context.Context, podCIDRs []netip.Prefix) error {
	if len(podCIDRs) != 1 || !podCIDRs[0].Addr().Is4() {
		return fmt.Errorf("pod network: pod CIDRs %v: one IPv4 range is supported: %w", podCIDRs, errdefs.ErrNotImplemented)
	}
	cidr := podCIDRs[0].Masked()
	if err := ipam.Check(cidr); err != nil {
		return fmt.Errorf("pod network: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if cidr == n.podCIDR {
		return nil
	}
	for _, r := range n.records {
		if n.podCIDR.IsValid() || !cidr.Contains(r.Address) {
			return fmt.Errorf("pod network: cannot change the pod CIDR to %s while %s/%s has %s: drain the node first: %w", cidr, r.Namespace, r.Name, r.Address, errdefs.ErrFailedPrecondition)
		}
	}
	if err := n.fw.replace(ctx, cidr, n.records); err != nil {
		return err
	}
	n.podCIDR = cidr
	n.log.InfoContext(ctx, "pod network configured", "pod_cidr", cidr, "attachments", len(n.records))
	return nil
}

// Ready implements netplugin.Network.
func (n *Network) Ready(context.Context) error {
	n.mu.Lock()
	cidr := n.podCIDR
	n.mu.Unlock()
	if !cidr.IsValid() {
		return fmt.Errorf("pod network: the node has no pod CIDR yet: %w", errdefs.ErrUnavailable)
	}
	if err := n.nodeIPIsLocal(); err != nil {
		return err
	}
	return forwardingIsOn()
}

// Attach implements netplugin.Network.
func (n *Network) Attach(ctx context.Context, req netplugin.Request) (netplugin.Attachment, error) {
	if err := validate(req); err != nil {
		return netplugin.Attachment{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	r, known := n.records[req.Key]
	if !known {
		var err error
		if r, err = n.plan(req); err != nil {
			return netplugin.Attachment{}, err
		}
		if err := n.store.save(r); err != nil {
			return netplugin.Attachment{}, err
		}
		failpoint.Hit(failpoint.AttachRecorded)
		n.records[r.Key], n.last = r, r.Address
	}
	err := n.ensure(ctx, r)
	if err == nil {
		return r.attachment(), nil
	}
	if !known {
		// The caller's context may be why it failed.
		if uerr := n.remove(context.WithoutCancel(ctx), r); uerr != nil {
			n.log.ErrorContext(ctx, "pod network: a failed attachment could not be undone", "key", r.Key, "tap", r.tap(), "error", uerr)
		}
	}
	return netplugin.Attachment{}, fmt.Errorf("attach %s: %w", req.Key, err)
}

// plan chooses what a new attachment will be, without doing anything.
func (n *Network) plan(req netplugin.Request) (record, error) {
	if !n.podCIDR.IsValid() {
		return record{}, fmt.Errorf("attach %s: the node has no pod CIDR yet: %w", req.Key, errdefs.ErrUnavailable)
	}
	used := map[netip.Addr]bool{n.cfg.NodeIP: true}
	var newest uint64
	for _, r := range n.records {
		used[r.Address] = true
		newest = max(newest, r.Sequence)
		if r.tap() == tapName(req.Key) {
			return record{}, fmt.Errorf("attach %s: its interface name %s is that of %s: %w", req.Key, r.tap(), r.Key, errdefs.ErrAlreadyExists)
		}
		for _, have := range r.HostPorts {
			for _, want := range req.HostPorts {
				if collide(have, want) {
					return record{}, fmt.Errorf("attach %s: host port %d/%s is taken by pod %s/%s: %w", req.Key, want.HostPort, want.Protocol, r.Namespace, r.Name, errdefs.ErrAlreadyExists)
				}
			}
		}
	}
	for _, p := range req.HostPorts {
		if err := portIsFree(p); err != nil {
			return record{}, fmt.Errorf("attach %s: %w", req.Key, err)
		}
	}
	addr, err := ipam.Next(n.podCIDR, n.last, func(a netip.Addr) bool { return used[a] })
	if err != nil {
		return record{}, fmt.Errorf("attach %s: %w", req.Key, err)
	}
	mtu, err := n.mtu()
	if err != nil {
		return record{}, err
	}
	return record{
		Key: req.Key, Namespace: req.Namespace, Name: req.Name,
		Address: addr, MTU: mtu, HostPorts: req.HostPorts, Sequence: newest + 1,
	}, nil
}

// ensure makes everything in the kernel that the record asks for and that is
// not there.
func (n *Network) ensure(ctx context.Context, r record) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := n.enableForwarding(); err != nil {
		return err
	}
	if err := n.ensureTap(r); err != nil {
		return err
	}
	failpoint.Hit(failpoint.AttachTapUp)
	err := n.fw.add(ctx, r)
	if errors.Is(err, errNoTable) {
		err = n.fw.replace(ctx, n.podCIDR, n.records)
	}
	failpoint.Hit(failpoint.AttachFiltered)
	return err
}

// remove takes everything back, the record last, so that a failure or a crash
// in between can be continued. It is idempotent.
func (n *Network) remove(ctx context.Context, r record) error {
	if err := n.fw.remove(ctx, r); err != nil {
		return err
	}
	failpoint.Hit(failpoint.DetachFilter)
	if err := n.removeTap(r.tap()); err != nil {
		return err
	}
	failpoint.Hit(failpoint.DetachTap)
	n.forgetConnections(ctx, r)
	if err := n.store.remove(r.Key); err != nil {
		return err
	}
	failpoint.Hit(failpoint.DetachRecord)
	delete(n.records, r.Key)
	return nil
}

// Detach implements netplugin.Network.
func (n *Network) Detach(ctx context.Context, key string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, ok := n.records[key]
	if !ok {
		return nil
	}
	if err := n.remove(ctx, r); err != nil {
		return fmt.Errorf("detach %s: %w", key, err)
	}
	return nil
}

// List implements netplugin.Network, sorted by key.
func (n *Network) List(context.Context) ([]netplugin.Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	list := make([]netplugin.Attachment, 0, len(n.records))
	for _, r := range n.records {
		list = append(list, r.attachment())
	}
	slices.SortFunc(list, func(a, b netplugin.Attachment) int { return strings.Compare(a.Key, b.Key) })
	return list, nil
}

// repair brings the kernel in line with the records.
func (n *Network) repair(ctx context.Context) error {
	taps, err := markedTaps(n.nl, n.instance)
	if err != nil {
		return fmt.Errorf("pod network: %w", err)
	}
	known := map[string]bool{}
	for _, r := range n.records {
		known[r.tap()] = true
	}
	for _, name := range taps {
		if known[name] {
			continue
		}
		n.log.WarnContext(ctx, "pod network: removing a tap that no record explains", "tap", name)
		if err := n.removeTap(name); err != nil {
			return err
		}
	}
	if len(n.records) == 0 {
		return nil
	}
	if err := n.fw.replace(ctx, netip.Prefix{}, n.records); err != nil {
		return err
	}
	if err := n.enableForwarding(); err != nil {
		return err
	}
	for _, r := range n.records {
		if err := n.ensureTap(r); err != nil {
			n.log.ErrorContext(ctx, "pod network: an attachment could not be repaired", "key", r.Key, "tap", r.tap(), "error", err)
		}
	}
	return nil
}

func validate(req netplugin.Request) error {
	if req.Key == "" || len(req.Key) > 256 {
		return fmt.Errorf("attach %q: a key has 1 to 256 bytes: %w", req.Key, errdefs.ErrInvalidArgument)
	}
	for i, p := range req.HostPorts {
		var err error
		switch {
		case p.Protocol != "tcp" && p.Protocol != "udp" && p.Protocol != "sctp":
			err = errors.New("the protocol must be tcp, udp or sctp")
		case p.HostPort == 0 || p.ContainerPort == 0:
			err = errors.New("ports are 1 to 65535")
		case p.HostIP.IsValid() && !p.HostIP.Is4():
			err = errors.New("the host IP must be IPv4")
		case p.HostIP.IsLoopback():
			err = errors.New("a port of a loopback address cannot be forwarded: leave hostIP empty or use the node's address")
		case slices.ContainsFunc(req.HostPorts[:i], func(q netplugin.HostPort) bool { return collide(p, q) }):
			err = errors.New("it is asked for twice")
		}
		if err != nil {
			return fmt.Errorf("attach %s: host port %d/%s: %v: %w", req.Key, p.HostPort, p.Protocol, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// collide is true if both want the same port of the same address.
func collide(a, b netplugin.HostPort) bool {
	any := func(p netplugin.HostPort) bool { return !p.HostIP.IsValid() || p.HostIP.IsUnspecified() }
	return a.Protocol == b.Protocol && a.HostPort == b.HostPort && (any(a) || any(b) || a.HostIP == b.HostIP)
}
