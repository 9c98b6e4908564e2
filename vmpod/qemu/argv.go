package qemu

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	govmm "github.com/kata-containers/kata-containers/src/runtime/pkg/govmm/qemu"

	"github.com/openatoll/atoll/vmpod"
)

// Everything that varies on QEMU's command line matches one of these. None
// has a comma, QEMU's separator, but for kernel command lines, which QEMU
// takes whole. What pods and images say (names, labels, commands) is not
// among the values at all.
var (
	podUIDRE     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)
	deviceIDRE   = regexp.MustCompile(`^[a-z0-9-]{1,20}$`)
	tapRE        = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,14}$`)
	cgroupPathRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$`)
	cmdlineRE    = regexp.MustCompile(`^[A-Za-z0-9 ._=,:/@+-]*$`)
)

const (
	maxCPUs   = 255      // q35's limit
	minMemory = 64 << 20 // less boots no Linux worth having
	maxMemory = 4 << 40
)

// checkSpec refuses what must not or cannot be launched.
func checkSpec(s vmpod.Spec) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("pod VM %s: %s: %w", strconv.Quote(s.ID.String()), fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	switch {
	case !podUIDRE.MatchString(s.ID.PodUID):
		return bad("its pod UID is not of the form %s", podUIDRE)
	case s.CPUs < 1 || s.CPUs > maxCPUs:
		return bad("%d CPUs: want 1 to %d", s.CPUs, maxCPUs)
	case s.Memory < minMemory || s.Memory > maxMemory:
		return bad("%d bytes of memory: want %d to %d", s.Memory, int64(minMemory), int64(maxMemory))
	case s.Pool != "" && !cgroupPathRE.MatchString(s.Pool):
		return bad("pool %q: want names of [A-Za-z0-9._-] joined by /", s.Pool)
	case len(s.Disks) > plugSlots:
		return bad("%d disks: want at most %d", len(s.Disks), plugSlots)
	case len(s.Shares) > 0:
		return bad("it has shares, which can only be plugged into a VM that runs")
	case len(s.NICs) > maxBootNICs:
		return bad("%d NICs: want at most %d", len(s.NICs), maxBootNICs)
	}
	seen := map[string]bool{}
	for _, d := range s.Disks {
		if err := checkDisk(d); err != nil {
			return bad("%v", err)
		}
		if d.Volume != nil {
			return bad("disk %s is a volume, which can only be plugged into a VM that runs", d.ID)
		}
		if seen["disk "+d.ID] {
			return bad("two disks are called %q", d.ID)
		}
		seen["disk "+d.ID] = true
	}
	for _, n := range s.NICs {
		if err := checkNIC(n); err != nil {
			return bad("%v", err)
		}
		if seen["nic "+n.ID] {
			return bad("two NICs are called %q", n.ID)
		}
		seen["nic "+n.ID] = true
	}
	return nil
}

func checkDisk(d vmpod.Disk) error {
	switch {
	case !deviceIDRE.MatchString(d.ID):
		return fmt.Errorf("disk ID %q: want 1 to 20 characters of [a-z0-9-]", d.ID)
	case !strings.HasPrefix(d.Path, "/"):
		return fmt.Errorf("disk %s: path %q: want an absolute one", d.ID, d.Path)
	case d.Volume != nil:
		return checkVolume(d)
	case d.Format != "" && d.Format != "raw" && d.Format != "vmdk":
		return fmt.Errorf("disk %s: format %q: want raw or vmdk", d.ID, d.Format)
	}
	return nil
}

func checkNIC(n vmpod.NIC) error {
	switch {
	case !deviceIDRE.MatchString(n.ID):
		return fmt.Errorf("NIC ID %q: want 1 to 20 characters of [a-z0-9-]", n.ID)
	case !tapRE.MatchString(n.Tap):
		return fmt.Errorf("NIC %s: tap %q: not an interface name", n.ID, n.Tap)
	case len(n.MAC) != 6 || n.MAC[0]&1 != 0:
		return fmt.Errorf("NIC %s: MAC address %q: want a unicast address of 6 bytes", n.ID, n.MAC)
	case n.MTU != 0 && (n.MTU < 68 || n.MTU > 65535):
		return fmt.Errorf("NIC %s: MTU %d: want 68 to 65535, or 0 for the guest's default", n.ID, n.MTU)
	}
	return nil
}

