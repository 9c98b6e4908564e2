package podinit

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/openatoll/atoll/vmpod/guestimage"
)

// A testTemplate is a guest that was saved as soon as its agent answered. The
// driver's own are made in vmpod/qemu; here it is the guest that is looked at,
// with as little help of QEMU's as there is: no vmgenid, no virtio-rng.
type testTemplate struct {
	t          *testing.T
	guest      guestimage.Guest
	ram, state string
	image      string
}

// makeTemplate boots a guest whose clock is years late, leaves the talk with it
// half finished, and saves it.
func makeTemplate(t *testing.T) *testTemplate {
	t.Helper()
	if testing.Short() {
		t.Skip("boots VMs")
	}
	need(t, "qemu-system-x86_64", "qemu-system-x86")
	g, err := buildGuest()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	m := &testTemplate{t: t, guest: g, ram: filepath.Join(dir, "ram"), state: filepath.Join(dir, "state")}
	m.image = probeImage(t, dir)
	vm := newVM(t)
	vm.start(m.args("on"))
	c := vm.attach()
	if hello, err := c.Hello(t.Context(), &agentapi.HelloRequest{}); err != nil || hello.BootId != "" {
		t.Fatalf("hello: %v, %v", hello, err)
	}
	c.Close()
	leaveHalfSaid(t, vm)
	vm.settle()
	vm.command("stop")
	vm.command("migrate_set_capability x-ignore-shared on")
	vm.command(`migrate "exec:cat > ` + m.state + `"`)
	vm.end()
	return m
}

// leaveHalfSaid leaves a session in the guest, an answer in its port that
// nobody has read, and the beginning of a marker that it waits to go on.
func leaveHalfSaid(t *testing.T, vm *testVM) {
	t.Helper()
	conn := vm.dial()
	defer conn.Close()
	cut := &cutConn{Conn: conn}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, err := agentapi.Attach(ctx, cut)
	if err != nil {
		t.Fatal(err)
	}
	cut.deaf.Store(true)
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := c.Hello(ctx, &agentapi.HelloRequest{}); err == nil {
		t.Fatal("an answer that nobody has read has come")
	}
	if _, err := io.WriteString(conn, "\xf5atoll-res"); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now())
}

// args are QEMU's for a template and its clones.
func (m *testTemplate) args(share string) []string {
	args := []string{"-m", "256", "-machine", "memory-backend=ram",
		"-object", "memory-backend-file,id=ram,size=256M,mem-path=" + m.ram + ",share=" + share,
		"-rtc", "base=2020-02-02T02:02:02", "-uuid", "11111111-2222-4333-8444-555555555555",
		"-kernel", m.guest.Kernel, "-initrd", m.guest.Initrd, "-append", testCmdline + m.guest.Cmdline}
	for i := range 3 {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=rp%d,slot=%d,chassis=%d", i, i+1, i+1))
	}
	return args
}

// clone starts one with disks and a NIC of its own.
func (m *testTemplate) clone(t *testing.T, n int) *testVM {
	t.Helper()
	vm := newVM(t)
	eph := ephemeralDisk(t, vm.dir, m.guest)
	vm.start(append(m.args("off"), "-incoming", "defer", "-S",
		"-drive", "if=none,id=img,format=raw,read-only=on,file="+m.image,
		"-drive", "if=none,id=eph,format=raw,discard=unmap,file="+eph,
		"-netdev", "hubport,id=net0,hubid=0",
		"-object", "filter-dump,id=dump,netdev=net0,file="+vm.packets()))
	vm.dial().Close() // the monitor is there, too
	vm.command("migrate_set_capability x-ignore-shared on")
	vm.command("migrate_set_parameter announce-rounds 0")
	vm.command(`migrate_incoming "exec:cat ` + m.state + `"`)
	for end := time.Now().Add(time.Minute); strings.Contains(vm.command("info status"), "inmigrate"); {
		if time.Now().After(end) {
			t.Fatalf("the clone is not loaded: %s", vm.command("info status"))
		}
		time.Sleep(5 * time.Millisecond)
	}
	vm.command("device_add virtio-blk-pci,drive=img,serial=img,bus=rp0")
	vm.command("device_add virtio-blk-pci,drive=eph,serial=eph,bus=rp1")
	vm.command("device_add virtio-net-pci,netdev=net0,romfile=,bus=rp2,mac=" + cloneMAC(n))
	vm.command("cont")
	return vm
}

func (vm *testVM) packets() string { return filepath.Join(vm.dir, "eth0.pcap") }

func cloneMAC(n int) string {
	return net.HardwareAddr{2, 0, 0, 0, byte(n >> 8), byte(n)}.String()
}

// probeImage is the busybox image with the probe in it.
func probeImage(t *testing.T, dir string) string {
	t.Helper()
	busyboxImage(t, dir)
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "image/bin/probe"), "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	image := filepath.Join(dir, "probe.erofs")
	run1(t, "mkfs.erofs", "-T0", image, filepath.Join(dir, "image"))
	return image
}

