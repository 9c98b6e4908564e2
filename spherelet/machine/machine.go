// Package machine tells the kubelet what the host is and how much of it is in
// use: the facts that cAdvisor tells a kubelet of containers, read from /proc
// and statfs, so that they are the same under cgroup v1, hybrid and v2.
package machine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/cadvisor/cache/memory"
	cadvisor "github.com/google/cadvisor/info/v1"
	cadvisorv2 "github.com/google/cadvisor/info/v2"
	"golang.org/x/sys/unix"
)

// A Host reads the facts of the machine that it runs on. It implements the
// kubelet's cadvisor.Interface. Methods are safe for concurrent use.
type Host struct {
	// root is "/" except in tests.
	root string
	// kubeletDir and imagesDir are the directories whose file systems the
	// kubelet calls nodefs and imagefs.
	kubeletDir, imagesDir string
	// podsCgroup is the group, relative to the root of the hierarchies, in
	// which the driver accounts all pod VMs of this node.
	podsCgroup string
	now        func() time.Time
	cpus       int

	mu sync.Mutex
	// previous and last are the samples that "CPU in use now" comes from.
	previous, last sample
}

// minInterval is how far apart two samples must be to say what is used now.
const minInterval = time.Second

type sample struct {
	at  time.Time
	cpu cpuTimes
}

// New returns the facts of this host. kubeletDir and imagesDir must exist
// when the file-system methods are called; podsCgroup may come and go.
func New(kubeletDir, imagesDir, podsCgroup string) *Host {
	return &Host{root: "/", kubeletDir: kubeletDir, imagesDir: imagesDir, podsCgroup: podsCgroup, now: time.Now, cpus: runtime.NumCPU()}
}

// PodsContainer is the name under which ContainerInfoV2 tells what all pod
// VMs together take of the host, their VMMs included.
func (h *Host) PodsContainer() string { return "/" + h.podsCgroup }

// Start does nothing: nothing runs in the background.
func (h *Host) Start() error { return nil }

// CPUs is the number of CPUs that this process may use.
func (h *Host) CPUs() int { return h.cpus }

// Memory is the host's RAM in bytes.
func (h *Host) Memory() (int64, error) {
	m, err := h.meminfo()
	return int64(m["MemTotal"]), err
}

// BootID changes with every boot of the host.
func (h *Host) BootID() (string, error) { return h.line("proc/sys/kernel/random/boot_id") }

// MachineInfo describes the hardware.
func (h *Host) MachineInfo() (*cadvisor.MachineInfo, error) {
	m, err := h.meminfo()
	if err != nil {
		return nil, err
	}
	boot, err := h.BootID()
	if err != nil {
		return nil, err
	}
	info := &cadvisor.MachineInfo{
		Timestamp:        h.now(),
		NumCores:         h.cpus,
		NumPhysicalCores: h.cpus,
		NumSockets:       1,
		MemoryCapacity:   m["MemTotal"],
		SwapCapacity:     m["SwapTotal"],
		BootID:           boot,
		CPUVendorID:      h.cpuinfo("vendor_id"),
		CloudProvider:    cadvisor.UnknownProvider,
		InstanceType:     cadvisor.UnknownInstance,
		InstanceID:       cadvisor.UnNamedInstance,
	}
	if f, err := strconv.ParseFloat(h.cpuinfo("cpu MHz"), 64); err == nil {
		info.CpuFrequency = uint64(f * 1000)
	}
	info.MachineID, _ = h.line("etc/machine-id")
	// Virtual machines and containers without DMI: the machine-id serves.
	if info.SystemUUID, err = h.line("sys/class/dmi/id/product_uuid"); err != nil || info.SystemUUID == "" {
		info.SystemUUID = info.MachineID
	}
	return info, nil
}

