package podinit

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	cgroupRoot = "/sys/fs/cgroup"
	// podCgroup holds one cgroup a container.
	podCgroup = cgroupRoot + "/atoll"
)

// enableControllers gives a cgroup's children what this kernel has.
func enableControllers(dir string) {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	for _, c := range strings.Fields(string(b)) {
		// One that cannot be (such as cpu beside real-time tasks) must not
		// keep the others away.
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

func writeCgroup(dir, file, value string) error {
	err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0)
	if err != nil {
		return fmt.Errorf("cgroup %s %s=%q: %w", filepath.Base(dir), file, value, err)
	}
	return nil
}

// killCgroup ends every process in a cgroup and below it.
func killCgroup(dir string) error { return writeCgroup(dir, "cgroup.kill", "1") }

// signalCgroup signals every process in a cgroup and below it.
func signalCgroup(dir string, sig unix.Signal) error {
	if sig == unix.SIGKILL {
		return killCgroup(dir)
	}
	return filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil {
			return err
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				_ = unix.Kill(pid, sig)
			}
		}
		return nil
	})
}

// removeCgroup removes a cgroup and those that a container made in it.
func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			dirs = append(dirs, p)
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if rerr := unix.Rmdir(dirs[i]); rerr != nil && !errors.Is(rerr, unix.ENOENT) {
			return fmt.Errorf("remove cgroup %s: %w", dirs[i], rerr)
		}
	}
	return err
}

// flatKeyed reads a cgroup file of "key value" lines.
func flatKeyed(dir, file string) map[string]uint64 {
	out := map[string]uint64{}
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return out
	}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		if key, value, ok := strings.Cut(sc.Text(), " "); ok {
			if n, err := strconv.ParseUint(value, 10, 64); err == nil {
				out[key] = n
			}
		}
	}
	return out
}

// single reads a cgroup file of one number; "max" is 0.
func single(dir, file string) uint64 {
	b, _ := os.ReadFile(filepath.Join(dir, file))
	n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n
}

// oomKills counts the processes that an OOM killer, the cgroup's or the
// machine's, took from a cgroup.
func oomKills(dir string) uint64 { return flatKeyed(dir, "memory.events")["oom_kill"] }

// UpdateContainer applies OCI resources to a running container.
func (a *agent) UpdateContainer(_ context.Context, r *agentapi.UpdateContainerRequest) (*agentapi.UpdateContainerResponse, error) {
	c, err := a.container(r.Id)
	if err != nil {
		return nil, err
	}
	var res specs.LinuxResources
	if len(r.Resources) > 0 {
		if err := json.Unmarshal(r.Resources, &res); err != nil {
			return nil, fmt.Errorf("OCI resources: %v: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	values, err := cgroupValues(&res, r.Unified)
	if err != nil {
		return nil, err
	}
	if !c.main.running() {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	if err := checkShrink(cgroupStats(c.cgroup), values); err != nil {
		return nil, fmt.Errorf("update container %s: %w", c.id, err)
	}
	for _, v := range values {
		if err := writeCgroup(c.cgroup, v.file, v.value); err != nil {
			return nil, fmt.Errorf("update container %s: %w", c.id, err)
		}
	}
	return &agentapi.UpdateContainerResponse{}, nil
}

// checkShrink refuses a memory limit that would have the kernel kill the
// container at once. What files keep in memory does not count: it can go.
func checkShrink(s *agentapi.ContainerStats, values []cgroupValue) error {
	for _, v := range values {
		if v.file != "memory.max" {
			continue
		}
		limit, err := strconv.ParseUint(v.value, 10, 64)
		if err == nil && limit < s.MemoryWorkingSet && (s.MemoryLimit == 0 || limit < s.MemoryLimit) {
			return fmt.Errorf("it uses %d MiB of memory, and a limit of %d MiB would kill it: free memory in the container, or restart it with the smaller limit: %w",
				s.MemoryWorkingSet>>20, limit>>20, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

type cgroupValue struct{ file, value string }

// cgroupValues converts OCI resources, which speak cgroup v1, to v2 files.
// What is unset is left as it is.
func cgroupValues(r *specs.LinuxResources, unified map[string]string) ([]cgroupValue, error) {
	var out []cgroupValue
	add := func(file, value string) { out = append(out, cgroupValue{file, value}) }
	limit := func(n int64) string {
		if n < 0 {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	if c := r.CPU; c != nil {
		if c.Shares != nil && *c.Shares > 0 {
			add("cpu.weight", strconv.FormatUint(weightOfShares(*c.Shares), 10))
		}
		if c.Quota != nil || c.Period != nil {
			quota, period := "max", uint64(100_000)
			if c.Quota != nil && *c.Quota > 0 {
				quota = strconv.FormatInt(*c.Quota, 10)
			}
			if c.Period != nil && *c.Period > 0 {
				period = *c.Period
			}
			add("cpu.max", quota+" "+strconv.FormatUint(period, 10))
		}
		if c.Cpus != "" {
			add("cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			add("cpuset.mems", c.Mems)
		}
	}
	if m := r.Memory; m != nil {
		if m.Reservation != nil {
			add("memory.low", limit(*m.Reservation))
		}
		if m.Limit != nil && *m.Limit != 0 {
			add("memory.max", limit(*m.Limit))
		}
	}
	if r.Pids != nil && r.Pids.Limit != nil && *r.Pids.Limit != 0 {
		add("pids.max", limit(*r.Pids.Limit))
	}
	for _, set := range []map[string]string{r.Unified, unified} {
		for file, value := range set {
			if strings.ContainsRune(file, '/') || !strings.Contains(file, ".") || strings.HasPrefix(file, "cgroup.") {
				return nil, fmt.Errorf("cgroup file %q: %w", file, errdefs.ErrInvalidArgument)
			}
			add(file, value)
		}
	}
	return out, nil
}

// weightOfShares maps 2…262144 to 1…10000 as crun and runc do, so that an
// update gives what a start gave.
func weightOfShares(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}
