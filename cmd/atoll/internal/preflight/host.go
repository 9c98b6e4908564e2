package preflight

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
	"github.com/openatoll/atoll/vmpod/guestimage"
)

// Host says what a host is checked for.
type Host struct {
	DataDir string
	// Isolated clusters touch nothing of the host's network.
	Isolated bool
	// Running clusters hold their own ports and addresses.
	Running bool
	// Spherelet is the node agent's binary, Guest the directory of kernel and
	// initramfs, Images that of the demo images.
	Spherelet, Guest, Images string
	// NodeName returns the Node's name or why there is none.
	NodeName func() (string, error)
	// CheckDataDir refuses a data directory that this build cannot use.
	CheckDataDir func() error
	// Ports returns an error for each port that is taken.
	Ports func() []error
	// KVM tells whether KVM can run guests here, and why not.
	KVM func(ctx context.Context) (usable bool, reason string)
	// Ranges are the cluster's addresses; Link is the only interface that may
	// have some of them.
	Ranges []netip.Prefix
	Link   string
}

const aptCure = "make deps, or: apt-get install "

// Checks returns all checks of a host, quick ones first.
func (h Host) Checks() []Check {
	checks := []Check{
		{Name: "platform", Run: platform},
		{Name: "root", Run: root},
		{Name: "node name", Run: h.nodeName},
		{Name: "spherelet", Run: h.spherelet},
		{Name: "qemu", Run: qemu},
		{Name: "programs", Run: programs},
		{Name: "volumes", Run: volumes},
		{Name: "guest", Run: h.guest},
		{Name: "demo images", Run: h.images},
		{Name: "data directory", Run: h.dataDir},
		{Name: "disk space", Run: h.disk},
		{Name: "memory", Run: func(context.Context) Finding { return memory("/proc/meminfo") }},
		{Name: "cgroups", Run: func(context.Context) Finding { return cgroups("/sys/fs/cgroup") }},
		{Name: "/dev/net/tun", Needs: []string{"root"}, Run: tun},
		{Name: "nftables", Needs: []string{"root", "programs"}, Run: nftables},
		{Name: "addresses", Run: h.addresses},
		{Name: "forwarding", Needs: []string{"root"}, Run: h.forwarding},
		{Name: "ports", Run: h.ports},
		{Name: "kvm", Needs: []string{"root"}, Run: h.kvm},
	}
	return checks
}

func platform(context.Context) Finding {
	var u unix.Utsname
	_ = unix.Uname(&u)
	release := unix.ByteSliceToString(u.Release[:])
	if runtime.GOARCH != "amd64" {
		return fail("use an x86-64 host", "%s is not supported", runtime.GOARCH)
	}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && (major < 5 || major == 5 && minor < 10) {
		return fail("boot a kernel of version 5.10 or newer", "the kernel is %s, which lacks pidfds that can be waited for", release)
	}
	return ok("linux %s, %s", release, runtime.GOARCH)
}

func root(context.Context) Finding {
	if os.Geteuid() != 0 {
		return fail("run it as root, for example with sudo", "running as uid %d: VMs, taps and network namespaces need root", os.Geteuid())
	}
	return ok("yes")
}

func (h Host) nodeName(context.Context) Finding {
	name, err := h.NodeName()
	if err != nil {
		return fail("set a name with hostnamectl, or give one with --node-name", "%v", err)
	}
	return ok("%s", name)
}

func (h Host) spherelet(context.Context) Finding {
	if err := unix.Access(h.Spherelet, unix.X_OK); err != nil {
		return fail("make build", "%s: %v", h.Spherelet, err)
	}
	return ok("%s", h.Spherelet)
}

// oldestQEMU is Debian 12's, with which Atoll is tested.
const oldestQEMU = 7

var qemuVersion = regexp.MustCompile(`version (\d+)\.(\d+)\.(\d+)`)

func qemu(ctx context.Context) Finding {
	const cure = aptCure + "qemu-system-x86"
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		return fail(cure, "qemu-system-x86_64 is not in PATH")
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return fail(cure, "%s does not run: %v", path, err)
	}
	m := qemuVersion.FindSubmatch(out)
	if m == nil {
		return warn(cure, "%s does not tell its version: %q", path, firstLine(out))
	}
	if major, _ := strconv.Atoi(string(m[1])); major < oldestQEMU {
		return fail("install QEMU 7.0 or newer", "%s is %s", path, m[0])
	}
	return ok("%s, %s", path, m[0])
}

