package podinit

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// errNoDevice is what waiting for a device ends with.
var errNoDevice = errdefs.ErrUnavailable

// places are the directories of the agent; see doc.go.
type places struct {
	run, disk, etc, volumes, images, bundles, crun string
}

func layoutAt(run string) places {
	at := func(name string) string { return filepath.Join(run, name) }
	return places{run: run, disk: at("disk"), etc: at("etc"), volumes: at("v"), images: at("images"), bundles: at("c"), crun: at("crun")}
}

func (p places) make() error {
	for _, d := range []string{p.run, p.disk, p.etc, p.volumes, p.images, p.bundles, p.crun} {
		if err := os.MkdirAll(d, 0o711); err != nil {
			return err
		}
	}
	return nil
}

// An agent is the guest's side of agentapi.
type agent struct {
	places places
	crun   string // the program's path
	reaper *reaper
	exits  *exitJournal
	images *imageMounts
	usage  *usageCache
	clock  *hostClock

	// kept is what the kernel took of the RAM at the boot, in bytes.
	kept int64
	// modules is closed when the kernel has all that pods need.
	modules <-chan struct{}

	// setup serialises SetupSandbox; ready is set when it has succeeded.
	setup sync.Mutex

	mu     sync.Mutex
	ready  bool
	lacks  []string // what SetupSandbox has not done yet
	bootID string   // of this VM, once it is drawn
	// productUUID is the file that containers see as the machine's, empty if
	// they see none.
	productUUID string
	sharedPID   string          // path of the pod's PID namespace, empty if not shared
	userns      *userNamespace  // the pod's, nil if it has none
	interfaces  map[string]bool // the pod's, by name
	volumes     map[string]*volume
	blanks      map[string]*blankDisk // by volume id: they wait for FORMAT
	containers  map[string]*container
	creating    map[string]*sync.Mutex // serialises work on one container or volume
	cdev        bool                   // the kernel can restrict devices
}

func newAgent(p places) *agent {
	a := &agent{
		places: p, clock: newHostClock(), reaper: newReaper(), exits: newExitJournal(), images: newImageMounts(p.images), usage: newUsageCache(),
		volumes: map[string]*volume{}, blanks: map[string]*blankDisk{}, containers: map[string]*container{}, creating: map[string]*sync.Mutex{},
		cdev: haveBPF(),
	}
	a.lacks = a.itemNames()
	return a
}

// Package regexp is not used here: compiling a handful of patterns costs a
// booting guest tens of milliseconds under emulation.

// only says whether s has 1 to limit characters, all letters, digits or of
// the others.
func only(s string, limit int, others string) bool {
	for _, c := range []byte(s) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(others, c) >= 0) {
			return false
		}
	}
	return len(s) >= 1 && len(s) <= limit
}

// checkID refuses what cannot be a file name of ours.
func checkID(what, id string) error {
	if !only(id, 128, "_.-") || id[0] == '.' || id[0] == '-' {
		return fmt.Errorf("%s id %q: want 1 to 128 characters of [a-zA-Z0-9_.-], not beginning with a dot or dash: %w", what, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// lockOf serialises work on one object without holding up the others.
func (a *agent) lockOf(key string) *sync.Mutex {
	a.mu.Lock()
	defer a.mu.Unlock()
	l, ok := a.creating[key]
	if !ok {
		l = &sync.Mutex{}
		a.creating[key] = l
	}
	return l
}

func (a *agent) container(id string) (*container, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	c, ok := a.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %q is not in this VM: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// Hello says who answers; it works at any time.
func (a *agent) Hello(ctx context.Context, r *agentapi.HelloRequest) (*agentapi.HelloResponse, error) {
	resp := &agentapi.HelloResponse{Version: Version, Protocol: agentapi.Protocol, Features: features(), UptimeNs: uptime()}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		resp.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	a.mu.Lock()
	resp.SandboxReady, resp.BootId = a.ready, a.bootID
	all := make([]*container, 0, len(a.containers))
	for _, c := range a.containers {
		all = append(all, c)
	}
	a.mu.Unlock()
	for _, c := range all {
		resp.Containers = append(resp.Containers, c.state())
	}
	if resp.SandboxReady {
		if err := a.clock.keep(r.Clock); err != nil {
			slog.Warn("the clock is not kept", "error", err)
		}
	}
	resp.ClockNs = time.Now().UnixNano() // last, so that it is fresh
	return resp, nil
}

func uptime() int64 {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return ts.Nano()
}

// features are words for what this kernel can do.
func features() []string {
	out := []string{agentapi.FeatureDisks, agentapi.FeatureSubPaths}
	known, _ := os.ReadFile("/proc/filesystems")
	if modules, _ := modulesIn("/modules/xfs"); len(modules) > 0 || strings.Contains(string(known), "\txfs\n") {
		out = append(out, agentapi.FeatureXFS)
	}
	for _, f := range []struct{ name, file string }{
		{"apparmor", "/sys/module/apparmor/parameters/enabled"}, {"cgroup2", cgroupRoot + "/cgroup.controllers"},
		{"seccomp", "/proc/sys/kernel/seccomp/actions_avail"}, {"userns", "/proc/self/ns/user"},
	} {
		if _, err := os.Stat(f.file); err == nil {
			out = append(out, f.name)
		}
	}
	return out
}

// haveBPF says whether the device cgroup, a BPF program in version 2, works.
func haveBPF() bool {
	_, _, errno := unix.Syscall(unix.SYS_BPF, 0, 0, 0)
	return errno != unix.ENOSYS
}

// Acknowledge lets the journals go.
func (a *agent) Acknowledge(ctx context.Context, r *agentapi.AcknowledgeRequest) (*agentapi.AcknowledgeResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	if r.Logs > 0 {
		c, err := a.container(r.ContainerId)
		if err != nil {
			return nil, err
		}
		c.logs.ack(r.Logs)
	}
	if r.Exits > 0 {
		a.exits.ack(r.Exits)
	}
	return &agentapi.AcknowledgeResponse{}, nil
}

// Shutdown ends everything and powers off, behind its own answer.
func (a *agent) Shutdown(ctx context.Context, _ *agentapi.ShutdownRequest) (*agentapi.ShutdownResponse, error) {
	go func() {
		time.Sleep(50 * time.Millisecond) // the answer leaves
		_ = killCgroup(podCgroup)
		unix.Sync()
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}()
	return &agentapi.ShutdownResponse{}, nil
}
