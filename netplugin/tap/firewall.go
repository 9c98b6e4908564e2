package tap

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"sigs.k8s.io/knftables"
)

// A firewall is the one nftables table of an instance. Everything in it
// follows from the records, so it can be replaced as a whole at any time:
//
//   - from_pod drops what a tap sends with another source address or MAC than
//     its pod's, or to the host's loopback, and everything that is not IPv4 (ARP is not seen here: the
//     host does not believe it, its neighbour entries are permanent);
//   - raw drops what claims to come from a pod but comes in elsewhere;
//   - host_ports forwards ports of the node;
//   - postrouting gives pods' traffic that leaves the cluster the address of
//     the interface it leaves by, and traffic to a pod that would be answered
//     past us (a pod that reaches itself through a Service, what kube-proxy
//     marked, or what the host sent to a port of its loopback) the node's.
//
// Names are sorted into sets, so packets meet a constant number of rules
// however many pods there are.
type firewall struct {
	nft      knftables.Interface
	nodeIP   netip.Addr
	internal []netip.Prefix
	// podCIDR is invalid until it is known; attachments can be repaired before.
	podCIDR netip.Prefix
}

const (
	tapsSet      = "taps"      // interface names
	podsSet      = "pods"      // interface . address . MAC
	addressesSet = "addresses" // of pods
	hairpinSet   = "hairpin"   // address . the same address
	internalSet  = "internal"  // ranges of the cluster
	portsMap     = "ports"     // protocol . port → address . port
	ipPortsMap   = "ip_ports"  // host address . protocol . port → address . port
)

func tableName(instance string) string { return "atoll-" + instance }

func newFirewall(instance string, cfg Config) (*firewall, error) {
	nft, err := knftables.New(knftables.InetFamily, tableName(instance))
	if err != nil {
		return nil, fmt.Errorf("pod network: nftables: %v: run as root, and `apt-get install nftables`: %w", err, errdefs.ErrFailedPrecondition)
	}
	return &firewall{nft: nft, nodeIP: cfg.NodeIP, internal: cfg.ClusterCIDRs}, nil
}

// replace writes the whole table in one transaction; no packet sees a part.
// An invalid podCIDR keeps the one that is set.
func (f *firewall) replace(ctx context.Context, podCIDR netip.Prefix, records map[string]record) error {
	if podCIDR.IsValid() {
		f.podCIDR = podCIDR
	}
	tx := f.nft.NewTransaction()
	tx.Add(&knftables.Table{}) // so that there is one to delete
	tx.Delete(&knftables.Table{})
	tx.Add(&knftables.Table{Comment: knftables.PtrTo("Atoll's pod network: see docs/decisions/0004-routed-taps.md")})
	f.declare(tx)
	for _, p := range disjoint(append(slices.Clone(f.internal), f.podCIDR)) {
		tx.Add(&knftables.Element{Set: internalSet, Key: []string{p.String()}})
	}
	for _, r := range records {
		for _, e := range elements(r) {
			tx.Add(e)
		}
	}
	if err := f.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("pod network: nftables: %w", err)
	}
	return nil
}

// add makes the record's elements; the table is made when it is not there.
func (f *firewall) add(ctx context.Context, r record) error {
	tx := f.nft.NewTransaction()
	for _, e := range elements(r) {
		tx.Add(e)
	}
	err := f.nft.Run(ctx, tx)
	if knftables.IsNotFound(err) {
		return errNoTable
	}
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}

// errNoTable is what add returns when somebody flushed the ruleset, or nothing
// has been attached before.
var errNoTable = fmt.Errorf("nftables: the table is not there: %w", errdefs.ErrNotFound)

