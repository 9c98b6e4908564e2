// Package leftovers finds what Atoll has made on this host, by the marks it
// puts on everything: nothing of it should be there once clusters are down.
package leftovers

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// A Leftover is one thing that is there.
type Leftover struct {
	// Kind is process, link, namespace, mount, table, loop, cgroup or
	// directory.
	Kind string `json:"kind"`
	// Name is how the system calls it.
	Name string `json:"name"`
	// Detail may be empty.
	Detail string `json:"detail,omitempty"`
}

// A Scope restricts a search to one cluster. The zero Scope is the host.
type Scope struct {
	// IDs are 8 hex digits each: the cluster's, and those of its nodes.
	IDs []string
	// Paths are directories that are only that cluster's.
	Paths []string
}

func (s Scope) all() bool { return len(s.IDs) == 0 }

// mentions reports whether a text has a mark of the scope's cluster.
func (s Scope) mentions(text string) bool {
	return s.all() || slices.ContainsFunc(slices.Concat(s.IDs, s.Paths), func(p string) bool { return strings.Contains(text, p) })
}

// under reports whether path is at or below one of the scope's directories.
func (s Scope) under(path string) bool {
	return slices.ContainsFunc(s.Paths, func(p string) bool { return path == p || strings.HasPrefix(path, p+"/") })
}

// Find lists what is there. An error means that a kind could not be listed;
// the others are returned all the same.
func Find(s Scope) ([]Leftover, error) {
	var all []Leftover
	var errs []error
	for _, find := range []func(Scope) ([]Leftover, error){processes, links, namespaces, mounts, tables, loops, cgroups, directories} {
		found, err := find(s)
		all = append(all, found...)
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}

func processes(s Scope) ([]Leftover, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var found []Leftover
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(b) == 0 {
			continue // gone, or a kernel thread
		}
		argv := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
		if !ours(argv) {
			continue
		}
		// A VM's command line may name nothing but the VM; its cgroup then
		// says whose it is.
		groups, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		if pid := filepath.Base(dir); pid != strconv.Itoa(os.Getpid()) && s.mentions(string(b)+string(groups)) {
			found = append(found, Leftover{Kind: "process", Name: pid, Detail: shorten(strings.Join(argv, " "), 120)})
		}
	}
	return found, nil
}

// served is where the server of a pod's host directory has it mounted.
var served = regexp.MustCompile(`=/.*/vms/[^/]+/shares/[^/]+$`)

// ours recognises supervisors, controllers of namespaces, node agents, pod VMs
// and the servers of the host directories that those share.
func ours(argv []string) bool {
	switch filepath.Base(argv[0]) {
	case "atoll":
		return len(argv) > 1 && argv[1] == "supervisor"
	case "atoll-namespaces", "spherelet":
		return true
	case "virtiofsd":
		return slices.ContainsFunc(argv, served.MatchString)
	}
	i := slices.Index(argv, "-name")
	return strings.HasPrefix(filepath.Base(argv[0]), "qemu-system-") && i >= 0 && i+1 < len(argv) &&
		(strings.HasPrefix(argv[i+1], "atoll-") || strings.HasPrefix(argv[i+1], "guest=atoll-"))
}

func shorten(s string, n int) string {
	if len(s) > n {
		return s[:n] + "…"
	}
	return s
}

var linkName = regexp.MustCompile(`^(atoll0|atl[0-9a-f]{11})$`)

// links of this network namespace; those in others are gone with them.
func links(s Scope) ([]Leftover, error) {
	ifaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var found []Leftover
	for _, i := range ifaces {
		if !linkName.MatchString(i.Name) {
			continue
		}
		alias, _ := os.ReadFile(filepath.Join("/sys/class/net", i.Name, "ifalias"))
		if s.mentions(string(alias)) {
			found = append(found, Leftover{Kind: "link", Name: i.Name, Detail: strings.TrimSpace(string(alias))})
		}
	}
	return found, nil
}

func namespaces(s Scope) ([]Leftover, error) {
	entries, err := os.ReadDir("/run/netns")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var found []Leftover
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "atoll-") && s.mentions(e.Name()) {
			found = append(found, Leftover{Kind: "namespace", Name: e.Name()})
		}
	}
	return found, nil
}

func mounts(s Scope) ([]Leftover, error) {
	list, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var found []Leftover
	for _, m := range list {
		if s.under(m.Mountpoint) && !slices.Contains(s.Paths, m.Mountpoint) ||
			s.all() && strings.HasPrefix(m.Mountpoint, runDir+"/") {
			found = append(found, Leftover{Kind: "mount", Name: m.Mountpoint, Detail: m.FSType})
		}
	}
	return found, nil
}

// tables of nftables with our mark in this network namespace. A cluster's own
// are marked by name only, so they count for every scope.
func tables(Scope) ([]Leftover, error) {
	if _, err := exec.LookPath("nft"); errors.Is(err, exec.ErrNotFound) || os.Geteuid() != 0 {
		return nil, nil // without it there can be none of ours
	}
	out, err := exec.Command("nft", "list", "tables").Output()
	if err != nil {
		return nil, fmt.Errorf("list nftables: %w", err)
	}
	return parseTables(out), nil
}

func parseTables(out []byte) []Leftover {
	var found []Leftover
	for line := range bytes.Lines(out) {
		f := strings.Fields(string(line))
		if len(f) == 3 && f[0] == "table" && strings.HasPrefix(f[2], "atoll-") {
			found = append(found, Leftover{Kind: "table", Name: f[1] + " " + f[2]})
		}
	}
	return found
}

func loops(s Scope) ([]Leftover, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var found []Leftover
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		backing := strings.TrimSpace(string(b))
		if s.under(backing) || s.all() && strings.Contains(backing, "/atoll/") {
			found = append(found, Leftover{Kind: "loop", Name: strings.Split(file, "/")[3], Detail: backing})
		}
	}
	return found, nil
}

// CgroupRoots are the places where a cluster's group may be, in either
// version of cgroups.
func CgroupRoots() []string {
	roots, _ := filepath.Glob("/sys/fs/cgroup/*/atoll")
	if _, err := os.Stat("/sys/fs/cgroup/atoll"); err == nil {
		roots = append(roots, "/sys/fs/cgroup/atoll")
	}
	// Joint controllers have symbolic links beside the directory.
	var real []string
	for _, r := range roots {
		if p, err := filepath.EvalSymlinks(r); err == nil && !slices.Contains(real, p) {
			real = append(real, p)
		}
	}
	return real
}

func cgroups(s Scope) ([]Leftover, error) {
	var found []Leftover
	for _, root := range CgroupRoots() {
		dirs := []string{root}
		if !s.all() {
			dirs = nil
			for _, id := range s.IDs {
				dirs = append(dirs, filepath.Join(root, id))
			}
		}
		for _, dir := range dirs {
			if _, err := os.Stat(dir); err == nil {
				found = append(found, Leftover{Kind: "cgroup", Name: dir})
			}
		}
	}
	return found, nil
}

const runDir = "/run/atoll"

func directories(s Scope) ([]Leftover, error) {
	var found []Leftover
	if !s.all() {
		for _, p := range s.Paths {
			if strings.HasPrefix(p, runDir+"/") {
				if _, err := os.Stat(p); err == nil {
					found = append(found, Leftover{Kind: "directory", Name: p})
				}
			}
		}
		return found, nil
	}
	entries, err := os.ReadDir(runDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		found = append(found, Leftover{Kind: "directory", Name: filepath.Join(runDir, e.Name())})
	}
	return found, nil
}
