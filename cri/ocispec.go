package cri

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// defaultPath is what a container gets whose image says nothing, as
	// containerd and Docker have it.
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// openFiles is RLIMIT_NOFILE in containers: nr_open's default.
	openFiles = 1 << 20
	// targetPrefix in a PID namespace's path tells the agent which container's
	// processes to join (kubectl debug --target).
	targetPrefix = "container:"
)

// specInput is everything that a container's OCI spec is made from.
type specInput struct {
	id       string
	hostname string
	image    ocispec.ImageConfig
	config   *runtimeapi.ContainerConfig
	user     specs.User
	seccomp  *seccompChoice
}

// buildSpec composes the OCI runtime spec of a container inside the guest.
// Mounts of volumes are not part of it; the agent adds them.
func buildSpec(in specInput) (*specs.Spec, error) {
	args, err := processArgs(in.config, in.image)
	if err != nil {
		return nil, err
	}
	env := environment(in)
	if err := checkArguments("config.command, args and envs, with the image's", args, env); err != nil {
		return nil, err
	}
	sc := in.config.GetLinux().GetSecurityContext()
	opts := []oci.SpecOpts{
		oci.WithoutRunMount,
		oci.WithProcessArgs(args...),
		oci.WithProcessCwd(firstOf(in.config.GetWorkingDir(), in.image.WorkingDir, "/")),
		oci.WithEnv(env),
		withUser(in.user),
		withNamespaces(in),
		oci.WithNewPrivileges,
		withRlimits,
	}
	if in.config.GetTty() {
		opts = append(opts, oci.WithTTY)
	}
	caps, err := capabilities(sc)
	if err != nil {
		return nil, err
	}
	opts = append(opts, oci.WithCapabilities(caps), oci.WithAmbientCapabilities(nil), withResources(in.config.GetLinux().GetResources()))
	if sc != nil {
		// None means none: that is all that procMount Unmasked is here.
		opts = append(opts, oci.WithMaskedPaths(sc.MaskedPaths), oci.WithReadonlyPaths(sc.ReadonlyPaths))
	}
	if sc.GetPrivileged() {
		opts = append(opts,
			oci.WithCapabilities(cap.Known()), oci.WithMaskedPaths(nil), oci.WithReadonlyPaths(nil),
			oci.WithWriteableSysfs, oci.WithAllDevicesAllowed, withCgroupfs(true))
	} else {
		opts = append(opts, oci.WithDefaultUnixDevices, withCgroupfs(false))
		opts = append(opts, in.seccomp.opts()...)
	}
	if sc.GetNoNewPrivs() {
		opts = append(opts, oci.WithNoNewPrivileges)
	}
	if sc.GetReadonlyRootfs() {
		opts = append(opts, oci.WithRootFSReadonly())
	}
	ctx := namespaces.WithNamespace(context.Background(), RuntimeName)
	spec, err := oci.GenerateSpecWithPlatform(ctx, nil, "linux/"+runtime.GOARCH, &containers.Container{ID: in.id}, opts...)
	if err != nil {
		return nil, fmt.Errorf("compose the OCI spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	spec.Annotations = nil // those of pods could steer the guest's runtime
	return spec, nil
}

// processArgs follows Docker's and containerd's rule: a command replaces the
// image's entry point and command, arguments replace its command alone.
func processArgs(c *runtimeapi.ContainerConfig, image ocispec.ImageConfig) ([]string, error) {
	command, args := c.GetCommand(), c.GetArgs()
	if len(command) == 0 {
		if len(args) == 0 {
			args = image.Cmd
		}
		if len(image.Entrypoint) != 1 || image.Entrypoint[0] != "" {
			command = image.Entrypoint
		}
	}
	all := slices.Concat(command, args)
	if len(all) == 0 {
		return nil, refuse("config.command", "neither the pod nor the image names a command: set one")
	}
	return all, nil
}

// environment is the image's, overridden by the container's.
func environment(in specInput) []string {
	env := []string{defaultPath, "HOSTNAME=" + in.hostname}
	env = append(env, in.image.Env...)
	for _, e := range in.config.GetEnvs() {
		env = append(env, e.GetKey()+"="+string(e.GetValue()))
	}
	return lastWins(env)
}

// lastWins keeps the last value of each variable, in the place of the first.
func lastWins(env []string) []string {
	at := map[string]int{}
	var out []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if i, ok := at[name]; ok {
			out[i] = e
			continue
		}
		at[name] = len(out)
		out = append(out, e)
	}
	return out
}

func withUser(u specs.User) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		s.Process.User = u
		return nil
	}
}