// resources says how QEMU reaches what it needs: by descriptor in a launch,
// by path in a command line made for people.
type resources interface {
	file(path string) string              // a path that QEMU can open
	opened(f *os.File) string             // likewise, of what is open here
	disk(d vmpod.Disk) (string, error)    // likewise, for a disk's image
	listener(name string) (string, error) // options of a listening socket chardev
	tap(n vmpod.NIC) (string, error)      // options of a tap netdev
	extra() []string                      // arguments that make the above known
}

// Sockets that QEMU listens on; also their file name's extension.
const (
	qmpSocket     = "qmp"
	agentSocket   = "agent"
	consoleSocket = "con"
)

// AgentPort is the name of the virtio-serial port of the agent channel.
const AgentPort = "atoll.agent"

// A command is all that decides QEMU's command line.
type command struct {
	spec vmpod.Spec
	// What the VM can grow to, at least what spec has.
	maxCPUs   int
	maxMemory int64 // bytes

	guest   Guest
	accel   Accelerator
	tscKHz  int  // the host's TSC rate, for TCG; 0 if not known
	sandbox bool // this QEMU has a seccomp sandbox
	shared  bool // other processes, servers of shares, reach the guest's RAM
	paused  bool // start with the CPUs stopped

	// ram is a template's RAM, nil for a VM that has its own: written by the
	// template itself, mapped copy-on-write by its clones.
	ram   *os.File
	clone bool // its devices' state comes from the template, on the monitor
}

// tcgCacheMiB bounds TCG's cache of translated code. QEMU's own default is
// 1 GiB, which would be the greater part of what a small VM costs the host.
const tcgCacheMiB = 128

// sandboxArgs deny what QEMU never needs once it runs: no new privileges, no
// new processes, no other priorities, no obsolete system calls.
const sandboxArgs = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// argv returns QEMU's arguments, the program's name not included.
func (c command) argv(r resources) ([]string, error) {
	a := []string{
		"-name", vmName(c.spec.ID),
		"-uuid", c.spec.ID.UUID().String(),
		"-no-user-config", "-nodefaults", "-display", "none",
		// No machine part that a pod has no use for: see the decision record.
		"-machine", "q35,memory-backend=ram,vmport=off,sata=off,smbus=off,i8042=off,dump-guest-core=off",
		"-object", c.memoryBackend(r),
		"-m", c.memory(),
		"-smp", fmt.Sprintf("%d,sockets=1,cores=%d,threads=1,maxcpus=%d", c.spec.CPUs, c.maxCPUs, c.maxCPUs),
		"-rtc", "base=utc,clock=host",
		// A guest that ended stays, stopped, until somebody has asked how.
		"-action", "reboot=shutdown,shutdown=pause,panic=pause",
	}
	switch c.accel {
	case AcceleratorKVM:
		a = append(a, "-accel", "kvm", "-cpu", "host")
	case AcceleratorTCG:
		a = append(a, "-accel", fmt.Sprintf("tcg,tb-size=%d", tcgCacheMiB), "-cpu", "max")
	default:
		return nil, fmt.Errorf("accelerator %q is not decided", c.accel)
	}
	if c.sandbox {
		a = append(a, "-sandbox", sandboxArgs)
	}
	if c.paused {
		a = append(a, "-S")
	}
	if c.clone {
		a = append(a, "-incoming", "defer")
	}
	a = append(a,
		"-kernel", r.file(c.guest.Kernel),
		"-initrd", r.file(c.guest.Initrd),
		"-append", c.kernelCmdline(),
	)
	devices, err := c.devices(r)
	if err != nil {
		return nil, err
	}
	// govmm renders each device; its own assembly of the rest cannot be used,
	// since it ties QEMU to its starter: a pipe as stderr, no new session, no
	// descriptors for disks.
	config := &govmm.Config{Machine: govmm.Machine{Type: "q35"}}
	var rendered []string
	for _, d := range devices {
		if !d.Valid() {
			return nil, fmt.Errorf("device %#v is not valid", d)
		}
		rendered = append(rendered, d.QemuParams(config)...)
	}
	return append(append(a, r.extra()...), rendered...), nil
}