// remove takes the record's elements away, there or not.
func (f *firewall) remove(ctx context.Context, r record) error {
	tx := f.nft.NewTransaction()
	for _, e := range elements(r) {
		tx.Add(e) // deleting what is not there would fail the transaction
		tx.Delete(e)
	}
	if err := f.nft.Run(ctx, tx); err != nil && !knftables.IsNotFound(err) {
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}

// drop removes the table.
func (f *firewall) drop(ctx context.Context) error {
	tx := f.nft.NewTransaction()
	tx.Delete(&knftables.Table{})
	if err := f.nft.Run(ctx, tx); err != nil && !knftables.IsNotFound(err) {
		return fmt.Errorf("nftables: remove the table: %w", err)
	}
	return nil
}

// declare adds sets, maps, chains and rules, all of them constant but for the
// node's address.
func (f *firewall) declare(tx *knftables.Transaction) {
	for name, typ := range map[string]string{
		tapsSet:      "ifname",
		podsSet:      "ifname . ipv4_addr . ether_addr",
		addressesSet: "ipv4_addr",
		hairpinSet:   "ipv4_addr . ipv4_addr",
	} {
		tx.Add(&knftables.Set{Name: name, Type: typ})
	}
	tx.Add(&knftables.Set{Name: internalSet, Type: "ipv4_addr", Flags: []knftables.SetFlag{knftables.IntervalFlag}})
	tx.Add(&knftables.Map{Name: portsMap, Type: "inet_proto . inet_service : ipv4_addr . inet_service"})
	tx.Add(&knftables.Map{Name: ipPortsMap, Type: "ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service"})

	chain := func(name string, rules ...string) {
		tx.Add(&knftables.Chain{Name: name})
		for _, r := range rules {
			tx.Add(&knftables.Rule{Chain: name, Rule: r})
		}
	}
	base := func(name string, typ knftables.BaseChainType, hook knftables.BaseChainHook, priority knftables.BaseChainPriority, rules ...string) {
		tx.Add(&knftables.Chain{Name: name, Type: &typ, Hook: &hook, Priority: &priority})
		for _, r := range rules {
			tx.Add(&knftables.Rule{Chain: name, Rule: r})
		}
	}
	chain("from_pod",
		// The kernel does so too, unless route_localnet is set.
		"ip daddr 127.0.0.0/8 counter drop",
		"iifname . ip saddr . ether saddr @"+podsSet+" return",
		"counter drop")
	base("raw", knftables.FilterType, knftables.PreroutingHook, knftables.RawPriority,
		"iifname @"+tapsSet+" goto from_pod",
		`iifname != "lo" ip saddr @`+addressesSet+" counter drop")
	chain("host_ports",
		"dnat ip to ip daddr . meta l4proto . th dport map @"+ipPortsMap,
		"dnat ip to meta l4proto . th dport map @"+portsMap)
	base("prerouting", knftables.NATType, knftables.PreroutingHook, knftables.DNATPriority,
		"fib daddr type local meta l4proto { tcp, udp, sctp } jump host_ports")
	base("output", knftables.NATType, knftables.OutputHook, "-100",
		"fib daddr type local meta l4proto { tcp, udp, sctp } jump host_ports")
	// One before kube-proxy's: the first to choose a source decides.
	mark := fmt.Sprintf("%#x", MasqueradeMark)
	base("postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority+"-1",
		"ip saddr . ip daddr @"+hairpinSet+" snat ip to "+f.nodeIP.String(),
		"oifname @"+tapsSet+" ip saddr 127.0.0.0/8 snat ip to "+f.nodeIP.String(),
		"oifname @"+tapsSet+" meta mark & "+mark+" == "+mark+" snat ip to "+f.nodeIP.String(),
		"ip saddr @"+addressesSet+" ip daddr != @"+internalSet+" oifname != @"+tapsSet+" masquerade fully-random")
}

// elements are what one attachment contributes.
func elements(r record) []*knftables.Element {
	addr := r.Address.String()
	list := []*knftables.Element{
		{Set: tapsSet, Key: []string{r.tap()}},
		{Set: podsSet, Key: []string{r.tap(), addr, macOf(r.Key).String()}},
		{Set: addressesSet, Key: []string{addr}},
		{Set: hairpinSet, Key: []string{addr, addr}},
	}
	for _, p := range r.HostPorts {
		host, pod := strconv.Itoa(int(p.HostPort)), []string{addr, strconv.Itoa(int(p.ContainerPort))}
		if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
			list = append(list, &knftables.Element{Map: ipPortsMap, Key: []string{p.HostIP.String(), p.Protocol, host}, Value: pod})
		} else {
			list = append(list, &knftables.Element{Map: portsMap, Key: []string{p.Protocol, host}, Value: pod})
		}
	}
	return list
}

// disjoint drops invalid prefixes and those within others: an interval set
// refuses overlaps.
func disjoint(prefixes []netip.Prefix) []netip.Prefix {
	var list []netip.Prefix
	for _, p := range prefixes {
		if p.IsValid() {
			list = append(list, p.Masked())
		}
	}
	slices.SortFunc(list, func(a, b netip.Prefix) int {
		if c := a.Bits() - b.Bits(); c != 0 {
			return c
		}
		return a.Addr().Compare(b.Addr())
	})
	var out []netip.Prefix
	for _, p := range list {
		if !slices.ContainsFunc(out, func(q netip.Prefix) bool { return q.Contains(p.Addr()) }) {
			out = append(out, p)
		}
	}
	return out
}
