package podinit

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/openatoll/atoll/vmpod/guestimage"
)

// TestIdentity gives a VM all of its identity but one item, for each item:
// nothing runs and no packet leaves before it has all. Then containers see what
// the host has given, not what the machine has booted with.
func TestIdentity(t *testing.T) {
	dump := filepath.Join(t.TempDir(), "eth0.pcap")
	const firmware = "11111111-2222-4333-8444-555555555555"
	vm := bootVM(t, "-uuid", firmware, "-rtc", "base=2020-02-02T02:02:02", "-object", "filter-dump,id=dump,netdev=net0,file="+dump)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	for _, tc := range []struct {
		lacks string
		drop  func(*agentapi.SetupSandboxRequest)
	}{
		{"clock", func(r *agentapi.SetupSandboxRequest) { r.ClockNs = 0 }},
		{"entropy", func(r *agentapi.SetupSandboxRequest) { r.Entropy = nil }},
		{"hostname", func(r *agentapi.SetupSandboxRequest) { r.Hostname = "" }},
		{"machine id", func(r *agentapi.SetupSandboxRequest) { r.MachineId = "" }},
		{"VM UUID", func(r *agentapi.SetupSandboxRequest) { r.VmUuid = "" }},
		{"interfaces", func(r *agentapi.SetupSandboxRequest) { r.Interfaces = nil }},
		{"interfaces", func(r *agentapi.SetupSandboxRequest) { r.Interfaces[0].Mac = "" }},
		{"interfaces", func(r *agentapi.SetupSandboxRequest) { r.Interfaces[0].Addresses = nil }},
	} {
		r := proto.Clone(setupRequest()).(*agentapi.SetupSandboxRequest)
		tc.drop(r)
		if _, err := g.SetupSandbox(ctx, r); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), tc.lacks) {
			t.Errorf("setting up without the %s: %v", tc.lacks, err)
		}
		for call, err := range g.everyCall() {
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), tc.lacks) {
				t.Errorf("%s without the %s: %v", call, tc.lacks, err)
			}
		}
		if hello, err := g.Hello(ctx, &agentapi.HelloRequest{}); err != nil || hello.SandboxReady || hello.Protocol < agentapi.ProtocolIdentity {
			t.Errorf("hello without the %s: %v, %v", tc.lacks, hello, err)
		}
	}
	for what, change := range map[string]func(*agentapi.SetupSandboxRequest){
		"too little entropy": func(r *agentapi.SetupSandboxRequest) { r.Entropy = r.Entropy[:minEntropy-1] },
		"half a machine id":  func(r *agentapi.SetupSandboxRequest) { r.MachineId = "0a0b" },
		"a wrong UUID":       func(r *agentapi.SetupSandboxRequest) { r.VmUuid = "../etc" },
		"a negative clock":   func(r *agentapi.SetupSandboxRequest) { r.ClockNs = -1 },
	} {
		r := proto.Clone(setupRequest()).(*agentapi.SetupSandboxRequest)
		change(r)
		if _, err := g.SetupSandbox(ctx, r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := len(packets(t, dump)); n > 0 {
		t.Errorf("%d packets have left a VM without an identity", n)
	}

	r := setupRequest()
	sent := time.Now()
	resp, err := g.SetupSandbox(ctx, r)
	if err != nil || len(resp.BootId) != 36 {
		t.Fatalf("%v, %v", resp, err)
	}
	checkClock(t, sent, resp.ClockNs)
	if again, err := g.SetupSandbox(ctx, setupRequest()); err != nil || again.BootId != resp.BootId {
		t.Errorf("once more: %v, %v", again, err)
	}
	t.Run("seen", func(t *testing.T) { testIdentitySeen(guestOps{g.Client, t, ctx}, r, resp.BootId) })
	t.Run("packets", func(t *testing.T) { testFirstPackets(guestOps{g.Client, t, ctx}, r, dump) })
	t.Run("clock", func(t *testing.T) { testClock(vm, guestOps{g.Client, t, ctx}) })
}

// everyCall makes all calls and streams that serve a pod, and returns what
// became of them.
func (g guestOps) everyCall() map[string]error {
	out := map[string]error{}
	first := func(_ any, err error) error { return err }
	out["AddVolume"] = first(g.AddVolume(g.ctx, &agentapi.AddVolumeRequest{Id: "v"}))
	out["RemoveVolume"] = first(g.RemoveVolume(g.ctx, &agentapi.RemoveVolumeRequest{Id: "v"}))
	out["PrepareSubPath"] = first(g.PrepareSubPath(g.ctx, &agentapi.PrepareSubPathRequest{Volume: "v", SubPath: "s"}))
	out["CreateContainer"] = first(g.CreateContainer(g.ctx, &agentapi.CreateContainerRequest{Id: "c", Spec: mustJSON(g.t, ociSpec("true")), ImageDisk: "img"}))
	out["StartProcess"] = first(g.StartProcess(g.ctx, &agentapi.StartProcessRequest{ContainerId: "c"}))
	out["StartProcess of an exec"] = first(g.StartProcess(g.ctx, &agentapi.StartProcessRequest{ContainerId: "c", ExecId: "e", Process: mustJSON(g.t, &specs.Process{Args: []string{"true"}})}))
	out["SignalProcess"] = first(g.SignalProcess(g.ctx, &agentapi.SignalProcessRequest{ContainerId: "c", Signal: 9}))
	out["ResizeTerminal"] = first(g.ResizeTerminal(g.ctx, &agentapi.ResizeTerminalRequest{ContainerId: "c"}))
	out["WaitProcess"] = first(g.WaitProcess(g.ctx, &agentapi.WaitProcessRequest{ContainerId: "c"}))
	out["RemoveContainer"] = first(g.RemoveContainer(g.ctx, &agentapi.RemoveContainerRequest{Id: "c"}))
	out["UpdateContainer"] = first(g.UpdateContainer(g.ctx, &agentapi.UpdateContainerRequest{Id: "c"}))
	out["Stats"] = first(g.Stats(g.ctx, &agentapi.StatsRequest{}))
	out["Acknowledge"] = first(g.Acknowledge(g.ctx, &agentapi.AcknowledgeRequest{Exits: 1}))
	out["Online"] = first(g.Online(g.ctx, &agentapi.OnlineRequest{Cpus: 1}))
	out["a stream of output"] = first(g.Stdout(g.ctx, "c", ""))
	out["a port forward"] = first(g.PortForward(g.ctx, 80))
	for _, err := range g.Logs(g.ctx, "c", 0) {
		out["a log"] = err
		break
	}
	for _, err := range g.Exits(g.ctx, 0) {
		out["the exits"] = err
		break
	}
	return out
}

// packets are those that QEMU has written to a file in pcap's format.
func packets(t *testing.T, file string) (all [][]byte) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil || len(b) < 24 {
		t.Fatalf("%s: %d bytes, %v", file, len(b), err)
	}
	for b = b[24:]; len(b) >= 16; {
		n := int(binary.NativeEndian.Uint32(b[8:]))
		if len(b) < 16+n {
			break
		}
		all = append(all, b[16:16+n])
		b = b[16+n:]
	}
	return all
}

