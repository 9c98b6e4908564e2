// Command probe is the first process of a container in tests of clones. It
// prints, as JSON, all by which a pod VM could be taken for another one, and
// what its kernel draws from secrets.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// options of TCP that package syscall does not name; see tcp(7).
const (
	tcpRepair      = 19
	tcpRepairQueue = 20
	tcpQueueSeq    = 21
	sendQueue      = 2
)

func main() {
	first := make([]byte, 32)
	f, err := os.Open("/dev/urandom")
	must(err)
	_, err = io.ReadFull(f, first)
	must(err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1)}, &x509.Certificate{SerialNumber: big.NewInt(1)}, key.Public(), key)
	must(err)
	parsed, err := x509.ParseCertificate(cert)
	must(err)
	host, _ := os.Hostname()
	out := map[string]any{
		"urandom": hex.EncodeToString(first),
		// The serial is the same, so what differs is the key and the signature.
		"tls":       hex.EncodeToString(parsed.RawSubjectPublicKeyInfo[len(parsed.RawSubjectPublicKeyInfo)-64:]),
		"boot_id":   text("/proc/sys/kernel/random/boot_id"),
		"machine":   text("/etc/machine-id"),
		"product":   text("/sys/class/dmi/id/product_uuid"),
		"mac":       text("/sys/class/net/eth0/address"),
		"hostname":  host,
		"at_random": hex.EncodeToString(atRandom()),
		"stack":     stack(),
		"ports":     ports(),
		"isn":       []uint32{isn(40001, 40000), isn(40002, 40000)},
		"now":       time.Now().UnixNano(),
		"uptime":    strings.Fields(text("/proc/uptime"))[0],
	}
	must(json.NewEncoder(os.Stdout).Encode(out))
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func text(file string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// atRandom is what the kernel gave this process at its start: libraries seed
// their canaries and hash tables with it.
func atRandom() []byte {
	b, err := os.ReadFile("/proc/self/auxv")
	must(err)
	for ; len(b) >= 16; b = b[16:] {
		if binary.NativeEndian.Uint64(b) == 25 {
			at := uintptr(binary.NativeEndian.Uint64(b[8:]))
			mem, err := os.Open("/proc/self/mem")
			must(err)
			out := make([]byte, 16)
			_, err = mem.ReadAt(out, int64(at))
			must(err)
			return out
		}
	}
	return nil
}

func stack() string {
	for line := range strings.Lines(text("/proc/self/maps")) {
		if strings.Contains(line, "[stack]") {
			from, _, _ := strings.Cut(line, "-")
			return from
		}
	}
	return ""
}

func listen(port int) net.Listener {
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	must(err)
	return l
}

// ports are those that the kernel chooses for three connections to one place.
func ports() string {
	l := listen(40000)
	defer l.Close()
	var out []string
	for range 3 {
		c, err := net.Dial("tcp4", "127.0.0.1:40000")
		must(err)
		out = append(out, fmt.Sprint(c.LocalAddr().(*net.TCPAddr).Port))
		defer c.Close()
	}
	return strings.Join(out, " ")
}

// isn is the first sequence number of a connection less the time that is in
// it: what is left is drawn from the kernel's secret and the addresses.
func isn(from, to int) uint32 {
	l := listen(to)
	defer l.Close()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: from}}
	now := time.Now().UnixNano()
	c, err := d.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", to))
	must(err)
	defer c.Close()
	raw, err := c.(*net.TCPConn).SyscallConn()
	must(err)
	var seq uint32
	must(raw.Control(func(fd uintptr) {
		must(syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpRepair, 1))
		must(syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpRepairQueue, sendQueue))
		size := uint32(4)
		_, _, errno := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, syscall.IPPROTO_TCP, tcpQueueSeq, uintptr(unsafe.Pointer(&seq)), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			must(errno)
		}
	}))
	return seq - uint32(now>>6) // the clock ticks every 64 ns
}