// memoryBackend is the -object that is RAM of the guest. Every one of them must
// be shared for a share to work: its server gets them as descriptors.
func (c command) memoryBackend(r resources) string {
	mib := memoryMiB(c.spec)
	switch {
	case c.ram != nil && c.clone:
		return fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=%s,share=off", mib, r.opened(c.ram))
	case c.ram != nil:
		return fmt.Sprintf("memory-backend-file,id=ram,size=%dM,mem-path=%s,share=on", mib, r.opened(c.ram))
	case c.shared:
		return fmt.Sprintf("memory-backend-memfd,id=ram,size=%dM,share=on", mib)
	}
	return fmt.Sprintf("memory-backend-ram,id=ram,size=%dM", mib)
}

// vmName is what people find the process by.
func vmName(id vmpod.ID) string { return vmPrefix + id.String() }

const vmPrefix = "atoll-"

// memoryMiB is the RAM in MiB, rounded up.
func memoryMiB(s vmpod.Spec) int64 { return (s.Memory + 1<<20 - 1) >> 20 }

// memory is the RAM, and the address space into which it can grow.
func (c command) memory() string {
	m := fmt.Sprintf("%dM", memoryMiB(c.spec))
	if c.maxMemory > memoryMiB(c.spec)<<20 {
		m += fmt.Sprintf(",maxmem=%dM", c.maxMemory>>20)
	}
	return m
}

// kernelCmdline is what the guest's kernel is told. Under TCG the guest's TSC
// is the host's, so calibrating it (or testing the timer, the crypto code) only
// costs boot time, and RDRAND is QEMU's getrandom, fit to seed from.
func (c command) kernelCmdline() string {
	a := []string{"console=ttyS0", "quiet", "panic=-1", "reboot=t",
		// Memory that could come above 4 GiB makes the kernel set 64 MiB aside
		// for devices that cannot reach it. There are none.
		"swiotlb=noforce",
		// Huge pages where a program asks for them. Debian's default gives 2 MiB
		// to whoever touches 4 KiB of them, the agent's heap first: 9 MiB a pod.
		// See docs/decisions/0019-huge-pages-in-guests.md.
		"transparent_hugepage=madvise"}
	if c.accel == AcceleratorTCG {
		a = append(a, "tsc=reliable", "no_timer_check", "cryptomgr.notests", "random.trust_cpu=on", "atoll.emulated")
		if c.tscKHz > 0 {
			a = append(a, "tsc_early_khz="+strconv.Itoa(c.tscKHz))
		}
	}
	if c.guest.Cmdline != "" {
		a = append(a, c.guest.Cmdline)
	}
	return strings.Join(a, " ")
}