// checkClock compares what the guest's clock read, some time since sent, with
// the host's.
func checkClock(t *testing.T, sent time.Time, ns int64) {
	t.Helper()
	got := time.Unix(0, ns)
	if early, late := sent.Add(-time.Second), time.Now().Add(time.Second); got.Before(early) || got.After(late) {
		t.Errorf("the guest's clock read %v, the host's %v and later %v", got, sent, time.Now())
	}
}

func testIdentitySeen(g guestOps, r *agentapi.SetupSandboxRequest, bootID string) {
	const look = "cat /proc/sys/kernel/random/boot_id /etc/machine-id /sys/class/dmi/id/product_uuid 2>/dev/null; hostname; cat /sys/class/net/eth0/address"
	product := r.VmUuid + "\n"
	if os.Getenv("ATOLL_TEST_KERNEL") == guestimage.FlavourTuned {
		product = "" // that kernel shows nobody one
	}
	want := fmt.Sprintf("%s\n%s\n%s%s\n%s\n", bootID, r.MachineId, product, r.Hostname, r.Interfaces[0].Mac)
	g.create("one", ociSpec("sh", "-c", look+"; exec sleep 1000"), nil)
	g.start("one")
	second, _ := g.run("two", ociSpec("sh", "-c", look), nil)
	exec, _, _ := g.exec("one", "e", "sh", "-c", look)
	for what, got := range map[string]string{"a second container": second, "an exec": exec} {
		if got != want {
			g.t.Errorf("%s sees\n%s, want\n%s", what, got, want)
		}
	}
	sent := time.Now()
	out, _ := g.run("times", ociSpec("sh", "-c", "date +%s; cat /proc/uptime /proc/stat /proc/self/stat | tr '\\n' ' '"), nil)
	now, rest, _ := strings.Cut(out, "\n")
	seconds, err := strconv.ParseInt(now, 10, 64)
	if err != nil {
		g.t.Fatalf("%v: %s", err, out)
	}
	checkClock(g.t, sent, seconds*1e9+5e8)
	// A process of now is of now by ps's reckoning, too: the machine's start is
	// where the clock was set to, less the time it has run.
	f := strings.Fields(rest)
	up, _ := strconv.ParseFloat(f[0], 64)
	btime, started := 0.0, 0.0
	for i := range f {
		if f[i] == "btime" {
			btime, _ = strconv.ParseFloat(f[i+1], 64)
		}
		if f[i] == "(cat)" {
			ticks, _ := strconv.ParseFloat(f[i+20], 64)
			started = btime + ticks/100
		}
	}
	if math.Abs(float64(seconds)-up-btime) > 3 || up > 600 || math.Abs(float64(seconds)-started) > 3 {
		g.t.Errorf("now %d, up %.0f s, booted %.0f, the process started %.0f", seconds, up, btime, started)
	}
	g.remove("one")
}

