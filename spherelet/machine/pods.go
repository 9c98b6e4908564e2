package machine

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	cadvisor "github.com/google/cadvisor/info/v1"
	cadvisorv2 "github.com/google/cadvisor/info/v2"
)

const cgroupMount = "sys/fs/cgroup"

// pods reads what the cgroup of all pod VMs uses, in version 2 or version 1.
// While there is no VM there is no group: nothing is used.
func (h *Host) pods() (map[string]cadvisorv2.ContainerInfo, error) {
	mem, err := h.meminfo()
	if err != nil {
		return nil, err
	}
	stats := &cadvisorv2.ContainerStats{Timestamp: h.now(), Cpu: &cadvisor.CpuStats{}}
	unified := filepath.Join(cgroupMount, h.podsCgroup)
	if _, err := os.Stat(h.path(filepath.Join(unified, "memory.current"))); err == nil {
		cpu := h.pairs(filepath.Join(unified, "cpu.stat"))
		stats.Cpu.Usage.Total = cpu["usage_usec"] * 1000
		stats.Memory = groupMemory(h.number(filepath.Join(unified, "memory.current")),
			h.pairs(filepath.Join(unified, "memory.stat")), "anon", "file", "inactive_file")
	} else {
		group := filepath.Join(cgroupMount, "memory", h.podsCgroup)
		stats.Cpu.Usage.Total = h.number(filepath.Join(cgroupMount, "cpuacct", h.podsCgroup, "cpuacct.usage"))
		stats.Memory = groupMemory(h.number(filepath.Join(group, "memory.usage_in_bytes")),
			h.pairs(filepath.Join(group, "memory.stat")), "total_rss", "total_cache", "total_inactive_file")
	}
	spec := cadvisorv2.ContainerSpec{CreationTime: h.bootTime(), HasCpu: true, HasMemory: true}
	spec.Memory.Limit = mem["MemTotal"]
	return map[string]cadvisorv2.ContainerInfo{h.PodsContainer(): {Spec: spec, Stats: []*cadvisorv2.ContainerStats{stats}}}, nil
}

func groupMemory(usage uint64, stat map[string]uint64, rss, cache, inactive string) *cadvisor.MemoryStats {
	m := &cadvisor.MemoryStats{Usage: usage, RSS: stat[rss], Cache: stat[cache]}
	m.WorkingSet = usage - min(stat[inactive], usage)
	m.ContainerData.Pgfault, m.ContainerData.Pgmajfault = stat["pgfault"], stat["pgmajfault"]
	return m
}

// number reads a file with one number; 0 if it cannot be read.
func (h *Host) number(name string) uint64 {
	s, _ := h.line(name)
	n, _ := strconv.ParseUint(strings.TrimSpace(s), 10, 64)
	return n
}
