package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A hierarchy is one mounted cgroup tree that can account VMs.
type hierarchy struct {
	root        string // where it is mounted
	unified     bool   // version 2
	controllers []string
}

// wanted are the controllers that a VM is accounted and limited by. cpuacct
// exists in version 1 only, where it tells the CPU time.
var wantedControllers = []string{"memory", "cpu", "pids"}

// hierarchies returns the trees below mount (/sys/fs/cgroup) that have what
// we want: the unified one if it has the memory controller, else version 1's.
func hierarchies(mount string) []hierarchy {
	if b, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers")); err == nil {
		have := strings.Fields(string(b))
		if slices.Contains(have, "memory") {
			return []hierarchy{{root: mount, unified: true, controllers: have}}
		}
		return nil
	}
	var hs []hierarchy
	for _, c := range append(wantedControllers, "cpuacct") {
		root := filepath.Join(mount, c)
		var st unix.Statfs_t
		if unix.Statfs(root, &st) != nil || st.Type != unix.CGROUP_SUPER_MAGIC {
			continue
		}
		real, err := filepath.EvalSymlinks(root) // cpu → cpu,cpuacct
		if err != nil || slices.ContainsFunc(hs, func(h hierarchy) bool { return h.root == real }) {
			continue
		}
		hs = append(hs, hierarchy{root: real, controllers: strings.Split(filepath.Base(real), ",")})
	}
	return hs
}

// limits of one VM.
type limits struct {
	memory int64 // bytes, RAM and overhead
	cpus   int
	idle   bool // all of its pool gives way to the other pools
}

// maxVMMThreads bounds QEMU's threads: one a vCPU, up to 64 for disk I/O,
// and a few of its own.
func maxVMMThreads(cpus int) int { return cpus + 128 }

// createCgroups makes the group rel in every hierarchy and sets the limits.
// It returns the directories made, also with an error.
func createCgroups(hs []hierarchy, rel string, l limits) ([]string, error) {
	var dirs []string
	for _, h := range hs {
		dir := filepath.Join(h.root, rel)
		if h.unified {
			if err := delegate(h.root, rel); err != nil {
				return dirs, err
			}
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return dirs, err
		}
		dirs = append(dirs, dir)
		if err := h.weigh(rel, runtime.NumCPU(), l.idle); err != nil {
			return dirs, err
		}
		if err := h.limit(dir, l); err != nil {
			return dirs, err
		}
	}
	return dirs, nil
}

// limit sets the limits of one group.
func (h hierarchy) limit(dir string, l limits) error {
	for file, value := range h.settings(l) {
		if err := writeControl(filepath.Join(dir, file), value); err != nil {
			return err
		}
	}
	return nil
}

// weigh gives the groups above rel the weight of all the host's CPUs, as the
// kubelet does with its own: by default all VMs of a host together would weigh
// as much as a single process outside. An idle pool, the lowest of the groups,
// gets the least weight that there is.
func (h hierarchy) weigh(rel string, cpus int, idle bool) error {
	if !slices.Contains(h.controllers, "cpu") {
		return nil
	}
	pool := filepath.Dir(rel)
	for up := pool; up != "."; up = filepath.Dir(up) {
		file, value := h.weight(cpus)
		if idle && up == pool {
			file, value = h.weight(0)
		}
		if err := writeControl(filepath.Join(h.root, up, file), value); err != nil {
			return err
		}
	}
	return nil
}

// weight returns the control file and the value that stand for so many CPUs, or
// for the least.
func (h hierarchy) weight(cpus int) (file, value string) {
	if h.unified {
		return "cpu.weight", strconv.Itoa(max(1, min(100*cpus, 10000)))
	}
	return "cpu.shares", strconv.Itoa(max(2, min(1024*cpus, 262144)))
}

// settings returns control files and values.
func (h hierarchy) settings(l limits) map[string]string {
	m := map[string]string{}
	has := func(c string) bool { return slices.Contains(h.controllers, c) }
	pids := strconv.Itoa(maxVMMThreads(l.cpus))
	if h.unified {
		m["memory.max"] = strconv.FormatInt(l.memory, 10)
		if has("cpu") {
			file, value := h.weight(l.cpus)
			m[file] = value
		}
		if has("pids") {
			m["pids.max"] = pids
		}
		return m
	}
	if has("memory") {
		m["memory.limit_in_bytes"] = strconv.FormatInt(l.memory, 10)
	}
	if has("cpu") {
		file, value := h.weight(l.cpus)
		m[file] = value
	}
	if has("pids") {
		m["pids.max"] = pids
	}
	return m
}

// delegate turns the wanted controllers on in every ancestor of rel.
func delegate(root, rel string) error {
	dir := root
	for _, part := range strings.Split(rel, "/") {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		if err != nil {
			return err
		}
		for _, c := range wantedControllers {
			if slices.Contains(strings.Fields(string(b)), c) {
				if err := writeControl(filepath.Join(dir, "cgroup.subtree_control"), "+"+c); err != nil {
					return err
				}
			}
		}
		dir = filepath.Join(dir, part)
	}
	return nil
}

// writeControl writes an existing control file.
func writeControl(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %s to %s: %w", path, value, err)
	}
	return nil
}

// enterCgroups moves a process with all its threads.
func enterCgroups(dirs []string, pid int) error {
	for _, dir := range dirs {
		if err := writeControl(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroups removes a VM's groups, and those of its pool once nothing else
// is in there; the topmost one, which all VMs share, stays.
func removeCgroups(dirs []string, top string) error {
	var errs error
	for _, dir := range dirs {
		if err := removeCgroup(dir); err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		for up := filepath.Dir(dir); strings.Contains(up, "/"+top+"/"); up = filepath.Dir(up) {
			if os.Remove(up) != nil { // in use by others
				break
			}
		}
	}
	return errs
}

// removeCgroup removes one group. A killed process keeps its group busy until
// its last thread is gone, which a large VM's memory delays: so for a while.
func removeCgroup(dir string) error {
	var err error
	for range 100 {
		err = os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// oomKills tells how many processes the host's OOM killer took from a VM's
// groups.
func oomKills(dirs []string) uint64 {
	for _, dir := range dirs {
		for _, file := range []string{"memory.events", "memory.oom_control"} {
			if n, ok := controlValue(filepath.Join(dir, file), "oom_kill"); ok {
				return n
			}
		}
	}
	return 0
}

// cgroupCPU is the CPU time used by a VM's groups in nanoseconds.
func cgroupCPU(dirs []string) (uint64, bool) {
	for _, dir := range dirs {
		if b, err := os.ReadFile(filepath.Join(dir, "cpuacct.usage")); err == nil {
			if n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil {
				return n, true
			}
		}
		if us, ok := controlValue(filepath.Join(dir, "cpu.stat"), "usage_usec"); ok {
			return us * 1000, true
		}
	}
	return 0, false
}

// controlValue reads one "key value" line of a control file.
func controlValue(path, key string) (uint64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 2 && f[0] == key {
			n, err := strconv.ParseUint(f[1], 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
