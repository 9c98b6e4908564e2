package tap

import (
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/netplugin"
	"golang.org/x/sys/unix"
)

// twoPods attaches two pods and boots their guests.
func twoPods(t *testing.T, ports ...netplugin.HostPort) (cfg Config, a, b *testGuest) {
	t.Helper()
	cfg = setup(t)
	n := configured(t, cfg)
	boot := func(req netplugin.Request) *testGuest {
		at := mustAttach(t, n, req)
		return bootGuest(t, at.Tap, at.MAC, at.Addresses[0].Addr())
	}
	return cfg, boot(netplugin.Request{Key: "a"}), boot(netplugin.Request{Key: "b", HostPorts: ports})
}

func TestGatewayAnswersARP(t *testing.T) {
	_, a, b := twoPods(t)
	a.sendARP(1, a.ip, make(net.HardwareAddr, 6), Gateway)
	select {
	case p := <-a.arp:
		if p.op != 2 || p.senderIP != Gateway || p.senderMAC.String() != hostMAC.String() {
			t.Errorf("got %+v", p)
		}
	case <-time.After(time.Minute):
		t.Fatal("no answer")
	}
	// Nobody but the gateway answers: not for another pod, which is reached
	// through it.
	a.sendARP(1, a.ip, make(net.HardwareAddr, 6), b.ip)
	a.ping(Gateway, "after the question")
	a.wants("after the question")
	select {
	case p := <-a.arp:
		t.Errorf("somebody answered for another pod: %+v", p)
	default:
	}
}

func TestPodToPod(t *testing.T) {
	_, a, b := twoPods(t)
	a.ping(b.ip, "hello b")
	if p := b.wants("hello b"); p.src != a.ip {
		t.Errorf("b sees %s, want %s", p.src, a.ip)
	}
	if p := a.wants("hello b"); p.icmpType != 0 || p.src != b.ip {
		t.Errorf("a was answered by %+v", p)
	}
	// The node never asked for anybody's MAC: it knows them.
	for _, g := range []*testGuest{a, b} {
		select {
		case p := <-g.arp:
			t.Errorf("%s was asked %+v", g.ip, p)
		default:
		}
	}
}

func TestNodeToPod(t *testing.T) {
	_, a, _ := twoPods(t)
	conn, err := net.Dial("udp", netip.AddrPortFrom(a.ip, 7).String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("echo from the node")); err != nil {
		t.Fatal(err)
	}
	if p := a.wants("from the node"); p.src != nodeIP {
		t.Errorf("the pod sees %s, want the node's address", p.src)
	}
	wantReply(t, conn, "from the node")

	a.ping(nodeIP, "to the node")
	if p := a.wants("to the node"); p.src != nodeIP {
		t.Errorf("answered by %s", p.src)
	}
}

func wantReply(t *testing.T, conn net.Conn, want string) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1500)
	n, err := conn.Read(buf)
	if err != nil || string(buf[:n]) != want {
		t.Errorf("got %q, %v, want %q", buf[:n], err, want)
	}
}

func TestSpoofingIsDropped(t *testing.T) {
	cfg, a, b := twoPods(t)
	echo := func(text string) []byte { return icmp(8, append([]byte{0, 1, 0, 1}, text...)) }
	a.sendIP(hostMAC, b.ip, nodeIP, unix.IPPROTO_ICMP, echo("as b, to the node"))
	a.sendIP(hostMAC, nodeIP, b.ip, unix.IPPROTO_ICMP, echo("as the node"))
	a.sendIP(hostMAC, netip.IPv4Unspecified(), b.ip, unix.IPPROTO_ICMP, echo("as nobody"))
	a.sendFrame(b.mac, hostMAC, unix.ETH_P_IP, ipv4(a.ip, b.ip, unix.IPPROTO_ICMP, echo("with b's MAC")))
	// What the host believes about a neighbour cannot be changed by ARP.
	a.sendARP(1, b.ip, make(net.HardwareAddr, 6), Gateway)
	a.sendARP(2, a.ip, net.HardwareAddr{2, 0, 0, 0, 0, 1}, a.ip)
	a.ping(b.ip, "as it is")
	b.wants("as it is")
	a.wants("as it is")
	for _, text := range []string{"as b", "as the node", "as nobody", "with b's MAC"} {
		a.never(text)
		b.never(text)
	}
	if out := run(t, "nft", "list", "table", "inet", tableName(instanceOf(cfg.StateDir))); !strings.Contains(out, "counter packets 4 ") {
		t.Errorf("the drops were not counted:\n%s", out)
	}
}