// devices lists the VM's devices; their order is the order of PCI slots and
// so of the guest's names.
func (c command) devices(r resources) ([]govmm.Device, error) {
	devs := []govmm.Device{
		arg{"-device", "vmgenid,guid=auto,id=vmgenid"},
		arg{"-device", "pvpanic-pci,id=panic"},
		arg{"-object", "rng-random,id=rng,filename=/dev/urandom"},
		arg{"-device", "virtio-rng-pci,id=rng0,rng=rng,disable-legacy=on"},
		arg{"-device", "virtio-serial-pci,id=ports,max_ports=2,disable-legacy=on"},
	}
	for _, s := range []struct{ name, use string }{
		{qmpSocket, "-mon chardev=qmp,mode=control"},
		{agentSocket, "-device virtserialport,bus=ports.0,nr=1,id=agent,chardev=agent,name=" + AgentPort},
		{consoleSocket, "-serial chardev:con"},
	} {
		opts, err := r.listener(s.name)
		if err != nil {
			return nil, err
		}
		flag, value, _ := strings.Cut(s.use, " ")
		devs = append(devs, arg{"-chardev", "socket,id=" + s.name + "," + opts + ",server=on,wait=off"}, arg{flag, value})
	}
	for i, n := range c.spec.NICs {
		opts, err := r.tap(n)
		if err != nil {
			return nil, err
		}
		devs = append(devs,
			arg{"-netdev", "tap,id=" + netdevName(n.ID) + "," + opts},
			arg{"-device", "virtio-net-pci,disable-legacy=on,romfile=,bus=pcie.0,addr=" + hexAddr(firstNICSlot+i) +
				",id=" + nicName(n.ID) + ",netdev=" + netdevName(n.ID) + ",mac=" + n.MAC.String() + mtuOption(n)})
	}
	devs = append(devs, plugBridge())
	for i, d := range c.spec.Disks {
		content := placeholderNode(d)
		if d.Path != "" {
			path, err := r.disk(d)
			if err != nil {
				return nil, err
			}
			content = blockNode(d, path)
		}
		node, err := json.Marshal(content)
		if err != nil {
			return nil, err
		}
		device, err := json.Marshal(diskDevice(d, i+1))
		if err != nil {
			return nil, err
		}
		devs = append(devs, arg{"-blockdev", string(node)}, arg{"-device", string(device)})
	}
	return devs, nil
}

// arg is a device that govmm has no type for, or none that says all we need.
type arg struct{ flag, value string }

func (a arg) Valid() bool                       { return a.flag != "" && a.value != "" }
func (a arg) QemuParams(*govmm.Config) []string { return []string{a.flag, a.value} }

func mtuOption(n vmpod.NIC) string {
	if n.MTU == 0 {
		return ""
	}
	return ",host_mtu=" + strconv.Itoa(n.MTU)
}

// Names of our objects inside QEMU.
func nicName(id string) string    { return "nic-" + id }
func netdevName(id string) string { return "net-" + id }
func diskName(id string) string   { return "disk-" + id }
func nodeName(id string) string   { return "node-" + id }

// blockNode is the description of a disk's content for -blockdev and
// blockdev-add; path is what QEMU opens.
func blockNode(d vmpod.Disk, path string) map[string]any {
	format := d.Format
	if format == "" {
		format = "raw"
	}
	return map[string]any{
		"driver":    format,
		"node-name": nodeName(d.ID),
		"read-only": d.ReadOnly,
		// What the guest trims comes back to the host's file system.
		"discard": "unmap",
		"file": map[string]any{
			"driver":    fileDriver(d.Path),
			"filename":  path,
			"read-only": d.ReadOnly,
			"discard":   "unmap",
			"aio":       "threads",
		},
	}
}

// placeholderNode is the content of a template's disk: zeros, which a guest
// reads once, in search of partitions.
func placeholderNode(d vmpod.Disk) map[string]any {
	return map[string]any{"driver": "null-co", "node-name": nodeName(d.ID), "size": 64 << 20, "read-zeroes": true}
}

// diskDevice is the device of a disk for -device and device_add. Errors of
// the host's disk are the guest's to see: docs/decisions/0002-disk-errors.md.
func diskDevice(d vmpod.Disk, slot int) map[string]any {
	return map[string]any{
		"driver":         "virtio-blk-pci",
		"id":             diskName(d.ID),
		"drive":          nodeName(d.ID),
		"serial":         d.ID,
		"bus":            plugBus,
		"addr":           plugAddress(slot),
		"disable-legacy": "on",
		"werror":         "report",
		"rerror":         "report",
	}
}

// nicDevice is the device of a hot-plugged NIC for device_add.
func nicDevice(n vmpod.NIC, slot int) map[string]any {
	m := map[string]any{
		"driver":         "virtio-net-pci",
		"id":             nicName(n.ID),
		"netdev":         netdevName(n.ID),
		"mac":            n.MAC.String(),
		"bus":            plugBus,
		"addr":           plugAddress(slot),
		"disable-legacy": "on",
		"romfile":        "",
	}
	if n.MTU != 0 {
		m["host_mtu"] = n.MTU
	}
	return m
}