// testFirstPackets sends one, and looks at whose it is.
func testFirstPackets(g guestOps, r *agentapi.SetupSandboxRequest, dump string) {
	g.run("caller", ociSpec("nc", "-w", "1", "169.254.1.1", "80"), nil)
	got := packets(g.t, dump)
	if len(got) == 0 {
		g.t.Fatal("no packet has left: that none did before means nothing")
	}
	mac, _ := net.ParseMAC(r.Interfaces[0].Mac)
	for _, p := range got {
		if string(p[6:12]) != string(mac) {
			g.t.Errorf("a packet of %x", p[6:12])
		}
	}
	arp := got[0] // who has the gateway, says the pod
	if binary.BigEndian.Uint16(arp[12:]) != 0x0806 || net.IP(arp[28:32]).String()+"/32" != r.Interfaces[0].Addresses[0] {
		g.t.Errorf("the first packet is %x", arp)
	}
}

// testClock stops the VM for a while, which stops its clock.
func testClock(vm *testVM, g guestOps) {
	read := func(r *agentapi.ClockReading) (sent time.Time, guest int64) {
		g.t.Helper()
		for {
			sent = time.Now()
			h, err := g.Hello(g.ctx, &agentapi.HelloRequest{Clock: r})
			if err != nil {
				g.t.Fatal(err)
			}
			if time.Since(sent) < 500*time.Millisecond { // else it says little, on a crowded host
				return sent, h.ClockNs
			}
		}
	}
	vm.command("stop")
	time.Sleep(3 * time.Second)
	vm.command("cont")
	sent, guest := read(nil)
	behind := sent.UnixNano() - guest
	if behind < int64(2*time.Second) {
		g.t.Fatalf("after three seconds of stopping the clock is behind by %v", time.Duration(behind))
	}
	wrong := &agentapi.ClockReading{HostNs: guest + behind, GuestNs: guest}
	for range 2 { // the second time it was corrected already
		sent, guest = read(wrong)
		checkClock(g.t, sent, guest)
	}
	// A small error is worked off: no time is left out, or comes twice.
	small := &agentapi.ClockReading{HostNs: guest - int64(maxSlew/2), GuestNs: guest}
	if _, later := read(small); later < guest {
		g.t.Errorf("the clock went back by %v", time.Duration(guest-later))
	}
}