// VersionInfo names the host's kernel and system. The guests' kernel is
// another one; the node label atoll.dev/guest-kernel tells.
func (h *Host) VersionInfo() (*cadvisor.VersionInfo, error) {
	release, err := h.line("proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	return &cadvisor.VersionInfo{KernelVersion: release, ContainerOsVersion: h.osRelease()}, nil
}

// ContainerInfoV2 knows two containers: "/", the host itself, and
// PodsContainer. Anything else is memory.ErrDataNotFound, which the kubelet
// takes as "not measured here". The answer always has one entry.
func (h *Host) ContainerInfoV2(name string, _ cadvisorv2.RequestOptions) (map[string]cadvisorv2.ContainerInfo, error) {
	switch {
	case name == "/":
	case name == h.PodsContainer() && h.podsCgroup != "":
		return h.pods()
	default:
		return nil, fmt.Errorf("container %q: %w", name, memory.ErrDataNotFound)
	}
	stats, mem, err := h.sample()
	if err != nil {
		return nil, err
	}
	spec := cadvisorv2.ContainerSpec{
		CreationTime:  h.bootTime(),
		HasCpu:        true,
		HasMemory:     true,
		HasNetwork:    true,
		HasProcesses:  true,
		HasFilesystem: true,
	}
	spec.Memory.Limit = mem["MemTotal"]
	spec.Memory.SwapLimit = mem["SwapTotal"]
	return map[string]cadvisorv2.ContainerInfo{"/": {Spec: spec, Stats: []*cadvisorv2.ContainerStats{stats}}}, nil
}

// GetRequestedContainersInfo is the same for older callers.
func (h *Host) GetRequestedContainersInfo(name string, _ cadvisorv2.RequestOptions) (map[string]*cadvisor.ContainerInfo, error) {
	if name != "/" {
		return map[string]*cadvisor.ContainerInfo{}, nil
	}
	s, mem, err := h.sample()
	if err != nil {
		return nil, err
	}
	info := &cadvisor.ContainerInfo{
		ContainerReference: cadvisor.ContainerReference{Name: "/"},
		Spec:               cadvisor.ContainerSpec{CreationTime: h.bootTime(), HasCpu: true, HasMemory: true, HasNetwork: true},
		Stats:              []*cadvisor.ContainerStats{{Timestamp: s.Timestamp, Cpu: *s.Cpu, Memory: *s.Memory}},
	}
	info.Spec.Memory.Limit = mem["MemTotal"]
	return map[string]*cadvisor.ContainerInfo{"/": info}, nil
}

// sample reads the host's use now.
func (h *Host) sample() (*cadvisorv2.ContainerStats, map[string]uint64, error) {
	mem, err := h.meminfo()
	if err != nil {
		return nil, nil, err
	}
	cpu, err := h.cpuTimes()
	if err != nil {
		return nil, nil, err
	}
	now := h.now()
	s := &cadvisorv2.ContainerStats{
		Timestamp: now,
		Cpu:       &cadvisor.CpuStats{},
		CpuInst:   h.instant(sample{at: now, cpu: cpu}),
		Memory:    h.memoryStats(mem),
		Network:   &cadvisorv2.NetworkStats{Interfaces: h.interfaces()},
		Processes: &cadvisor.ProcessStats{ProcessCount: h.processes()},
	}
	s.Cpu.Usage.Total, s.Cpu.Usage.User, s.Cpu.Usage.System = cpu.total(), cpu.user, cpu.system
	return s, mem, nil
}

// memoryStats computes as cAdvisor does for a root cgroup: all memory that is
// not free is in use, and what the kernel would drop first is not part of the
// working set.
func (h *Host) memoryStats(m map[string]uint64) *cadvisor.MemoryStats {
	usage := m["MemTotal"] - min(m["MemFree"], m["MemTotal"])
	reclaimable := m["Inactive(file)"]
	ms := &cadvisor.MemoryStats{
		Usage:      usage,
		WorkingSet: usage - min(reclaimable, usage),
		RSS:        m["AnonPages"],
		Cache:      m["Cached"] + m["Buffers"],
		MappedFile: m["Mapped"],
		Swap:       m["SwapTotal"] - min(m["SwapFree"], m["SwapTotal"]),
	}
	vm := h.pairs("proc/vmstat")
	ms.ContainerData.Pgfault, ms.ContainerData.Pgmajfault = vm["pgfault"], vm["pgmajfault"]
	ms.HierarchicalData = ms.ContainerData
	return ms
}

// instant is the CPU use, in nanoseconds a second, since a sample that is at
// least minInterval old; nil at first.
func (h *Host) instant(s sample) *cadvisorv2.CpuInstStats {
	h.mu.Lock()
	defer h.mu.Unlock()
	base := h.last
	if s.at.Sub(base.at) < minInterval {
		base = h.previous
	} else {
		h.previous, h.last = h.last, s
	}
	seconds := s.at.Sub(base.at).Seconds()
	if base.at.IsZero() || seconds <= 0 {
		return nil
	}
	rate := func(now, then uint64) uint64 {
		if now < then {
			return 0
		}
		return uint64(float64(now-then) / seconds)
	}
	inst := &cadvisorv2.CpuInstStats{}
	inst.Usage.Total = rate(s.cpu.total(), base.cpu.total())
	inst.Usage.User = rate(s.cpu.user, base.cpu.user)
	inst.Usage.System = rate(s.cpu.system, base.cpu.system)
	return inst
}

// RootFsInfo is the file system of the kubelet's directory.
func (h *Host) RootFsInfo() (cadvisorv2.FsInfo, error) { return h.GetDirFsInfo(h.kubeletDir) }

// ImagesFsInfo is the file system of the images.
func (h *Host) ImagesFsInfo(context.Context) (cadvisorv2.FsInfo, error) {
	return h.GetDirFsInfo(h.imagesDir)
}

// ContainerFsInfo is that of the images too: writable layers are on the pods'
// own disks, beside the images.
func (h *Host) ContainerFsInfo(context.Context) (cadvisorv2.FsInfo, error) {
	return h.GetDirFsInfo(h.imagesDir)
}

// GetDirFsInfo is the file system that the directory is on. Equal devices
// mean the same file system.
func (h *Host) GetDirFsInfo(path string) (cadvisorv2.FsInfo, error) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return cadvisorv2.FsInfo{}, fmt.Errorf("file system of %s: %w", path, err)
	}
	if err := retry(func() error { return unix.Statfs(path, &fs) }); err != nil {
		return cadvisorv2.FsInfo{}, fmt.Errorf("file system of %s: %w", path, err)
	}
	device, mount := h.mountOf(st.Dev)
	unit := uint64(fs.Bsize)
	files, free := fs.Files, fs.Ffree
	info := cadvisorv2.FsInfo{
		Timestamp:  h.now(),
		Device:     device,
		Mountpoint: mount,
		Capacity:   fs.Blocks * unit,
		Available:  fs.Bavail * unit,
		Usage:      (fs.Blocks - min(fs.Bfree, fs.Blocks)) * unit,
	}
	// File systems without a table of inodes (btrfs) say 0 of 0.
	if files > 0 {
		info.Inodes, info.InodesFree = &files, &free
	}
	return info, nil
}

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// mountOf finds the device's name in the mount table; its number serves where
// the table has another one (btrfs, overlays).
func (h *Host) mountOf(dev uint64) (device, mountpoint string) {
	number := fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev))
	f, err := os.Open(h.path("proc/self/mountinfo"))
	if err != nil {
		return number, ""
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		left, right, ok := strings.Cut(sc.Text(), " - ")
		fields, source := strings.Fields(left), strings.Fields(right)
		if ok && len(fields) >= 5 && len(source) >= 2 && fields[2] == number {
			return source[1], fields[4]
		}
	}
	return number, ""
}

func (h *Host) path(name string) string { return filepath.Join(h.root, name) }
