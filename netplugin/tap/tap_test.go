package tap

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/netplugin/netplugintest"
)

func TestMain(m *testing.M) { netplugintest.Isolate(m) }

var (
	nodeIP      = netip.MustParseAddr("198.18.0.1")
	clusterNets = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
)

func testConfig(t *testing.T, dir string) Config {
	return Config{
		StateDir: dir, UID: 65534, NodeIP: nodeIP, ClusterCIDRs: clusterNets,
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
}

// setup gives the namespace a node's address and a clean state directory, and
// takes everything back afterwards.
func setup(t *testing.T) Config {
	t.Helper()
	netplugintest.Isolated(t)
	if err := EnsureNodeLink(t.Context(), "lo0", nil); err != nil {
		t.Skipf("no bridge: %v", err)
	}
	if err := RemoveNodeLink(t.Context(), "lo0"); err != nil {
		t.Fatal(err)
	}
	if err := EnsureNodeLink(t.Context(), "atoll0", []netip.Prefix{netip.PrefixFrom(nodeIP, 32)}); err != nil {
		t.Fatal(err)
	}
	run(t, "ip", "link", "set", "lo", "up")
	cfg := testConfig(t, filepath.Join(t.TempDir(), "net"))
	t.Cleanup(func() {
		if err := Cleanup(context.Background(), cfg); err != nil {
			t.Error(err)
		}
		if err := RemoveNodeLink(context.Background(), "atoll0"); err != nil {
			t.Error(err)
		}
		if rest := inKernel(t); len(rest) > 0 {
			t.Errorf("left behind: %q", rest)
		}
	})
	return cfg
}

func open(t *testing.T, cfg Config) *Network {
	t.Helper()
	n, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// inKernel lists what we may have left in this namespace.
func inKernel(t *testing.T) []string {
	t.Helper()
	var list []string
	for line := range strings.Lines(run(t, "ip", "-o", "link") + run(t, "ip", "-o", "route", "show", "table", "all") + run(t, "ip", "-o", "neigh")) {
		if strings.Contains(line, "atl") {
			list = append(list, strings.Join(strings.Fields(line), " "))
		}
	}
	for line := range strings.Lines(run(t, "nft", "list", "ruleset")) {
		if line = strings.TrimSpace(line); line != "" && !strings.Contains(line, "counter") {
			list = append(list, line)
		}
	}
	slices.Sort(list)
	return list
}

func TestSuite(t *testing.T) {
	netplugintest.Run(t, func(t *testing.T) (func() netplugin.Network, func() []string) {
		cfg := setup(t)
		return func() netplugin.Network { return open(t, cfg) }, func() []string {
			files, err := filepath.Glob(cfg.StateDir + "/attachments/*")
			if err != nil {
				t.Fatal(err)
			}
			return append(inKernel(t), files...)
		}
	})
}

func configured(t *testing.T, cfg Config) *Network {
	t.Helper()
	n := open(t, cfg)
	if err := n.Configure(t.Context(), []netip.Prefix{netplugintest.CIDR}); err != nil {
		t.Fatal(err)
	}
	return n
}

func mustAttach(t *testing.T, n *Network, req netplugin.Request) netplugin.Attachment {
	t.Helper()
	req.Namespace, req.Name = "default", "pod-"+req.Key
	a, err := n.Attach(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestTapIsWhatQEMUNeeds(t *testing.T) {
	cfg := setup(t)
	cfg.MTU = 1400
	n := configured(t, cfg)
	a := mustAttach(t, n, netplugin.Request{Key: "a"})
	link := run(t, "ip", "-d", "link", "show", a.Tap)
	for _, want := range []string{"tun type tap pi off vnet_hdr on persist on user nobody", "mtu 1400", "UP", "alias atoll/" + n.instance + " default/pod-a", hostMAC.String()} {
		if !strings.Contains(link, want) {
			t.Errorf("no %q in\n%s", want, link)
		}
	}
	if len(a.Tap) > 15 || !strings.HasPrefix(a.Tap, "atl") {
		t.Errorf("interface name %q", a.Tap)
	}
	if out := run(t, "ip", "route", "get", a.Addresses[0].Addr().String()); !strings.Contains(out, "dev "+a.Tap+" src "+nodeIP.String()) {
		t.Errorf("the node reaches the pod by\n%s", out)
	}
	if out := run(t, "ip", "addr", "show", "dev", a.Tap); strings.Contains(out, "inet6") {
		t.Errorf("a tap has IPv6:\n%s", out)
	}
}

func TestRepair(t *testing.T) {
	cfg := setup(t)
	n := configured(t, cfg)
	a := mustAttach(t, n, netplugin.Request{Key: "a", HostPorts: []netplugin.HostPort{{Protocol: "tcp", HostPort: 80, ContainerPort: 80}}})
	b := mustAttach(t, n, netplugin.Request{Key: "b"})
	whole := inKernel(t)
	same := func(what string) {
		t.Helper()
		// Interface numbers change.
		strip := func(list []string) (out []string) {
			for _, l := range list {
				if i := strings.Index(l, ": atl"); i > 0 {
					l = l[i:]
				}
				out = append(out, l)
			}
			slices.Sort(out)
			return out
		}
		if got := strip(inKernel(t)); !slices.Equal(got, strip(whole)) {
			t.Errorf("after %s:\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(strip(whole), "\n"))
		}
	}
	run(t, "ip", "link", "del", a.Tap)
	n = configured(t, cfg)
	same("a tap was lost")
	run(t, "nft", "flush", "ruleset")
	mustAttach(t, n, netplugin.Request{Key: "a"})
	same("the ruleset was flushed, by the next attach")
	run(t, "ip", "link", "set", b.Tap, "down")
	run(t, "ip", "addr", "flush", "dev", b.Tap)
	configured(t, cfg)
	same("a tap was emptied")
	if err := os.Remove(n.store.file("b")); err != nil {
		t.Fatal(err)
	}
	n = configured(t, cfg)
	if list, err := n.List(t.Context()); err != nil || len(list) != 1 || list[0].Key != "a" {
		t.Errorf("after a record was lost: %+v, %v", list, err)
	}
	if out := run(t, "ip", "-o", "link"); strings.Contains(out, b.Tap) {
		t.Errorf("the tap without a record stayed:\n%s", out)
	}
}

func TestStrangersAreLeftAlone(t *testing.T) {
	cfg := setup(t)
	n := configured(t, cfg)
	name := tapName("mine")
	run(t, "ip", "link", "add", name, "type", "bridge")
	if _, err := n.Attach(t.Context(), netplugin.Request{Key: "mine"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("an interface of the same name: %v", err)
	}
	run(t, "ip", "link", "show", name)
	run(t, "ip", "link", "del", name)

	// Another Network in the same namespace.
	other := testConfig(t, filepath.Join(t.TempDir(), "other"))
	m := open(t, other)
	if err := m.Configure(t.Context(), []netip.Prefix{netip.MustParsePrefix("198.19.8.0/24")}); err != nil {
		t.Fatal(err)
	}
	theirs := mustAttach(t, m, netplugin.Request{Key: "theirs"})
	mine := mustAttach(t, n, netplugin.Request{Key: "mine"})
	if err := Cleanup(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	links := run(t, "ip", "-o", "link")
	if strings.Contains(links, theirs.Tap) || !strings.Contains(links, mine.Tap) {
		t.Errorf("after the other's Cleanup:\n%s", links)
	}
	if err := Cleanup(t.Context(), other); err != nil {
		t.Errorf("again: %v", err)
	}
	if err := EnsureNodeLink(t.Context(), mine.Tap, nil); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a node link over a tap: %v", err)
	}
	if err := RemoveNodeLink(t.Context(), mine.Tap); !errdefs.IsAlreadyExists(err) {
		t.Errorf("removing a tap as a node link: %v", err)
	}
}

func TestForwardingIsPutBack(t *testing.T) {
	cfg := setup(t)
	if err := os.WriteFile(forwardSysctl, []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	forwarding := func() string {
		b, err := os.ReadFile(forwardSysctl)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	mustAttach(t, configured(t, cfg), netplugin.Request{Key: "a"})
	if forwarding() != "1" {
		t.Error("not turned on")
	}
	mustAttach(t, configured(t, cfg), netplugin.Request{Key: "b"})
	if err := Cleanup(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if forwarding() != "0" {
		t.Error("not put back")
	}
	if err := os.WriteFile(forwardSysctl, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	mustAttach(t, configured(t, cfg), netplugin.Request{Key: "a"})
	if err := Cleanup(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if forwarding() != "1" {
		t.Error("turned off although it had been on")
	}
}

func TestNodeLink(t *testing.T) {
	netplugintest.Isolated(t)
	p := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	for range 2 {
		if err := EnsureNodeLink(t.Context(), "atoll9", p("198.18.0.9/32")); err != nil {
			t.Fatal(err)
		}
	}
	if err := EnsureNodeLink(t.Context(), "atoll9", append(p("198.18.0.10/32"), p("198.18.0.11/32")...)); err != nil {
		t.Fatal(err)
	}
	out := run(t, "ip", "-o", "-4", "addr", "show", "dev", "atoll9")
	if strings.Contains(out, "198.18.0.9/") || !strings.Contains(out, "198.18.0.10/32") || !strings.Contains(out, "198.18.0.11/32") {
		t.Errorf("addresses:\n%s", out)
	}
	for range 2 {
		if err := RemoveNodeLink(t.Context(), "atoll9"); err != nil {
			t.Fatal(err)
		}
	}
}

func TestNodeAddressMustBeLocal(t *testing.T) {
	cfg := setup(t)
	cfg.NodeIP = netip.MustParseAddr("198.18.9.9")
	n := configured(t, cfg)
	if err := n.Ready(t.Context()); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "198.18.9.9") {
		t.Errorf("Ready: %v", err)
	}
	if _, err := n.Attach(t.Context(), netplugin.Request{Key: "a"}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "198.18.9.9") {
		t.Errorf("Attach: %v", err)
	}
	if list, err := n.List(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("left: %v, %v", list, err)
	}
}

func TestDamagedRecordStops(t *testing.T) {
	cfg := setup(t)
	n := configured(t, cfg)
	mustAttach(t, n, netplugin.Request{Key: "a"})
	if err := os.WriteFile(n.store.file("a"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(cfg); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), n.store.file("a")) {
		t.Errorf("got %v", err)
	}
}

func TestConfigIsChecked(t *testing.T) {
	for _, cfg := range []Config{
		{}, {StateDir: "x"}, {StateDir: "x", NodeIP: netip.IPv6Loopback()},
		{StateDir: "x", NodeIP: nodeIP, MTU: 100},
		{StateDir: "x", NodeIP: nodeIP, ClusterCIDRs: []netip.Prefix{{}}},
	} {
		if _, err := New(cfg); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

func TestDisjoint(t *testing.T) {
	var in []netip.Prefix
	for _, s := range []string{"198.19.7.0/29", "10.0.0.0/8", "198.18.3.4/15", "10.1.0.0/16", "10.0.0.0/8"} {
		in = append(in, netip.MustParsePrefix(s))
	}
	var got []string
	for _, p := range disjoint(append(in, netip.Prefix{})) {
		got = append(got, p.String())
	}
	if !slices.Equal(got, []string{"10.0.0.0/8", "198.18.0.0/15"}) {
		t.Errorf("got %q", got)
	}
}

// A port that the node listens on, on whatever address, is not a pod's to take.
func TestHostPortsOfTheNode(t *testing.T) {
	n := configured(t, setup(t))
	tcp, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp4", netip.AddrPortFrom(nodeIP, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcpPort, udpPort := tcp.Addr().(*net.TCPAddr).Port, udp.LocalAddr().(*net.UDPAddr).Port
	for _, p := range []netplugin.HostPort{
		{Protocol: "tcp", HostPort: uint16(tcpPort), ContainerPort: 80},
		{Protocol: "udp", HostPort: uint16(udpPort), ContainerPort: 80},
		{Protocol: "udp", HostPort: uint16(udpPort), ContainerPort: 80, HostIP: nodeIP},
	} {
		if _, err := n.Attach(t.Context(), netplugin.Request{Key: "thief", HostPorts: []netplugin.HostPort{p}}); !errdefs.IsAlreadyExists(err) {
			t.Errorf("%+v: %v", p, err)
		}
	}
	if list, err := n.List(t.Context()); len(list) != 0 || err != nil {
		t.Errorf("left %v, %v", list, err)
	}
	mustAttach(t, n, netplugin.Request{Key: "honest", HostPorts: []netplugin.HostPort{
		{Protocol: "tcp", HostPort: uint16(tcpPort), ContainerPort: 80, HostIP: nodeIP}, // listens on another address alone
		{Protocol: "udp", HostPort: 5301, ContainerPort: 80},
	}})
}
