package overhead

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/netplugin/tap"
	"github.com/openatoll/atoll/spherelet/resources"
	"github.com/openatoll/atoll/storage/local"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// A message is a line that the child writes: one field is set.
type message struct {
	Step   string  `json:"step,omitempty"`
	Report *Report `json:"report,omitempty"`
	Error  string  `json:"error,omitempty"`
}

const (
	// scratch holds all files; a tmpfs of the child's own is mounted on it.
	scratch = "/dev/shm"
	// vmTimeout bounds the start of one VM, on a loaded host without KVM, and
	// templateTimeout that of a template, which is a boot, a saving and a try.
	vmTimeout       = 3 * time.Minute
	templateTimeout = 5 * time.Minute
)

// Child measures, and writes messages to w. It must have namespaces of its own:
// see Measure.
func Child(ctx context.Context, guestDir, cgroup string, w io.Writer) error {
	enc := json.NewEncoder(w)
	say := func(format string, args ...any) { _ = enc.Encode(message{Step: fmt.Sprintf(format, args...)}) }
	r, err := measure(ctx, guestDir, cgroup, say)
	if err != nil {
		return errors.Join(err, enc.Encode(message{Error: err.Error()}))
	}
	return enc.Encode(message{Report: r})
}

// settle makes the namespaces those of this process: what is mounted stays
// here, and /proc shows the processes that are here.
func settle() error {
	if os.Getpid() != 1 {
		return errors.New("this is run by `atoll check --overhead` alone")
	}
	return errors.Join(
		os.NewSyscallError("make mounts private", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")),
		os.NewSyscallError("mount /proc", unix.Mount("proc", "/proc", "proc", 0, "")),
		os.NewSyscallError("mount "+scratch, unix.Mount("tmpfs", scratch, "tmpfs", 0, "mode=0755")),
		step("give lo the node's address", addLoopback(nodeIP+"/32")),
	)
}

// nodeIP and pods are in a network namespace of their own: nobody's.
const (
	nodeIP = "198.18.0.1"
	pods   = "198.19.240.0/24"
	podIP  = "198.19.240.2/32"
)

func addLoopback(address string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	return errors.Join(netlink.LinkSetUp(lo), netlink.AddrAdd(lo, a))
}

func step(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// A host is where VMs are started.
type host struct {
	driver  *qemu.Driver
	network netplugin.Network
	disks   *local.Ephemeral
	left    []func() error // in reverse
}

func measure(ctx context.Context, guestDir, cgroup string, say func(string, ...any)) (_ *Report, err error) {
	if err := settle(); err != nil {
		return nil, err
	}
	guest, err := guestimage.Load(guestDir)
	if err != nil {
		return nil, err
	}
	h := &host{}
	defer func() {
		for i := len(h.left) - 1; i >= 0; i-- {
			err = errors.Join(err, h.left[i]())
		}
	}()
	if err := h.open(ctx, guest, cgroup); err != nil {
		return nil, err
	}
	accelerator, _ := h.driver.Accelerator()
	r := &Report{Accelerator: string(accelerator), Guest: guest.KernelRelease}
	var vms []*vm
	for i, workload := range workloads {
		spec, iface, err := h.spec(ctx, workload)
		if err != nil {
			return nil, err
		}
		say("%d of %d: template of %d MiB", i+1, len(workloads), spec.Memory/mib)
		wait, cancel := context.WithTimeout(ctx, templateTimeout)
		noTemplate := h.driver.AwaitTemplate(wait, spec)
		cancel()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		say("%d of %d: VM of %d MiB", i+1, len(workloads), spec.Memory/mib)
		v, err := h.start(ctx, spec, iface, workload)
		if err != nil {
			return nil, fmt.Errorf("VM of %d MiB: %w", spec.Memory/mib, err)
		}
		if !v.sample.Cloned && noTemplate != nil {
			v.sample.Why = noTemplate.Error()
		}
		vms = append(vms, v)
	}
	say("idle for %s", idleTime)
	for _, v := range vms {
		if err := v.look(ctx, 0); err != nil {
			return nil, err
		}
	}
	select {
	case <-time.After(idleTime):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	for _, v := range vms {
		if err := v.look(ctx, idleTime); err != nil {
			return nil, err
		}
		r.Samples = append(r.Samples, v.sample)
	}
	r.summarize(time.Now())
	return r, nil
}

func (h *host) open(ctx context.Context, guest guestimage.Guest, cgroup string) (err error) {
	log := slog.New(slog.DiscardHandler)
	h.driver, err = qemu.New(qemu.Config{
		Guest:    qemu.Guest{Kernel: guest.Kernel, Initrd: guest.Initrd, Cmdline: guest.Cmdline},
		StateDir: filepath.Join(scratch, "vms"), RunDir: filepath.Join(scratch, "run"), Cgroup: cgroup,
		Templates: qemu.Templates{Enabled: true, Furnished: true}, Logger: log,
	})
	if err != nil {
		return err
	}
	h.left = append(h.left, h.driver.Close)
	taps, err := tap.New(tap.Config{StateDir: filepath.Join(scratch, "net"), NodeIP: netip.MustParseAddr(nodeIP), Logger: log})
	if err != nil {
		return err
	}
	h.network = taps
	h.left = append(h.left, taps.Close)
	if err := taps.Configure(ctx, []netip.Prefix{netip.MustParsePrefix(pods)}); err != nil {
		return err
	}
	h.disks, err = local.NewEphemeral(local.Config{Dir: filepath.Join(scratch, "disks"), Quota: guest.Quota})
	return err
}

// spec makes the disk and the tap of a VM, and says what its guest is told of
// its interface.
func (h *host) spec(ctx context.Context, workload int64) (spec vmpod.Spec, iface *agentapi.Interface, err error) {
	uid := uuid.NewString()
	memory := (workload + resources.GuestShare(workload) + mib - 1) / mib * mib
	spec = vmpod.Spec{ID: vmpod.ID{PodUID: uid}, Owner: vmpod.Owner{PodUID: uid, Namespace: "atoll", Name: "overhead"}, CPUs: 1, Memory: memory}
	key := spec.ID.String()
	a, err := h.network.Attach(ctx, netplugin.Request{Key: key, Namespace: spec.Owner.Namespace, Name: spec.Owner.Name})
	if err != nil {
		return spec, nil, err
	}
	disk, err := h.disks.Create(ctx, key, resources.DefaultEphemeral)
	if err != nil {
		return spec, nil, err
	}
	spec.Disks = []vmpod.Disk{{ID: "ephemeral", Path: disk}}
	spec.NICs = []vmpod.NIC{{ID: "net0", MAC: a.MAC, Tap: a.Tap, MTU: a.MTU}}
	return spec, &agentapi.Interface{Mac: a.MAC.String(), Name: "eth0", Mtu: int32(a.MTU), Addresses: []string{podIP}}, nil
}

// A vm is one that runs.
type vm struct {
	machine vmpod.Machine
	client  *agentapi.Client
	pid     int
	cpu     uint64 // ns, at the last look
	sample  Sample
}

// start does what the runtime does for a pod's sandbox.
func (h *host) start(ctx context.Context, spec vmpod.Spec, iface *agentapi.Interface, workload int64) (*vm, error) {
	ctx, cancel := context.WithTimeout(ctx, vmTimeout)
	defer cancel()
	m, err := h.driver.Launch(ctx, spec)
	if err != nil {
		return nil, err
	}
	h.left = append(h.left, func() error { return m.Remove(context.WithoutCancel(ctx)) })
	conn, err := m.Dial(ctx)
	if err != nil {
		return nil, err
	}
	c, err := agentapi.Attach(ctx, conn)
	if err != nil {
		return nil, err
	}
	h.left = append(h.left, c.Close)
	random := make([]byte, 80)
	if _, err := rand.Read(random); err != nil {
		return nil, err
	}
	if _, err := c.SetupSandbox(ctx, &agentapi.SetupSandboxRequest{
		ClockNs: time.Now().UnixNano(), Entropy: random[:64], Hostname: "overhead", MachineId: hex.EncodeToString(random[64:]),
		VmUuid: spec.ID.UUID().String(), PodUid: spec.ID.PodUID, EphemeralDisk: "ephemeral",
		Interfaces: []*agentapi.Interface{iface},
	}); err != nil {
		return nil, err
	}
	v := &vm{machine: m, client: c, sample: Sample{Workload: workload, Memory: spec.Memory}}
	if o, ok := m.(vmpod.Originator); ok {
		v.sample.Cloned, v.sample.Why = o.Origin().Cloned, o.Origin().Reason
	}
	v.pid, err = process("atoll-" + spec.ID.String())
	return v, err
}

// process finds a QEMU by its name.
func process(name string) (pid int, err error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		argv, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(argv, []byte("-name\x00"+name)) {
			continue
		}
		return strconv.Atoi(filepath.Base(filepath.Dir(f)))
	}
	return 0, fmt.Errorf("the process of VM %s is not found", name)
}

// look takes the VM's numbers; CPU since the last look, which was so long ago.
func (v *vm) look(ctx context.Context, since time.Duration) error {
	meter, ok := v.machine.(vmpod.Meter)
	if !ok {
		return errors.New("the driver does not meter VMs")
	}
	u, err := meter.Usage(ctx)
	if err != nil {
		return err
	}
	if since > 0 {
		v.sample.CPU = float64(u.CPU-v.cpu) / float64(since) * 1000
	}
	v.cpu = u.CPU
	m, err := readSplit(v.pid, v.sample.Cloned)
	if err != nil {
		return err
	}
	v.sample.QEMU, v.sample.Guest, v.sample.Shared = m.rest, m.guest, m.shared
	if since == 0 { // asking costs CPU, which is no idle VM's
		return nil
	}
	s, err := v.client.Stats(ctx, &agentapi.StatsRequest{})
	if err != nil {
		return err
	}
	v.sample.Kept = v.sample.Memory - int64(s.MemoryAvailable)
	return nil
}
