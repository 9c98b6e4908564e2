package tap

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A testGuest is the other end of a tap: it answers ARP for its address, ICMP
// echo, and UDP (by echoing), and shows the IPv4 packets that it was sent.
type testGuest struct {
	t    *testing.T
	file *os.File
	mac  net.HardwareAddr
	ip   netip.Addr
	got  chan ipPacket
	arp  chan arpPacket
}

type ipPacket struct {
	src, dst         netip.Addr
	proto            byte
	srcPort, dstPort uint16 // UDP
	icmpType         byte
	data             []byte // behind the UDP or ICMP header
}

type arpPacket struct {
	op                 uint16
	senderMAC          net.HardwareAddr
	senderIP, targetIP netip.Addr
}

const vnetHeader = 10 // struct virtio_net_hdr, before every frame

func bootGuest(t *testing.T, tap string, mac net.HardwareAddr, ip netip.Addr) *testGuest {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	ifr, err := unix.NewIfreq(tap)
	if err != nil {
		t.Fatal(err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Fatal(err)
	}
	awaitCarrier(t, tap)
	g := &testGuest{t: t, file: os.NewFile(uintptr(fd), tap), mac: mac, ip: ip, got: make(chan ipPacket, 100), arp: make(chan arpPacket, 100)}
	done := make(chan struct{})
	go func() { defer close(done); g.serve() }()
	t.Cleanup(func() { g.file.Close(); <-done })
	return g
}

// awaitCarrier waits until the host sends into the tap: opening it raises the
// carrier, but the queue is only put in place by a worker of the kernel, a few
// milliseconds later, and until then packets are dropped. A VM's own start
// takes longer.
func awaitCarrier(t *testing.T, tap string) {
	t.Helper()
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {
		link, err := nl.LinkByName(tap)
		if err != nil {
			t.Fatal(err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return
		}
	}
	t.Fatalf("%s has no carrier", tap)
}

func (g *testGuest) serve() {
	buf := make([]byte, 65536)
	for {
		n, err := g.file.Read(buf)
		if err != nil {
			return
		}
		if n < vnetHeader+14 {
			continue
		}
		frame := bytes.Clone(buf[vnetHeader:n])
		switch body := frame[14:]; binary.BigEndian.Uint16(frame[12:]) {
		case unix.ETH_P_ARP:
			g.serveARP(body)
		case unix.ETH_P_IP:
			g.serveIP(frame[6:12], body)
		}
	}
}

func (g *testGuest) serveARP(b []byte) {
	if len(b) < 28 {
		return
	}
	p := arpPacket{op: binary.BigEndian.Uint16(b[6:]), senderMAC: b[8:14], senderIP: addr4(b[14:]), targetIP: addr4(b[24:])}
	g.arp <- p
	if p.op == 1 && p.targetIP == g.ip {
		g.sendARP(2, g.ip, p.senderMAC, p.senderIP)
	}
}

func (g *testGuest) sendARP(op uint16, sender netip.Addr, targetMAC net.HardwareAddr, target netip.Addr) {
	b := binary.BigEndian.AppendUint16(nil, 1) // Ethernet
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_IP)
	b = append(b, 6, 4)
	b = binary.BigEndian.AppendUint16(b, op)
	b = append(append(b, g.mac...), sender.AsSlice()...)
	b = append(append(b, targetMAC...), target.AsSlice()...)
	to := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	if op == 2 {
		to = targetMAC
	}
	g.sendFrame(g.mac, to, unix.ETH_P_ARP, b)
}

func (g *testGuest) serveIP(from net.HardwareAddr, b []byte) {
	if len(b) < 28 {
		return
	}
	header := int(b[0]&15) * 4
	p := ipPacket{src: addr4(b[12:]), dst: addr4(b[16:]), proto: b[9]}
	l4 := b[header:binary.BigEndian.Uint16(b[2:])]
	switch p.proto {
	case unix.IPPROTO_ICMP:
		p.icmpType, p.data = l4[0], l4[8:]
		if p.icmpType == 8 {
			g.sendIP(from, g.ip, p.src, unix.IPPROTO_ICMP, icmp(0, l4[4:]))
		}
	case unix.IPPROTO_UDP:
		p.srcPort, p.dstPort, p.data = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:]), l4[8:]
		if bytes.HasPrefix(p.data, []byte("echo ")) {
			g.sendIP(from, g.ip, p.src, unix.IPPROTO_UDP, udp(p.dstPort, p.srcPort, bytes.TrimPrefix(p.data, []byte("echo "))))
		}
	}
	g.got <- p
}

// ping sends an echo request through the gateway.
func (g *testGuest) ping(dst netip.Addr, text string) {
	g.sendIP(hostMAC, g.ip, dst, unix.IPPROTO_ICMP, icmp(8, append([]byte{0, 1, 0, 1}, text...)))
}

func (g *testGuest) sendUDP(dst netip.Addr, srcPort, dstPort uint16, text string) {
	g.sendIP(hostMAC, g.ip, dst, unix.IPPROTO_UDP, udp(srcPort, dstPort, []byte(text)))
}

func icmp(typ byte, rest []byte) []byte {
	b := append([]byte{typ, 0, 0, 0}, rest...)
	binary.BigEndian.PutUint16(b[2:], checksum(b))
	return b
}

func udp(src, dst uint16, data []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, src)
	b = binary.BigEndian.AppendUint16(b, dst)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(data)))
	b = append(b, 0, 0) // IPv4 needs no UDP checksum
	return append(b, data...)
}

func (g *testGuest) sendIP(to net.HardwareAddr, src, dst netip.Addr, proto byte, l4 []byte) {
	g.sendFrame(g.mac, to, unix.ETH_P_IP, ipv4(src, dst, proto, l4))
}

func ipv4(src, dst netip.Addr, proto byte, l4 []byte) []byte {
	b := []byte{0x45, 0}
	b = binary.BigEndian.AppendUint16(b, uint16(20+len(l4)))
	b = append(b, 0, 0, 0, 0, 64, proto, 0, 0)
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	binary.BigEndian.PutUint16(b[10:], checksum(b))
	return append(b, l4...)
}

func (g *testGuest) sendFrame(from, to net.HardwareAddr, etherType uint16, body []byte) {
	b := make([]byte, vnetHeader, vnetHeader+14+len(body))
	b = append(append(b, to...), from...)
	b = binary.BigEndian.AppendUint16(b, etherType)
	if _, err := g.file.Write(append(b, body...)); err != nil {
		g.t.Errorf("guest %s: send: %v", g.ip, err)
	}
}

// wants waits for a packet with this text in its data.
func (g *testGuest) wants(text string) ipPacket {
	g.t.Helper()
	deadline := time.After(time.Minute)
	for {
		select {
		case p := <-g.got:
			if bytes.Contains(p.data, []byte(text)) {
				return p
			}
		case <-deadline:
			g.t.Fatalf("guest %s got no packet with %q", g.ip, text)
		}
	}
}

// never fails the test if a packet with this text has come. The caller has
// waited for a later packet on the same way before, so nothing is under way.
func (g *testGuest) never(text string) {
	g.t.Helper()
	for {
		select {
		case p := <-g.got:
			if bytes.Contains(p.data, []byte(text)) {
				g.t.Errorf("guest %s got %+v with %q", g.ip, p, text)
			}
		default:
			return
		}
	}
}

func addr4(b []byte) netip.Addr { return netip.AddrFrom4([4]byte(b[:4])) }

// checksum is the Internet checksum of RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
