package podinit

import (
	"bufio"
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// Stats reads what the kernel counts. Only what directories without a quota
// project hold has to be walked for; see usageCache.
func (a *agent) Stats(_ context.Context, r *agentapi.StatsRequest) (*agentapi.StatsResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	for _, id := range r.ContainerIds {
		wanted[id] = true
	}
	a.mu.Lock()
	var containers []*container
	for id, c := range a.containers {
		if len(wanted) == 0 || wanted[id] {
			containers = append(containers, c)
		}
	}
	var volumes []*volume
	for _, v := range a.volumes {
		volumes = append(volumes, v)
	}
	interfaces := a.interfaces
	a.mu.Unlock()

	resp := &agentapi.StatsResponse{TimeNs: time.Now().UnixNano()}
	for _, c := range containers {
		s := cgroupStats(c.cgroup)
		s.Id = c.id
		s.Writable = statfs(c.disk)
		a.usage.fill(s.Writable, filepath.Join(c.disk, "upper"))
		resp.Containers = append(resp.Containers, s)
	}
	for _, v := range volumes {
		resp.Volumes = append(resp.Volumes, &agentapi.VolumeStats{Id: v.id, Usage: a.volumeStats(v)})
	}
	resp.Networks = networkStats(interfaces)
	resp.Ephemeral = statfs(a.places.disk)
	info := memInfo()
	resp.MemoryTotal, resp.MemoryAvailable = info["MemTotal"], info["MemAvailable"]
	resp.Guest = guestStats(info)
	return resp, nil
}

func (a *agent) volumeStats(v *volume) *agentapi.FilesystemStats {
	if v.disk != nil && v.disk.request.Block {
		size, _ := deviceBytes(v.disk.device)
		return &agentapi.FilesystemStats{CapacityBytes: uint64(size)}
	}
	u := statfs(v.root)
	if v.kind != agentapi.AddVolumeRequest_TMPFS && v.disk == nil { // those are all the volume's
		a.usage.fill(u, v.root)
	}
	return u
}

// cgroupStats reads one container's cgroup; the working set is the kubelet's:
// what is in use without file pages that are not active.
func cgroupStats(dir string) *agentapi.ContainerStats {
	mem := flatKeyed(dir, "memory.stat")
	s := &agentapi.ContainerStats{
		CpuUsageNs:      flatKeyed(dir, "cpu.stat")["usage_usec"] * 1000,
		MemoryCurrent:   single(dir, "memory.current"),
		MemoryRss:       mem["anon"],
		MemoryLimit:     single(dir, "memory.max"),
		PageFaults:      mem["pgfault"],
		MajorPageFaults: mem["pgmajfault"],
		Pids:            single(dir, "pids.current"),
		Swap:            single(dir, "memory.swap.current"),
		OomKills:        oomKills(dir),
	}
	s.MemoryWorkingSet = s.MemoryCurrent - min(s.MemoryCurrent, mem["inactive_file"])
	return s
}

// guestStats is the whole machine: the root cgroup has cpu.stat and
// memory.stat, but no memory.current.
func guestStats(info map[string]uint64) *agentapi.ContainerStats {
	mem := flatKeyed(cgroupRoot, "memory.stat")
	s := &agentapi.ContainerStats{
		CpuUsageNs:      flatKeyed(cgroupRoot, "cpu.stat")["usage_usec"] * 1000,
		MemoryCurrent:   info["MemTotal"] - min(info["MemTotal"], info["MemFree"]),
		MemoryRss:       mem["anon"],
		MemoryLimit:     info["MemTotal"],
		PageFaults:      mem["pgfault"],
		MajorPageFaults: mem["pgmajfault"],
		Swap:            info["SwapTotal"] - min(info["SwapTotal"], info["SwapFree"]),
	}
	s.MemoryWorkingSet = s.MemoryCurrent - min(s.MemoryCurrent, mem["inactive_file"])
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		if f := strings.Fields(string(b)); len(f) > 3 {
			_, all, _ := strings.Cut(f[3], "/")
			s.Pids, _ = strconv.ParseUint(all, 10, 64)
		}
	}
	return s
}