func firstLine(b []byte) string {
	line, _, _ := bytes.Cut(b, []byte("\n"))
	return string(line)
}

// needed are the programs that Atoll runs, and their Debian packages.
var needed = []struct{ program, pkg string }{
	{"mkfs.ext4", "e2fsprogs"},
	{"nft", "nftables"},
}

func programs(context.Context) Finding {
	var missing, pkgs []string
	for _, n := range needed {
		if _, err := exec.LookPath(n.program); err != nil {
			missing, pkgs = append(missing, n.program), append(pkgs, n.pkg)
		}
	}
	if len(missing) > 0 {
		return fail(aptCure+strings.Join(pkgs, " "), "not found: %s", strings.Join(missing, ", "))
	}
	return ok("all there")
}

func (h Host) guest(context.Context) Finding {
	g, err := guestimage.Load(h.Guest)
	if err != nil {
		return fail("make guest", "%v", err)
	}
	return ok("%s kernel %s in %s", g.Flavour, g.KernelRelease, h.Guest)
}

func (h Host) images(context.Context) Finding {
	if h.Images == "" {
		return warn("make images", "none: atoll.local/web and atoll.local/busybox cannot be pulled")
	}
	return ok("%s", h.Images)
}

func (h Host) dataDir(context.Context) Finding {
	if err := h.CheckDataDir(); err != nil {
		return fail("use the Atoll that wrote it, or choose another with --data-dir", "%v", err)
	}
	dir := nearest(h.DataDir)
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return fail("choose another with --data-dir", "%s cannot be written: %v", dir, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil {
		switch st.Type {
		case unix.NFS_SUPER_MAGIC, unix.OVERLAYFS_SUPER_MAGIC:
			return warn("put it on a local disk with ext4 or xfs", "%s is on a file system on which etcd is slow or unsafe", dir)
		case unix.TMPFS_MAGIC:
			return warn("put it on a disk with --data-dir", "%s is in memory: the cluster is gone after a reboot", dir)
		}
	}
	return ok("%s", h.DataDir)
}

// nearest is the deepest directory of a path that exists.
func nearest(path string) string {
	for {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return path
		}
		path = filepath.Dir(path)
	}
}

const gib = 1 << 30

// Disk space below which Atoll does not start, and below which pods will
// soon be evicted.
const (
	diskFail = 2 * gib
	diskWarn = 10 * gib
)

func (h Host) disk(context.Context) Finding {
	dir := nearest(h.DataDir)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fail("choose another with --data-dir", "%s: %v", dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	const cure = "free some, or choose another disk with --data-dir"
	switch {
	case free < diskFail:
		return fail(cure, "%.1f GiB free at %s, at least %d are needed", float64(free)/gib, dir, diskFail/gib)
	case free < diskWarn:
		return warn(cure, "%.1f GiB free at %s; images and pods' disks will soon fill that", float64(free)/gib, dir)
	}
	return ok("%.0f GiB free at %s", float64(free)/gib, dir)
}

// Available memory below which Atoll does not start (control plane and
// spherelet need about 600 MiB), and below which few pods fit.
const (
	memoryFail = 1 * gib
	memoryWarn = 3 * gib
)

func memory(meminfo string) Finding {
	b, err := os.ReadFile(meminfo)
	if err != nil {
		return warn("mount /proc", "%v", err)
	}
	m := regexp.MustCompile(`(?m)^MemAvailable:\s+(\d+) kB$`).FindSubmatch(b)
	if m == nil {
		return warn("mount /proc", "%s does not tell", meminfo)
	}
	kib, _ := strconv.ParseInt(string(m[1]), 10, 64)
	avail := kib << 10
	const cure = "stop something, or add memory"
	switch {
	case avail < memoryFail:
		return fail(cure, "%.1f GiB available, at least %d is needed", float64(avail)/gib, memoryFail/gib)
	case avail < memoryWarn:
		return warn(cure, "%.1f GiB available: few pods will fit", float64(avail)/gib)
	}
	return ok("%.1f GiB available", float64(avail)/gib)
}

// cgroups wants the memory, cpu and pids controllers, of either version.
func cgroups(mount string) Finding {
	version, have := "v2", ""
	if b, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers")); err == nil {
		have = " " + strings.TrimSpace(string(b)) + " "
	} else {
		version = "v1"
		for _, c := range []string{"memory", "cpu", "pids"} {
			if _, err := os.Stat(filepath.Join(mount, c, "cgroup.procs")); err == nil {
				have += " " + c + " "
			}
		}
	}
	var missing []string
	for _, c := range []string{"memory", "cpu", "pids"} {
		if !strings.Contains(have, " "+c+" ") {
			missing = append(missing, c)
		}
	}
	if len(missing) > 0 {
		return warn("mount them under "+mount+", or boot with cgroup_enable=memory",
			"%s: no %s controller: pod VMs are not limited by it", version, strings.Join(missing, ", "))
	}
	return ok("%s with memory, cpu, pids", version)
}

