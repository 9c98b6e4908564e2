package cri

import (
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// What a request may ask for. Beyond these nothing real is lost, and what is
// past them would fail late, in the guest or on the host, with an error that
// names no field.
const (
	// maxNameLength is the longest name that Kubernetes gives anything.
	maxNameLength = 253
	// maxPathLength is Linux's PATH_MAX, with the NUL.
	maxPathLength = 4096
	// maxArguments is what execve(2) takes of arguments and environment
	// together with Linux's default stack limit, and maxArgument of one of
	// them (MAX_ARG_STRLEN), in bytes.
	maxArguments = 2 << 20
	maxArgument  = 128 << 10
	// maxCPUs and maxMemory (bytes) are above any host's.
	maxCPUs   = 4096
	maxMemory = 1 << 46
	// maxPortMappings of one pod.
	maxPortMappings = 4096
)

var (
	// hostnamePattern is RFC 1123's, with the underscore that people use.
	hostnamePattern = regexp.MustCompile(`^[A-Za-z0-9_]([-A-Za-z0-9_.]{0,62}[A-Za-z0-9_])?$`)
	// sysctlPattern: names become paths below /proc/sys.
	sysctlPattern = regexp.MustCompile(`^[A-Za-z0-9_][-A-Za-z0-9_@:]*([./][A-Za-z0-9_][-A-Za-z0-9_@:]*)+$`)
	// unifiedPattern: keys become files of a cgroup.
	unifiedPattern = regexp.MustCompile(`^[a-z0-9_]+(\.[A-Za-z0-9_-]+)+$`)
	cpusetPattern  = regexp.MustCompile(`^[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*\n?$`)
)

// seconds turns a client's number of seconds into a duration; what is negative
// is none, and what does not fit is the longest there is.
func seconds(n int64) time.Duration {
	switch {
	case n <= 0:
		return 0
	case n > int64(math.MaxInt64/time.Second):
		return math.MaxInt64
	}
	return time.Duration(n) * time.Second
}

// checkText refuses what is longer than limit bytes or has control characters
// in it: such a text could break the lines of whatever it is written into.
func checkText(field, text string, limit int) error {
	if len(text) > limit {
		return refuse(field, fmt.Sprintf("%d bytes: at most %d are allowed", len(text), limit))
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return refuse(field, fmt.Sprintf("%.100q has control characters", text))
	}
	return nil
}

// checkHostPath wants an absolute path without "..", or nothing.
func checkHostPath(field, path string) error {
	if path == "" {
		return nil
	}
	if err := checkText(field, path, maxPathLength-1); err != nil {
		return err
	}
	if !filepath.IsAbs(path) || hasDotDot(path) {
		return refuse(field, fmt.Sprintf("%.200q: want an absolute path without \"..\"", path))
	}
	return nil
}

func hasDotDot(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// checkGuestPath wants a path that a container can have; empty is allowed.
func checkGuestPath(field, path string) error {
	if len(path) >= maxPathLength || strings.ContainsRune(path, 0) {
		return refuse(field, fmt.Sprintf("%.100q (%d bytes) is no path", path, len(path)))
	}
	return nil
}

// checkNet refuses a pod's names and ports that would do harm in the guest's
// files or on the host's network.
func checkNet(c *runtimeapi.PodSandboxConfig) error {
	if h := c.GetHostname(); h != "" && !hostnamePattern.MatchString(h) {
		return refuse("config.hostname", fmt.Sprintf("%.100q: want 1 to 64 letters, digits, '-' or '.'", h))
	}
	for _, s := range c.GetDnsConfig().GetServers() {
		if _, err := netip.ParseAddr(s); err != nil {
			return refuse("config.dns_config.servers", fmt.Sprintf("%.100q is not an IP address", s))
		}
	}
	for field, list := range map[string][]string{"searches": c.GetDnsConfig().GetSearches(), "options": c.GetDnsConfig().GetOptions()} {
		for _, s := range list {
			if err := checkText("config.dns_config."+field, s, maxNameLength+1); err != nil {
				return err
			}
			if strings.ContainsRune(s, ' ') || s == "" {
				return refuse("config.dns_config."+field, fmt.Sprintf("%.100q: want one word", s))
			}
		}
	}
	if n := len(c.GetPortMappings()); n > maxPortMappings {
		return refuse("config.port_mappings", fmt.Sprintf("%d of them: at most %d are allowed", n, maxPortMappings))
	}
	for _, m := range c.GetPortMappings() {
		if _, ok := runtimeapi.Protocol_name[int32(m.GetProtocol())]; !ok {
			return refuse("config.port_mappings", fmt.Sprintf("protocol %d is not known", m.GetProtocol()))
		}
	}
	return nil
}

func checkSysctls(sysctls map[string]string) error {
	for name, v := range sysctls {
		if len(name) > maxNameLength || !sysctlPattern.MatchString(name) {
			return refuse("config.linux.sysctls", fmt.Sprintf("%.100q is not the name of a sysctl", name))
		}
		if len(v) >= maxPathLength || strings.ContainsRune(v, 0) {
			return refuse("config.linux.sysctls", fmt.Sprintf("%s: a value of %d bytes, or with a NUL in it", name, len(v)))
		}
	}
	return nil
}

// checkResources refuses limits that no machine has.
func checkResources(field string, r *runtimeapi.LinuxContainerResources) error {
	for _, f := range []struct {
		name     string
		v        int64
		min, max int64
	}{
		{"cpu_period", r.GetCpuPeriod(), 0, 1e6},
		{"cpu_quota", r.GetCpuQuota(), -1, maxCPUs * 1e6},
		{"cpu_shares", r.GetCpuShares(), 0, 1 << 32},
		{"memory_limit_in_bytes", r.GetMemoryLimitInBytes(), -1, maxMemory},
		{"memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), -1, 2 * maxMemory},
		{"oom_score_adj", r.GetOomScoreAdj(), -1000, 1000},
	} {
		if f.v < f.min || f.v > f.max {
			return refuse(field+"."+f.name, fmt.Sprintf("%d: want %d to %d", f.v, f.min, f.max))
		}
	}
	if q, p := r.GetCpuQuota(), r.GetCpuPeriod(); p > 0 && q > p*maxCPUs {
		return refuse(field+".cpu_quota", fmt.Sprintf("%d in %d is more than %d CPUs", q, p, maxCPUs))
	}
	for name, set := range map[string]string{"cpuset_cpus": r.GetCpusetCpus(), "cpuset_mems": r.GetCpusetMems()} {
		if set != "" && (len(set) >= maxPathLength || !cpusetPattern.MatchString(set)) {
			return refuse(field+"."+name, fmt.Sprintf("%.100q: want a list such as 0-2,4", set))
		}
	}
	for k, v := range r.GetUnified() {
		if len(k) > maxNameLength || !unifiedPattern.MatchString(k) {
			return refuse(field+".unified", fmt.Sprintf("%.100q is not the name of a cgroup file", k))
		}
		if len(v) >= maxPathLength || strings.ContainsRune(v, 0) {
			return refuse(field+".unified", fmt.Sprintf("%s: a value of %d bytes, or with a NUL in it", k, len(v)))
		}
	}
	return nil
}

// checkArguments holds a command, or an environment, against what Linux takes.
func checkArguments(field string, lists ...[]string) error {
	total := 0
	for _, list := range lists {
		for _, s := range list {
			if strings.ContainsRune(s, 0) {
				return refuse(field, fmt.Sprintf("%.100q has a NUL in it", s))
			}
			if len(s) >= maxArgument {
				return refuse(field, fmt.Sprintf("%.40q… has %d bytes: Linux takes less than %d KiB in one: put it into a ConfigMap that is mounted", s, len(s), maxArgument>>10))
			}
			total += len(s) + 1 + 8 // the NUL and the pointer
		}
	}
	if total > maxArguments {
		return refuse(field, fmt.Sprintf("command and environment have %d bytes: Linux takes %d MiB together: put what is large into a ConfigMap that is mounted", total, maxArguments>>20))
	}
	return nil
}

// checkEnvironment looks at the names; sizes are counted with the image's.
func checkEnvironment(envs []*runtimeapi.KeyValue) error {
	for _, e := range envs {
		if e.GetKey() == "" || strings.ContainsAny(e.GetKey(), "=\x00") {
			return refuse("config.envs", fmt.Sprintf("%.100q is not the name of a variable", e.GetKey()))
		}
	}
	return nil
}

// What is kept of a guest's answers. They are its own words: a pod must not
// be able to fill the answers to lists of all pods, which have one limit.
const (
	maxGuestFeatures   = 64
	maxGuestInterfaces = 32
	maxGuestWord       = 64
)

// guestFeatures keeps what can be features.
func guestFeatures(list []string) []string {
	var out []string
	for _, f := range list[:min(len(list), maxGuestFeatures)] {
		if len(f) <= maxGuestWord {
			out = append(out, f)
		}
	}
	return out
}

// guestNetworks keeps what can be interfaces.
func guestNetworks(list []*agentapi.NetworkStats) []*agentapi.NetworkStats {
	var out []*agentapi.NetworkStats
	for _, n := range list[:min(len(list), maxGuestInterfaces)] {
		if len(n.GetName()) <= maxGuestWord {
			out = append(out, n)
		}
	}
	return out
}

// guestClock reads a time of the guest's clock, which is the guest's: what it
// calls later than now is now.
func guestClock(ns int64) time.Time {
	t, now := time.Unix(0, ns), time.Now()
	if t.After(now) {
		return now
	}
	return t
}