// memInfo is /proc/meminfo in bytes.
func memInfo() map[string]uint64 {
	out := map[string]uint64{}
	b, _ := os.ReadFile("/proc/meminfo")
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		if f := strings.Fields(sc.Text()); len(f) >= 2 {
			n, _ := strconv.ParseUint(f[1], 10, 64)
			out[strings.TrimSuffix(f[0], ":")] = n << 10
		}
	}
	return out
}

// statfs is the whole file system on which dir is.
func statfs(dir string) *agentapi.FilesystemStats {
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) != nil {
		return &agentapi.FilesystemStats{}
	}
	return &agentapi.FilesystemStats{
		UsedBytes: (s.Blocks - s.Bfree) * uint64(s.Bsize), UsedInodes: s.Files - s.Ffree,
		CapacityBytes: s.Blocks * uint64(s.Bsize), AvailableBytes: s.Bavail * uint64(s.Bsize), Inodes: s.Files, InodesFree: s.Ffree,
	}
}

// networkStats reads /proc/net/dev, the pod's interfaces alone.
func networkStats(interfaces map[string]bool) []*agentapi.NetworkStats {
	b, _ := os.ReadFile("/proc/net/dev")
	var out []*agentapi.NetworkStats
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		name, rest, ok := strings.Cut(sc.Text(), ":")
		f := strings.Fields(rest)
		if name = strings.TrimSpace(name); !ok || !interfaces[name] || len(f) < 11 {
			continue
		}
		n := make([]uint64, len(f))
		for i := range f {
			n[i], _ = strconv.ParseUint(f[i], 10, 64)
		}
		out = append(out, &agentapi.NetworkStats{
			Name: name, RxBytes: n[0], RxPackets: n[1], RxErrors: n[2], TxBytes: n[8], TxPackets: n[9], TxErrors: n[10],
		})
	}
	return out
}

const (
	// usageFresh is how long a walk's result serves; a walk may take a tenth
	// of the time at most.
	usageFresh = 10 * time.Second
	// maxWalk bounds one walk; a tree with more entries is under-counted
	// rather than walked for minutes.
	maxWalk = 500_000
)

// usageCache remembers what directories hold that have no project.
type usageCache struct {
	projects projects

	mu   sync.Mutex
	dirs map[string]usageEntry
}

type usageEntry struct {
	bytes, inodes uint64
	until         time.Time
}

func newUsageCache() *usageCache {
	return &usageCache{projects: projects{of: map[string]project{}}, dirs: map[string]usageEntry{}}
}

// fill sets what is used below dir.
func (u *usageCache) fill(s *agentapi.FilesystemStats, dir string) {
	if bytes, inodes, ok := u.projects.usage(dir); ok {
		s.UsedBytes, s.UsedInodes = bytes, inodes
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	e, ok := u.dirs[dir]
	if !ok || now.After(e.until) {
		for old, e := range u.dirs { // the directories of removed containers
			if now.After(e.until.Add(time.Minute)) {
				delete(u.dirs, old)
			}
		}
		e.bytes, e.inodes = walkUsage(dir)
		e.until = time.Now().Add(max(usageFresh, 10*time.Since(now)))
		u.dirs[dir] = e
	}
	s.UsedBytes, s.UsedInodes = e.bytes, e.inodes
}

// walkUsage sums the blocks of everything below dir on its file system; a
// file with several links counts once.
func walkUsage(dir string) (bytes, inodes uint64) {
	var top unix.Stat_t
	if unix.Lstat(dir, &top) != nil {
		return 0, 0
	}
	seen := map[uint64]bool{}
	_ = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err != nil || unix.Lstat(p, &st) != nil {
			return nil // removed meanwhile
		}
		if st.Dev != top.Dev {
			if e.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if st.Nlink > 1 && !e.IsDir() {
			if seen[st.Ino] {
				return nil
			}
			seen[st.Ino] = true
		}
		bytes += uint64(st.Blocks) * 512
		if inodes++; inodes >= maxWalk {
			return fs.SkipAll
		}
		return nil
	})
	return bytes, inodes
}