// A sight is what the probe prints.
type sight struct {
	Urandom, TLS, Machine, Product, MAC, Hostname, Stack, Ports, Uptime string

	BootID   string `json:"boot_id"`
	AtRandom string `json:"at_random"`
	ISN      []uint32
	Now      int64
	sent     time.Time // when the container was started
}

// secrets are what no two VMs have in common.
func (s sight) secrets() map[string]string {
	return map[string]string{
		"32 bytes of urandom, drawn first": s.Urandom, "the TLS key": s.TLS, "boot id": s.BootID, "machine-id": s.Machine,
		"product_uuid": s.Product, "MAC address": s.MAC, "host name": s.Hostname, "AT_RANDOM": s.AtRandom,
		"the ports that the kernel chooses": s.Ports, "the address of the stack": s.Stack,
	}
}

// sameISN says whether two kernels number their connections by one secret. Each
// number is off by the time between two instructions of the probe.
func (s sight) sameISN(o sight) bool {
	const slack = (50 * time.Millisecond) / 64
	for i := range s.ISN {
		if math.Abs(float64(int32(s.ISN[i]-o.ISN[i]))) > float64(slack) {
			return false
		}
	}
	return true
}

// probe gives the n-th clone its identity and runs the probe in it, as the
// first process of its first container.
func (m *testTemplate) probe(t *testing.T, n int) sight {
	t.Helper()
	vm := m.clone(t, n)
	defer vm.end()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	hello, err := g.Hello(ctx, &agentapi.HelloRequest{})
	if err != nil || hello.SandboxReady || hello.BootId != "" || len(hello.Containers) > 0 {
		t.Fatalf("a clone has something of its own: %v, %v", hello, err)
	}
	if sent := packets(t, vm.packets()); len(sent) > 0 {
		t.Errorf("%d packets have left a clone without an identity: %x", len(sent), sent)
	}
	r := setupRequest()
	r.Hostname = "pod-" + strconv.Itoa(n)
	r.MachineId = fmt.Sprintf("%032x", n+1)
	r.VmUuid = fmt.Sprintf("0b0b0b0b-0c0c-4d0d-8e0e-%012x", n)
	r.Interfaces[0].Mac = cloneMAC(n)
	resp, err := g.SetupSandbox(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	spec := ociSpec("/bin/probe")
	spec.Process.Capabilities.Effective = append(spec.Process.Capabilities.Effective, "CAP_NET_ADMIN")
	spec.Process.Capabilities.Permitted = spec.Process.Capabilities.Effective
	spec.Process.Capabilities.Bounding = spec.Process.Capabilities.Effective
	s := sight{sent: time.Now()}
	out, exit := g.run("c", spec, nil)
	if err := json.Unmarshal([]byte(out), &s); err != nil || exit.ExitCode != 0 {
		t.Fatalf("%v, %v: %s", exit, err, out)
	}
	if strings.Contains(s.Product, "no such file") && m.guest.Flavour == guestimage.FlavourTuned {
		s.Product = r.VmUuid // that kernel shows nobody one
	}
	for what, is := range map[string][2]string{
		"host name": {s.Hostname, r.Hostname}, "machine-id": {s.Machine, r.MachineId}, "product_uuid": {s.Product, r.VmUuid},
		"MAC address": {s.MAC, r.Interfaces[0].Mac}, "boot id": {s.BootID, resp.BootId},
	} {
		if is[0] != is[1] {
			t.Errorf("clone %d has the %s %q, want %q", n, what, is[0], is[1])
		}
	}
	return s
}

// TestClones starts clones of one template, which is years old by its own
// clock. They have the host's time, and nothing in common.
func TestClones(t *testing.T) {
	m := makeTemplate(t)
	clones := 4
	if s := os.Getenv("ATOLL_TEST_CLONES"); s != "" {
		clones, _ = strconv.Atoi(s)
	}
	var seen []sight
	for n := range clones {
		s := m.probe(t, n)
		if t.Failed() {
			return
		}
		checkClock(t, s.sent, s.Now)
		if up, err := strconv.ParseFloat(s.Uptime, 64); err != nil || up > 600 {
			t.Errorf("clone %d is up since %s s, %v", n, s.Uptime, err)
		}
		for before, o := range seen {
			for what, value := range o.secrets() {
				if s.secrets()[what] == value {
					t.Errorf("clones %d and %d have in common: %s (%s)", before, n, what, value)
				}
			}
			if s.sameISN(o) {
				t.Errorf("clones %d and %d number their connections alike: %v, %v", before, n, s.ISN, o.ISN)
			}
		}
		seen = append(seen, s)
	}
	t.Logf("the first: %+v", seen[0])
}

// A cutConn stops reading.
type cutConn struct {
	net.Conn
	deaf atomic.Bool
}

func (c *cutConn) Read(b []byte) (int, error) {
	if c.deaf.Load() {
		select {}
	}
	n, err := c.Conn.Read(b)
	if c.deaf.Load() {
		select {}
	}
	return n, err
}
