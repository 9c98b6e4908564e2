package podinit

import (
	"encoding/json"
	"fmt"
	"path"
	"sort"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// ociVersion is written into every spec. Debian 12's crun (1.8.1) takes 1.0.x
// alone; what later versions of the specification added it ignores.
const ociVersion = "1.0.2"

// A composition is what the guest adds to the host's OCI spec.
type composition struct {
	root      string // the mounted root file system
	readonly  bool
	cgroup    string // cgroupsPath
	terminal  bool
	sharedPID string // the pod's PID namespace, empty if containers have their own
	userns    string // the pod's user namespace, empty if it has none
	// containerPID returns the PID namespace of another container.
	containerPID func(id string) (string, error)
	binds        []bind // volumes and files of ours
	shm          string // the pod's /dev/shm
	devices      bool   // the kernel can restrict devices
	productUUID  string // file to be seen as the machine's UUID; empty: none is
}

// A bind is one mount of a directory or file of the guest into a container.
type bind struct {
	source, destination string
	readOnly            bool
	recursive           bool // read-only below it, too
	propagation         string
	// optional gives way to a mount that is there already.
	optional bool
}

// podNamespaces are those that the VM itself is: every container of the pod
// is in them.
var podNamespaces = map[specs.LinuxNamespaceType]bool{
	specs.NetworkNamespace: true, specs.IPCNamespace: true, specs.UTSNamespace: true, specs.TimeNamespace: true,
}

// compose makes the spec that crun gets. It returns the sysctls that the
// spec carried too: they are for the whole VM.
func compose(raw []byte, c composition) (*specs.Spec, map[string]string, error) {
	s := &specs.Spec{}
	if err := json.Unmarshal(raw, s); err != nil {
		return nil, nil, fmt.Errorf("OCI spec: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if s.Process == nil || len(s.Process.Args) == 0 {
		return nil, nil, fmt.Errorf("OCI spec: no command to run: %w", errdefs.ErrInvalidArgument)
	}
	if s.Hooks != nil {
		return nil, nil, fmt.Errorf("OCI spec: hooks would run on the host, which is not here: %w", errdefs.ErrInvalidArgument)
	}
	s.Version = ociVersion
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	s.Root = &specs.Root{Path: c.root, Readonly: c.readonly}
	s.Hostname, s.Domainname = "", ""
	completeProcess(s.Process, c.terminal)

	sysctls := s.Linux.Sysctl
	s.Linux.Sysctl = nil
	s.Linux.CgroupsPath = c.cgroup
	completeResources(s, c.devices)
	namespaces, err := c.namespaces(s.Linux.Namespaces)
	if err != nil {
		return nil, nil, err
	}
	s.Linux.Namespaces = namespaces
	if s.Mounts, err = c.mounts(s.Mounts); err != nil {
		return nil, nil, err
	}
	return s, sysctls, nil
}

// completeProcess sets what must not be inherited from PID 1.
func completeProcess(p *specs.Process, terminal bool) {
	p.Terminal = terminal
	if p.OOMScoreAdj == nil {
		zero := 0
		p.OOMScoreAdj = &zero
	}
	if p.Cwd == "" {
		p.Cwd = "/"
	}
}

// completeResources makes an OOM end the whole container, as the kubelet
// expects of cgroup v2.
func completeResources(s *specs.Spec, devices bool) {
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	r := s.Linux.Resources
	if r.Unified == nil {
		r.Unified = map[string]string{}
	}
	if _, ok := r.Unified["memory.oom.group"]; !ok {
		r.Unified["memory.oom.group"] = "1"
	}
	if !devices {
		r.Devices = nil
	}
	// Swap is nobody's in a pod VM; without the file crun would fail.
	if r.Memory != nil {
		r.Memory.Swap, r.Memory.Swappiness, r.Memory.Kernel, r.Memory.KernelTCP = nil, nil, nil, nil
	}
}

// targetPrefix in a PID namespace's path names another container of the pod.
const targetPrefix = "container:"

func (c composition) namespaces(in []specs.LinuxNamespace) ([]specs.LinuxNamespace, error) {
	out := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	if c.userns != "" {
		out = append(out, specs.LinuxNamespace{Type: specs.UserNamespace, Path: c.userns})
	}
	pid := specs.LinuxNamespace{Type: specs.PIDNamespace, Path: c.sharedPID}
	for _, ns := range in {
		switch {
		case ns.Type == specs.MountNamespace || podNamespaces[ns.Type]:
		case ns.Type == specs.PIDNamespace:
			if id, ok := strings.CutPrefix(ns.Path, targetPrefix); ok {
				p, err := c.containerPID(id)
				if err != nil {
					return nil, err
				}
				pid.Path = p
			}
		case ns.Path != "":
			return nil, fmt.Errorf("OCI spec: %s namespace %q is the host's: %w", ns.Type, ns.Path, errdefs.ErrInvalidArgument)
		default:
			out = append(out, ns)
		}
	}
	return append(out, pid), nil
}

// fileSystems are the types that a spec may mount; binds come from c alone.
var fileSystems = map[string]bool{
	"proc": true, "sysfs": true, "tmpfs": true, "devpts": true, "mqueue": true, "cgroup": true, "cgroup2": true,
}

func (c composition) mounts(in []specs.Mount) ([]specs.Mount, error) {
	taken := map[string]bool{}
	for _, b := range c.binds {
		if !b.optional {
			taken[path.Clean(b.destination)] = true
		}
	}
	var out []specs.Mount
	for _, m := range in {
		d := path.Clean(m.Destination)
		if !path.IsAbs(d) {
			return nil, fmt.Errorf("OCI spec: mount destination %q is not absolute: %w", m.Destination, errdefs.ErrInvalidArgument)
		}
		// What the host has under a path means nothing here: volumes come
		// with the request.
		if !fileSystems[m.Type] || taken[d] {
			continue
		}
		if d == "/dev/shm" && c.shm != "" {
			m = specs.Mount{Destination: d, Type: "bind", Source: c.shm, Options: []string{"rbind", "rprivate", "rw", "nosuid", "nodev", "noexec"}}
		}
		if c.userns != "" && (m.Type == "sysfs" || m.Type == "mqueue") {
			m = ofVM(m)
		}
		taken[d] = true
		out = append(out, m)
		if d == "/sys" && c.productUUID != "" {
			out = append(out, bind{source: c.productUUID, destination: productUUID, readOnly: true}.mount())
		}
	}
	for _, b := range c.binds {
		if b.optional && taken[path.Clean(b.destination)] {
			continue
		}
		taken[path.Clean(b.destination)] = true
		out = append(out, b.mount())
	}
	// Parents first; equals as they came.
	sort.SliceStable(out, func(i, j int) bool {
		return strings.Count(path.Clean(out[i].Destination), "/") < strings.Count(path.Clean(out[j].Destination), "/")
	})
	return out, nil
}

// ofVM binds the VM's instance of a file system that only the owner of its
// network or IPC namespace may mount.
func ofVM(m specs.Mount) specs.Mount {
	source := map[string]string{"sysfs": "/sys", "mqueue": "/dev/mqueue"}[m.Type]
	return specs.Mount{Destination: m.Destination, Type: "bind", Source: source, Options: append([]string{"rbind", "rprivate"}, m.Options...)}
}

func (b bind) mount() specs.Mount {
	access := "rw"
	if b.readOnly {
		access = "ro"
	}
	propagation := "rprivate"
	switch b.propagation {
	case "rslave", "rshared":
		propagation = b.propagation
	}
	options := []string{"rbind", propagation, access}
	if b.readOnly && b.recursive {
		options = append(options, "rro")
	}
	return specs.Mount{Destination: b.destination, Type: "bind", Source: b.source, Options: options}
}
