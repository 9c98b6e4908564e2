package machine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/cadvisor/cache/memory"
	cadvisorv2 "github.com/google/cadvisor/info/v2"
)

func write(t *testing.T, root, name, content string) {
	t.Helper()
	p := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func fake(t *testing.T) (*Host, string) {
	root := t.TempDir()
	write(t, root, "proc/meminfo", "MemTotal: 1000 kB\nMemFree: 300 kB\nInactive(file): 100 kB\nAnonPages: 50 kB\nSwapTotal: 10 kB\nSwapFree: 4 kB\nHugePages_Total: 7\n")
	write(t, root, "proc/stat", "cpu  100 0 50 1000 5 3 2 9 0 0\ncpu0 1 2 3\nbtime 1700000000\n")
	write(t, root, "proc/vmstat", "pgfault 12\npgmajfault 3\n")
	write(t, root, "proc/loadavg", "0.1 0.2 0.3 1/234 999\n")
	write(t, root, "proc/sys/kernel/random/boot_id", "boot-1\n")
	write(t, root, "proc/sys/kernel/osrelease", "6.1.0-x\n")
	write(t, root, "proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu MHz\t\t: 2000.5\n")
	write(t, root, "etc/machine-id", "abc\n")
	write(t, root, "etc/os-release", "NAME=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n")
	write(t, root, "proc/self/net/dev", "Inter-|\n face |\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 1 0 0 0 0 0 20 4 0 3 0 0 0 0\natl0123: 5 5 0 0 0 0 0 0 5 5 0 0 0 0 0 0\n")
	return &Host{root: root, kubeletDir: root, imagesDir: root, podsCgroup: "atoll/x", now: time.Now, cpus: 4}, root
}

func TestMachineInfo(t *testing.T) {
	h, _ := fake(t)
	m, err := h.MachineInfo()
	if err != nil {
		t.Fatal(err)
	}
	if m.NumCores != 4 || m.MemoryCapacity != 1000*1024 || m.SwapCapacity != 10*1024 || m.BootID != "boot-1" ||
		m.MachineID != "abc" || m.SystemUUID != "abc" || m.CpuFrequency != 2000500 || m.CPUVendorID != "GenuineIntel" {
		t.Errorf("MachineInfo = %+v", m)
	}
	v, err := h.VersionInfo()
	if err != nil || v.KernelVersion != "6.1.0-x" || v.ContainerOsVersion != "Debian GNU/Linux 12" {
		t.Errorf("VersionInfo = %+v, %v", v, err)
	}
}

func TestRootContainer(t *testing.T) {
	h, root := fake(t)
	now := time.Unix(1700000100, 0)
	h.now = func() time.Time { return now }
	get := func() (cadvisorv2.ContainerInfo, *cadvisorv2.ContainerStats) {
		m, err := h.ContainerInfoV2("/", cadvisorv2.RequestOptions{Count: 2})
		if err != nil || len(m) != 1 || len(m["/"].Stats) != 1 {
			t.Fatalf("ContainerInfoV2 = %v, %v; want one entry with one sample", m, err)
		}
		return m["/"], m["/"].Stats[0]
	}
	info, s := get()
	if info.Spec.Memory.Limit != 1000*1024 || !info.Spec.HasMemory || !info.Spec.HasCpu || info.Spec.CreationTime.Unix() != 1700000000 {
		t.Errorf("Spec = %+v", info.Spec)
	}
	if s.Memory.Usage != 700*1024 || s.Memory.WorkingSet != 600*1024 || s.Memory.RSS != 50*1024 || s.Memory.ContainerData.Pgmajfault != 3 {
		t.Errorf("Memory = %+v", s.Memory)
	}
	if s.Cpu.Usage.Total != 155*1e7 || s.CpuInst != nil {
		t.Errorf("Cpu = %+v, CpuInst = %+v", s.Cpu, s.CpuInst)
	}
	if len(s.Network.Interfaces) != 1 || s.Network.Interfaces[0].TxBytes != 20 || s.Network.Interfaces[0].RxErrors != 1 || s.Processes.ProcessCount != 234 {
		t.Errorf("Network = %+v, Processes = %+v", s.Network, s.Processes)
	}

	// Two seconds later one CPU has been busy for one second.
	now = now.Add(2 * time.Second)
	write(t, root, "proc/stat", "cpu  200 0 50 1000 5 3 2 9 0 0\nbtime 1700000000\n")
	if _, s = get(); s.CpuInst == nil || s.CpuInst.Usage.Total != 5e8 {
		t.Errorf("CpuInst = %+v, want half a core", s.CpuInst)
	}
	// Asked again at once: the same base, no division by zero.
	now = now.Add(time.Millisecond)
	if _, s = get(); s.CpuInst == nil || s.CpuInst.Usage.Total == 0 {
		t.Errorf("CpuInst right after = %+v", s.CpuInst)
	}
	if _, err := h.ContainerInfoV2("/kubepods", cadvisorv2.RequestOptions{}); !errors.Is(err, memory.ErrDataNotFound) {
		t.Errorf("another container: %v", err)
	}
}

func TestFileSystems(t *testing.T) {
	dir := t.TempDir()
	h := New(dir, dir, "atoll/none")
	root, err := h.RootFsInfo()
	if err != nil || root.Device == "" || root.Capacity == 0 || root.Available > root.Capacity || root.Usage > root.Capacity {
		t.Errorf("RootFsInfo = %+v, %v", root, err)
	}
	images, err := h.ImagesFsInfo(context.Background())
	if err != nil || images.Device != root.Device {
		t.Errorf("images are on %q and the kubelet on %q, want one device; %v", images.Device, root.Device, err)
	}
	if proc, err := h.GetDirFsInfo("/proc"); err != nil || proc.Device == root.Device {
		t.Errorf("/proc is on %q, %v", proc.Device, err)
	}
	if _, err := h.GetDirFsInfo(filepath.Join(dir, "gone")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
}

func TestPodsContainer(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"none": {},
		"v2": {
			"sys/fs/cgroup/atoll/x/memory.current": "1000\n",
			"sys/fs/cgroup/atoll/x/memory.stat":    "anon 600\nfile 400\ninactive_file 300\npgfault 9\n",
			"sys/fs/cgroup/atoll/x/cpu.stat":       "usage_usec 5\n",
		},
		"v1": {
			"sys/fs/cgroup/memory/atoll/x/memory.usage_in_bytes": "1000\n",
			"sys/fs/cgroup/memory/atoll/x/memory.stat":           "total_rss 600\ntotal_cache 400\ntotal_inactive_file 300\npgfault 9\n",
			"sys/fs/cgroup/cpuacct/atoll/x/cpuacct.usage":        "5000\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			h, root := fake(t)
			for f, c := range files {
				write(t, root, f, c)
			}
			m, err := h.ContainerInfoV2(h.PodsContainer(), cadvisorv2.RequestOptions{})
			if err != nil || len(m) != 1 || len(m["/atoll/x"].Stats) != 1 {
				t.Fatalf("ContainerInfoV2 = %v, %v", m, err)
			}
			s, want := m["/atoll/x"].Stats[0], uint64(1)
			if name == "none" {
				want = 0
			}
			if s.Memory.Usage != 1000*want || s.Memory.WorkingSet != 700*want || s.Memory.RSS != 600*want || s.Cpu.Usage.Total != 5000*want {
				t.Errorf("Memory = %+v, Cpu = %+v", s.Memory, s.Cpu)
			}
		})
	}
}

// The real host answers whatever its cgroups look like.
func TestThisHost(t *testing.T) {
	h := New(t.TempDir(), t.TempDir(), "atoll/none")
	if m, err := h.MachineInfo(); err != nil || m.NumCores < 1 || m.MemoryCapacity == 0 || m.BootID == "" {
		t.Errorf("MachineInfo = %+v, %v", m, err)
	}
	m, err := h.ContainerInfoV2("/", cadvisorv2.RequestOptions{})
	if err != nil || len(m) != 1 || m["/"].Stats[0].Memory.WorkingSet == 0 {
		t.Errorf("ContainerInfoV2 = %v, %v", m, err)
	}
}
