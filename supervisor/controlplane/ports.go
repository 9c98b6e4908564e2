package controlplane

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A port that the control plane listens on.
type port struct {
	network string // "tcp" or "udp"
	addr    netip.AddrPort
	what    string
	cure    string
}

func (c Config) ports() []port {
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	const stop = "stop that process"
	ports := []port{
		{"tcp", netip.AddrPortFrom(c.Address, c.APIPort), "the API server", stop + " or choose another API port"},
		{"tcp", netip.AddrPortFrom(c.Address, c.DNSPort), "DNS", stop + " or make it listen on its own addresses instead of on all"},
		{"udp", netip.AddrPortFrom(c.Address, c.DNSPort), "DNS", stop + " or make it listen on its own addresses instead of on all"},
		{"tcp", netip.AddrPortFrom(c.Address, c.MetricsPort), "metrics-server", stop + " or choose another metrics port"},
		{"tcp", netip.AddrPortFrom(c.Address, c.LoginPort), "logins", stop + " or choose another login port"},
		{"tcp", netip.AddrPortFrom(loopback, controllerManagerPort), "the controller manager", stop + " or run isolated"},
		{"tcp", netip.AddrPortFrom(loopback, schedulerPort), "the scheduler", stop + " or run isolated"},
		{"tcp", netip.AddrPortFrom(loopback, dnsReadyPort), "DNS readiness", stop + " or run isolated"},
		{"tcp", netip.AddrPortFrom(loopback, tokenReviewPort), "token reviews", stop + " or run isolated"},
	}
	if c.VSpherePort != 0 {
		ports = append(ports, port{"tcp", c.VSphereAddress(), "vSphere's REST of namespaces", stop + " or choose another vSphere port"})
	}
	if c.VCenter != nil {
		ports = append(ports, port{"tcp", c.VCenterAddress(), "the embedded vCenter", stop + " or choose another vCenter port"})
	}
	return ports
}

// CheckPorts tries every port that Run listens on, in the caller's network
// namespace, and returns one error for each that is taken (ErrUnavailable),
// which names the port, the process that has it if that can be told, and the
// cure. Config.Address need not be on a link yet.
func CheckPorts(c Config) []error {
	if err := c.Validate(); err != nil {
		return []error{err}
	}
	var errs []error
	for _, p := range c.ports() {
		if err := p.check(); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

func (p port) check() error {
	err := tryListen(p.network, p.addr)
	if err == nil {
		return nil
	}
	if !errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s port %s for %s: %w", p.network, p.addr, p.what, err)
	}
	holder := findHolder("/proc", p.network, p.addr)
	return fmt.Errorf("%s port %s, needed for %s, is in use by %s: %s: %w", p.network, p.addr, p.what, holder, p.cure, errdefs.ErrUnavailable)
}

// tryListen listens for a moment, on an address that no link has, too. (The
// kernel's tables say who listens, but not for sure: a reading may lack a socket
// while others come and go, 2 of 48 did.)
func tryListen(network string, addr netip.AddrPort) error {
	anywhere := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) }); cerr != nil {
			return cerr
		}
		return os.NewSyscallError("setsockopt IP_FREEBIND", err)
	}}
	if network == "udp" {
		conn, err := anywhere.ListenPacket(context.Background(), "udp4", addr.String())
		if err != nil {
			return err
		}
		return conn.Close()
	}
	l, err := anywhere.Listen(context.Background(), "tcp4", addr.String())
	if err != nil {
		return err
	}
	return l.Close()
}

// findHolder names the process that listens on addr or on its port of all
// addresses, as the kernel's socket tables under proc tell.
func findHolder(proc, network string, addr netip.AddrPort) string {
	tables := []string{network, network + "6"}
	for _, table := range slices.Repeat(tables, 3) { // a reading may lack it
		f, err := os.Open(filepath.Join(proc, "self/net", table))
		if err != nil {
			continue
		}
		inode := listenerInode(bufio.NewScanner(f), network, addr)
		f.Close()
		if inode == "" {
			continue
		}
		if who := inodeOwner(proc, inode); who != "" {
			return who
		}
		return "a process that cannot be told (socket inode " + inode + ")"
	}
	return "a process that cannot be told"
}

// listenerInode reads a table in the format of /proc/net/tcp.
func listenerInode(lines *bufio.Scanner, network string, want netip.AddrPort) string {
	const listen = "0A" // TCP_LISTEN, include/net/tcp_states.h
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 10 || (network == "tcp" && f[3] != listen) {
			continue
		}
		host, portHex, ok := strings.Cut(f[1], ":")
		n, err := strconv.ParseUint(portHex, 16, 16)
		if !ok || err != nil || uint16(n) != want.Port() {
			continue
		}
		if strings.Trim(host, "0") == "" || host == hexAddr(want.Addr()) {
			return f[9]
		}
	}
	return ""
}

// hexAddr is an IPv4 address as the socket tables show it on a little-endian
// machine.
func hexAddr(a netip.Addr) string {
	b := a.As4()
	return fmt.Sprintf("%02X%02X%02X%02X", b[3], b[2], b[1], b[0])
}

func inodeOwner(proc, inode string) string {
	link := "socket:[" + inode + "]"
	pids, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	for _, dir := range pids {
		fds, _ := os.ReadDir(filepath.Join(dir, "fd"))
		for _, fd := range fds {
			if target, err := os.Readlink(filepath.Join(dir, "fd", fd.Name())); err == nil && target == link {
				comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
				return fmt.Sprintf("process %s (%s)", filepath.Base(dir), strings.TrimSpace(string(comm)))
			}
		}
	}
	return ""
}
