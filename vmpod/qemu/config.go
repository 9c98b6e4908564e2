package qemu

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

// An Accelerator is what executes the guest's code.
type Accelerator string

// Accelerators.
const (
	AcceleratorAuto Accelerator = "auto" // KVM if ProbeKVM finds it usable, else TCG
	AcceleratorKVM  Accelerator = "kvm"
	AcceleratorTCG  Accelerator = "tcg" // emulation: works anywhere, slow, no security boundary
)

// DefaultOverhead is what a QEMU of ours needs on the host beside the guest's
// RAM, in bytes: see docs/decisions/0003-qemu-command-line.md, "Memory".
const (
	DefaultOverheadKVM = 64 << 20
	DefaultOverheadTCG = DefaultOverheadKVM + tcgCacheMiB<<20
)

// A Guest is what a VM boots. The zero Guest is not bootable.
type Guest struct {
	// Kernel (bzImage or PVH vmlinux) and Initrd are absolute paths.
	Kernel, Initrd string
	// Cmdline is what this kernel and initramfs need on the kernel's command
	// line beside what the driver gives.
	Cmdline string
}

// Config says how a Driver runs QEMU. StateDir, RunDir and Guest are
// required; every other field's zero value is a sensible choice.
type Config struct {
	// Binary is QEMU's path or a name to be found on PATH; default
	// qemu-system-x86_64.
	Binary string
	// Accelerator defaults to AcceleratorAuto.
	Accelerator Accelerator
	Guest       Guest
	// StateDir is absolute and lasts over restarts of the host: one directory
	// a VM. Only one Driver at a time may use it.
	StateDir string
	// RunDir is absolute, may be gone after a restart of the host, and is
	// short (at most 85 bytes) because it holds unix sockets.
	RunDir string
	// UID and GID are whom QEMU runs as; 0 means as the driver. Nothing needs
	// to belong to them: QEMU gets descriptors.
	UID, GID uint32
	// UIDs is the number of users from UID on of which each VM gets one of its
	// own, with the group of the same number; 0 or 1: all run as UID and GID.
	UIDs uint32
	// Cgroup is the group below which VMs are accounted, relative to the root
	// of the host's hierarchies; default "atoll".
	Cgroup string
	// Overhead is added to the guest's RAM for the memory limit of the VM's
	// cgroup, in bytes; default DefaultOverheadKVM or -TCG.
	Overhead int64
	// GrowCPUs and GrowMemory (bytes) bound what VMs may grow to while they
	// run; default the host's CPUs and RAM. Of CPUs a VM has no more than a few
	// in reserve (see Config.room), since each costs every guest some memory. A
	// VM that is launched larger does not grow.
	GrowCPUs   int
	GrowMemory int64
	// HostDirectories are what shares may be of; empty: there can be none.
	HostDirectories []vmpod.HostDirectory
	// Templates are what VMs are cloned from. There are none where there are
	// HostDirectories: what serves those must share the guest's memory.
	Templates Templates
	// Deadline is how long QEMU may take to answer before it counts as
	// unknown; default 5 s.
	Deadline time.Duration
	// ConsoleLimit bounds console.log in bytes; as much again may lie in
	// console.log.1. Default 256 KiB.
	ConsoleLimit int64
	// Logger defaults to slog.Default().
	Logger *slog.Logger
}

const (
	// socketNameLen is the length of "/<12 hex digits>.agent".
	socketNameLen = 1 + 12 + len(".agent")
	// maxSocketPath is sizeof(sockaddr_un.sun_path) less its NUL.
	maxSocketPath = 107
)

// complete returns the Config with defaults filled in, or what is wrong.
func (c Config) complete() (Config, error) {
	if c.Binary == "" {
		c.Binary = "qemu-system-x86_64"
	}
	bin, err := exec.LookPath(c.Binary)
	if err != nil {
		return c, fmt.Errorf("QEMU binary %s: %v: install qemu-system-x86 or set its path: %w", c.Binary, err, errdefs.ErrNotFound)
	}
	c.Binary = bin
	switch c.Accelerator {
	case "":
		c.Accelerator = AcceleratorAuto
	case AcceleratorAuto, AcceleratorKVM, AcceleratorTCG:
	default:
		return c, fmt.Errorf("accelerator %q: want auto, kvm or tcg: %w", c.Accelerator, errdefs.ErrInvalidArgument)
	}
	for what, p := range map[string]string{"state": c.StateDir, "run": c.RunDir} {
		if !filepath.IsAbs(p) {
			return c, fmt.Errorf("%s directory %q of the QEMU driver: want an absolute path: %w", what, p, errdefs.ErrInvalidArgument)
		}
	}
	if n := len(c.RunDir) + socketNameLen; n > maxSocketPath {
		return c, fmt.Errorf("run directory %s of the QEMU driver: too long by %d bytes for unix sockets: choose a shorter one: %w",
			c.RunDir, n-maxSocketPath, errdefs.ErrInvalidArgument)
	}
	if err := c.Guest.check(); err != nil {
		return c, err
	}
	if c.Cgroup == "" {
		c.Cgroup = "atoll"
	}
	if !cgroupPathRE.MatchString(c.Cgroup) {
		return c, fmt.Errorf("cgroup %q of the QEMU driver: want names of [A-Za-z0-9._-] joined by /: %w", c.Cgroup, errdefs.ErrInvalidArgument)
	}
	if err := c.growDefaults(); err != nil {
		return c, err
	}
	for _, dir := range c.HostDirectories {
		if !filepath.IsAbs(dir.Path) || filepath.Clean(dir.Path) != dir.Path || dir.Path == "/" {
			return c, fmt.Errorf("host directory %q of the QEMU driver: want an absolute, clean path that is not /: %w", dir.Path, errdefs.ErrInvalidArgument)
		}
	}
	if err := c.Templates.complete(); err != nil {
		return c, err
	}
	if c.Deadline <= 0 {
		c.Deadline = 5 * time.Second
	}
	if c.ConsoleLimit <= 0 {
		c.ConsoleLimit = 256 << 10
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c, nil
}

func (g Guest) check() error {
	for what, p := range map[string]string{"kernel": g.Kernel, "initramfs": g.Initrd} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("guest %s %q: want an absolute path: %w", what, p, errdefs.ErrInvalidArgument)
		}
		if st, err := os.Stat(p); err != nil || !st.Mode().IsRegular() {
			return fmt.Errorf("guest %s %s is not there: run `make guest`: %w", what, p, errdefs.ErrNotFound)
		}
	}
	if !cmdlineRE.MatchString(g.Cmdline) {
		return fmt.Errorf("guest kernel command line %q holds a character that is not allowed: %w", g.Cmdline, errdefs.ErrInvalidArgument)
	}
	return nil
}