// tun makes a tap in a namespace that is gone afterwards.
func tun(context.Context) Finding {
	err := hostnet.Scratch(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		return h.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "atl0"}, Mode: netlink.TUNTAP_MODE_TAP})
	})
	if err != nil {
		return fail("modprobe tun; in a container, give it /dev/net/tun and CAP_NET_ADMIN", "a tap cannot be made: %v", err)
	}
	return ok("a tap can be made")
}

// nftScript uses what Services need: a map and NAT.
const nftScript = `table ip atoll-check {
	map m { type ipv4_addr . inet_proto . inet_service : verdict; }
	chain c {
		type nat hook output priority -100;
		meta l4proto tcp dnat to 192.0.2.1:80
	}
	chain p {
		type nat hook postrouting priority 100;
		masquerade
	}
}
`

func nftables(ctx context.Context) Finding {
	err := hostnet.Scratch(func() error {
		cmd := exec.CommandContext(ctx, "nft", "-f", "-")
		cmd.Stdin = strings.NewReader(nftScript)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, firstLine(out))
		}
		return nil
	})
	if err != nil {
		return fail("modprobe nf_tables nft_nat; use a kernel with nftables", "a table for Services cannot be made: %v", err)
	}
	return ok("maps and NAT work")
}

// addresses refuses to start where the cluster's ranges are in use.
func (h Host) addresses(context.Context) Finding {
	if h.Isolated {
		return ok("isolated: none of the host's are touched")
	}
	ifaces, err := net.Interfaces()
	if err != nil {
		return warn("", "%v", err)
	}
	for _, i := range ifaces {
		if i.Name == h.Link {
			continue
		}
		addrs, _ := i.Addrs()
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil {
				continue
			}
			for _, r := range h.Ranges {
				if r.Overlaps(p.Masked()) {
					return fail("use --isolated, or renumber that interface", "%s has %s, which is in the cluster's range %s", i.Name, p, r)
				}
			}
		}
	}
	return ok("the cluster's ranges are free")
}

func (h Host) forwarding(context.Context) Finding {
	if h.Isolated {
		return ok("isolated: switched on in the cluster's network namespace only")
	}
	const file = "/proc/sys/net/ipv4/ip_forward"
	if err := unix.Access(file, unix.W_OK); err != nil {
		return fail("use --isolated, or make /proc/sys writable", "%s cannot be written: %v", file, err)
	}
	b, _ := os.ReadFile("/proc/sys/net/ipv4/conf/all/rp_filter")
	mode := map[string]string{"0": "off", "1": "strict", "2": "loose"}[strings.TrimSpace(string(b))]
	// Strict is fine: each pod's address is routed to the tap it comes from.
	return ok("can be switched on; reverse path filter %s", mode)
}

func (h Host) ports(context.Context) Finding {
	if h.Running {
		return ok("held by the running cluster")
	}
	if h.Isolated {
		return ok("isolated: none of the host's are used")
	}
	var taken []string
	for _, err := range h.Ports() {
		taken = append(taken, err.Error())
	}
	if len(taken) > 0 {
		return fail("stop what uses them, or use --isolated", "%s", strings.Join(taken, "; "))
	}
	return ok("all free")
}

func (h Host) kvm(ctx context.Context) Finding {
	usable, reason := h.KVM(ctx)
	if !usable {
		return warn("enable virtualisation in the firmware, or nested virtualisation on the hypervisor, and give this host /dev/kvm",
			"unusable: %s; pod VMs are emulated (TCG): slow, and no security boundary", reason)
	}
	return ok("usable")
}
