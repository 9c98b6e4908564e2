package machine

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	cadvisor "github.com/google/cadvisor/info/v1"
)

// cpuTimes are CPU times of all CPUs since boot, in nanoseconds.
type cpuTimes struct{ user, system uint64 }

func (c cpuTimes) total() uint64 { return c.user + c.system }

// nanosecondsPerTick: the kernel tells times in USER_HZ, 100 on every Linux.
const nanosecondsPerTick = uint64(time.Second / 100)

// cpuTimes reads /proc/stat: user, nice, system, idle, iowait, irq, softirq.
// Time that guests use is part of user time. Stolen time is not use.
func (h *Host) cpuTimes() (cpuTimes, error) {
	b, err := os.ReadFile(h.path("proc/stat"))
	if err != nil {
		return cpuTimes{}, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 8 || f[0] != "cpu" {
			continue
		}
		var v [7]uint64
		for i := range v {
			if v[i], err = strconv.ParseUint(f[i+1], 10, 64); err != nil {
				return cpuTimes{}, fmt.Errorf("/proc/stat: %w", err)
			}
		}
		return cpuTimes{user: (v[0] + v[1]) * nanosecondsPerTick, system: (v[2] + v[5] + v[6]) * nanosecondsPerTick}, nil
	}
	return cpuTimes{}, fmt.Errorf("/proc/stat has no line for all CPUs")
}

// meminfo reads /proc/meminfo into bytes.
func (h *Host) meminfo() (map[string]uint64, error) {
	b, err := os.ReadFile(h.path("proc/meminfo"))
	if err != nil {
		return nil, err
	}
	m := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		if !ok || len(f) == 0 {
			continue
		}
		n, err := strconv.ParseUint(f[0], 10, 64)
		if err != nil {
			continue
		}
		if len(f) > 1 && f[1] == "kB" {
			n *= 1024
		}
		m[name] = n
	}
	if m["MemTotal"] == 0 {
		return nil, fmt.Errorf("/proc/meminfo has no MemTotal")
	}
	return m, nil
}

// pairs reads a file of "name number" lines; what cannot be read is missing.
func (h *Host) pairs(name string) map[string]uint64 {
	b, _ := os.ReadFile(h.path(name))
	m := map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 {
			if n, err := strconv.ParseUint(f[1], 10, 64); err == nil {
				m[f[0]] = n
			}
		}
	}
	return m
}

// interfaces reads /proc/net/dev of this process's network namespace, without
// loopback and the pods' taps (which the pods' own figures tell).
func (h *Host) interfaces() []cadvisor.InterfaceStats {
	b, err := os.ReadFile(h.path("proc/self/net/dev"))
	if err != nil {
		return nil
	}
	var out []cadvisor.InterfaceStats
	for line := range strings.Lines(string(b)) {
		name, rest, ok := strings.Cut(line, ":")
		f := strings.Fields(rest)
		name = strings.TrimSpace(name)
		if !ok || len(f) < 12 || name == "lo" || strings.HasPrefix(name, "atl") {
			continue
		}
		n := func(i int) uint64 { v, _ := strconv.ParseUint(f[i], 10, 64); return v }
		out = append(out, cadvisor.InterfaceStats{Name: name,
			RxBytes: n(0), RxPackets: n(1), RxErrors: n(2), RxDropped: n(3),
			TxBytes: n(8), TxPackets: n(9), TxErrors: n(10), TxDropped: n(11)})
	}
	return out
}

// processes counts what runs or waits on the host.
func (h *Host) processes() uint64 {
	b, _ := os.ReadFile(h.path("proc/loadavg"))
	f := strings.Fields(string(b))
	if len(f) < 4 {
		return 0
	}
	_, all, _ := strings.Cut(f[3], "/")
	n, _ := strconv.ParseUint(all, 10, 64)
	return n
}

func (h *Host) bootTime() time.Time {
	b, _ := os.ReadFile(h.path("proc/stat"))
	for line := range strings.Lines(string(b)) {
		if s, ok := strings.CutPrefix(line, "btime "); ok {
			if n, err := strconv.ParseInt(strings.TrimSpace(s), 10, 64); err == nil {
				return time.Unix(n, 0)
			}
		}
	}
	return time.Time{}
}

func (h *Host) line(name string) (string, error) {
	b, err := os.ReadFile(h.path(name))
	return strings.TrimSpace(string(b)), err
}

// cpuinfo is a value of the first CPU.
func (h *Host) cpuinfo(key string) string {
	b, _ := os.ReadFile(h.path("proc/cpuinfo"))
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func (h *Host) osRelease() string {
	b, err := os.ReadFile(h.path("etc/os-release"))
	if err != nil {
		b, _ = os.ReadFile(h.path("usr/lib/os-release"))
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(strings.TrimSpace(v), `"'`)
		}
	}
	return "Linux"
}