func TestHostPorts(t *testing.T) {
	_, a, b := twoPods(t,
		netplugin.HostPort{Protocol: "udp", HostPort: 5300, ContainerPort: 53},
		netplugin.HostPort{Protocol: "udp", HostIP: nodeIP, HostPort: 5301, ContainerPort: 54})
	for _, port := range []struct {
		node string
		pod  uint16
	}{{":5300", 53}, {":5301", 54}} {
		conn, err := net.Dial("udp", nodeIP.String()+port.node)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("echo node" + port.node)); err != nil {
			t.Fatal(err)
		}
		if p := b.wants("node" + port.node); p.dstPort != port.pod || p.src != nodeIP {
			t.Errorf("%+v", p)
		}
		wantReply(t, conn, "node"+port.node)
	}
	local, err := net.Dial("udp", "127.0.0.1:5300")
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if _, err := local.Write([]byte("echo loopback")); err != nil {
		t.Fatal(err)
	}
	if p := b.wants("loopback"); p.dstPort != 53 || p.src != nodeIP {
		t.Errorf("%+v", p)
	}
	wantReply(t, local, "loopback")
	a.sendUDP(nodeIP, 1000, 5300, "echo from a")
	if p := b.wants("from a"); p.src != a.ip || p.dstPort != 53 {
		t.Errorf("b sees %+v", p)
	}
	if p := a.wants("from a"); p.src != nodeIP || p.srcPort != 5300 {
		t.Errorf("a is answered by %+v", p)
	}
	// A pod that reaches itself must see another source than its own.
	b.sendUDP(nodeIP, 1001, 5300, "echo echo to myself")
	if p := b.wants("echo echo to myself"); p.src != nodeIP || p.dstPort != 53 {
		t.Errorf("b sees %+v", p)
	}
	if p := b.wants("echo to myself"); p.src != nodeIP || p.dstPort != 1001 {
		t.Errorf("b is answered by %+v", p)
	}
}

// TestOutside has an uplink: another tap, without our mark.
func TestOutside(t *testing.T) {
	_, a, b := twoPods(t)
	if err := createTap("up0", 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { run(t, "ip", "link", "del", "up0") })
	run(t, "ip", "link", "set", "up0", "address", hostMAC.String(), "up")
	run(t, "ip", "addr", "add", "203.0.113.1/24", "dev", "up0")
	outside := bootGuest(t, "up0", net.HardwareAddr{2, 0, 0, 0, 0, 9}, netip.MustParseAddr("203.0.113.2"))

	a.sendUDP(outside.ip, 2000, 53, "echo out")
	if p := outside.wants("out"); p.src.String() != "203.0.113.1" {
		t.Errorf("outside sees %s, want the node's address there", p.src)
	}
	if p := a.wants("out"); p.src != outside.ip || p.dstPort != 2000 {
		t.Errorf("a is answered by %+v", p)
	}
	// A neighbour of the node cannot speak as a pod.
	outside.sendIP(hostMAC, a.ip, b.ip, unix.IPPROTO_ICMP, icmp(8, []byte("\x00\x01\x00\x01as a")))
	outside.sendUDP(b.ip, 1, 2, "as itself")
	if p := b.wants("as itself"); p.src != outside.ip {
		t.Errorf("b sees %+v", p)
	}
	b.never("as a")
}

// TestMasqueradeMark plays kube-proxy: a Service whose traffic it wants
// masqueraded.
func TestMasqueradeMark(t *testing.T) {
	_, a, b := twoPods(t)
	run(t, "nft", "add table ip service; add chain ip service pre { type nat hook prerouting priority -100; }; add rule ip service pre ip daddr 198.18.64.10 udp dport 53 meta mark set mark or 0x4000 dnat to "+b.ip.String()+":5353")
	t.Cleanup(func() { run(t, "nft", "delete", "table", "ip", "service") })
	service := netip.MustParseAddr("198.18.64.10")
	a.sendUDP(service, 3000, 53, "echo query")
	if p := b.wants("query"); p.src != nodeIP || p.dstPort != 5353 {
		t.Errorf("b sees %+v", p)
	}
	if p := a.wants("query"); p.src != service || p.srcPort != 53 || p.dstPort != 3000 {
		t.Errorf("a is answered by %+v", p)
	}
}

// TestLoopbackIsOutOfReach is the host whose other software has turned on
// route_localnet (kube-proxy with iptables does): what listens on 127.0.0.1
// relies on nobody else getting there.
func TestLoopbackIsOutOfReach(t *testing.T) {
	_, a, _ := twoPods(t)
	const sysctl = "/proc/sys/net/ipv4/conf/all/route_localnet"
	if err := os.WriteFile(sysctl, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(sysctl, []byte("0"), 0) })
	l, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.LocalAddr().(*net.UDPAddr).Port
	a.sendUDP(netip.MustParseAddr("127.0.0.1"), 2000, uint16(port), "from a pod")
	if err := l.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, from, err := l.ReadFrom(b); err == nil {
		t.Errorf("a pod at %v reached loopback: %q", from, b[:n])
	}
}