// withNamespaces gives a container its own mounts and cgroup view. Its
// processes are its own, or the target's; where the pod shares them, the agent
// knows since SetupSandbox. Network, host name and IPC are the pod's, which are
// the guest's.
func withNamespaces(in specInput) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		pid := specs.LinuxNamespace{Type: specs.PIDNamespace}
		if o := in.config.GetLinux().GetSecurityContext().GetNamespaceOptions(); o.GetPid() == runtimeapi.NamespaceMode_TARGET {
			pid.Path = targetPrefix + o.GetTargetId()
		}
		s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}, pid}
		return nil
	}
}

func withRlimits(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
	s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: openFiles, Soft: openFiles}}
	return nil
}

// withCgroupfs shows the container its own part of the guest's cgroup tree.
func withCgroupfs(writable bool) oci.SpecOpts {
	options := []string{"nosuid", "noexec", "nodev", "relatime"}
	if !writable {
		options = append(options, "ro")
	}
	return oci.WithMounts([]specs.Mount{{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: options}})
}

// capabilities applies add and drop to containerd's default set; "ALL" is
// every capability that Linux has.
func capabilities(sc *runtimeapi.LinuxContainerSecurityContext) ([]string, error) {
	set := map[string]bool{}
	for _, c := range defaultCapabilities {
		set[c] = true
	}
	add, drop := sc.GetCapabilities().GetAddCapabilities(), sc.GetCapabilities().GetDropCapabilities()
	if len(sc.GetCapabilities().GetAddAmbientCapabilities()) > 0 {
		return nil, refuse("capabilities.add_ambient_capabilities", "not supported: use add_capabilities and run as root")
	}
	if hasAll(add) {
		for _, c := range cap.Known() {
			set[c] = true
		}
	}
	if hasAll(drop) {
		clear(set)
	}
	for _, c := range add {
		if name := capName(c); name != "CAP_ALL" {
			if !slices.Contains(cap.Known(), name) {
				return nil, refuse("capabilities.add_capabilities", fmt.Sprintf("%q is not a Linux capability", c))
			}
			set[name] = true
		}
	}
	for _, c := range drop {
		delete(set, capName(c))
	}
	var out []string
	for _, c := range cap.Known() { // in the kernel's order
		if set[c] {
			out = append(out, c)
		}
	}
	return out, nil
}

// defaultCapabilities is containerd's set (oci.defaultUnixCaps).
var defaultCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

func capName(c string) string {
	c = strings.ToUpper(c)
	if !strings.HasPrefix(c, "CAP_") {
		c = "CAP_" + c
	}
	return c
}

func hasAll(caps []string) bool {
	return slices.ContainsFunc(caps, func(c string) bool { return capName(c) == "CAP_ALL" })
}

// withResources sets the limits, with cgroup v2's meaning whatever the host
// runs: a container that exceeds its memory is killed as a whole.
func withResources(r *runtimeapi.LinuxContainerResources) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		limits, unified := linuxResources(r)
		if s.Linux.Resources != nil {
			limits.Devices = s.Linux.Resources.Devices
		}
		limits.Unified = unified
		s.Linux.Resources = limits
		if adj := int(r.GetOomScoreAdj()); adj != 0 {
			s.Process.OOMScoreAdj = &adj
		}
		return nil
	}
}

// linuxResources translates CRI's resources; zero values set nothing. Swap is
// left out: guests have none.
func linuxResources(r *runtimeapi.LinuxContainerResources) (*specs.LinuxResources, map[string]string) {
	out := &specs.LinuxResources{}
	cpu := &specs.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}
	if v := r.GetCpuShares(); v > 0 {
		u := uint64(v)
		cpu.Shares = &u
	}
	if v := r.GetCpuQuota(); v != 0 {
		cpu.Quota = &v
	}
	if v := r.GetCpuPeriod(); v > 0 {
		u := uint64(v)
		cpu.Period = &u
	}
	if cpu.Shares != nil || cpu.Quota != nil || cpu.Period != nil || cpu.Cpus != "" || cpu.Mems != "" {
		out.CPU = cpu
	}
	unified := map[string]string{}
	if v := r.GetMemoryLimitInBytes(); v > 0 {
		out.Memory = &specs.LinuxMemory{Limit: &v}
		unified["memory.oom.group"] = "1"
	}
	for k, v := range r.GetUnified() {
		unified[k] = v
	}
	return out, unified
}

// signalNames is filled by hand where CRI's names are not the kernel's.
var signalNames = map[string]string{"SIGCLD": "SIGCHLD", "SIGPOLL": "SIGIO", "SIGIOT": "SIGABRT"}
