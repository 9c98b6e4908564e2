package podinit

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// SetupSandbox gives the VM its identity. Each step may be repeated, so a
// host that lost the answer, or saw it fail, asks again; once it has
// succeeded it does nothing any more.
func (a *agent) SetupSandbox(_ context.Context, r *agentapi.SetupSandboxRequest) (*agentapi.SetupSandboxResponse, error) {
	a.setup.Lock()
	defer a.setup.Unlock()
	a.mu.Lock()
	done := a.ready
	a.mu.Unlock()
	if done {
		return &agentapi.SetupSandboxResponse{}, nil
	}
	<-a.modules
	ctx, cancel := context.WithTimeout(context.Background(), 3*deviceTimeout)
	defer cancel()
	if err := a.setUp(ctx, r); err != nil {
		return nil, fmt.Errorf("set up the sandbox: %w", err)
	}
	interfaces := map[string]bool{}
	for _, i := range r.Interfaces {
		interfaces[i.Name] = true
	}
	a.mu.Lock()
	a.ready, a.interfaces = true, interfaces
	a.mu.Unlock()
	slog.SetDefault(slog.Default().With("pod_uid", r.PodUid))
	slog.Info("sandbox ready", "hostname", r.Hostname, "interfaces", len(r.Interfaces), "ephemeral_disk", r.EphemeralDisk)
	return &agentapi.SetupSandboxResponse{}, nil
}

func (a *agent) setUp(ctx context.Context, r *agentapi.SetupSandboxRequest) error {
	// Time and randomness before anything else: a clone has its template's.
	if err := setClock(r.ClockNs); err != nil {
		return err
	}
	if err := mixEntropy(r.Entropy); err != nil {
		return err
	}
	if err := a.setNames(r); err != nil {
		return err
	}
	if err := setSysctls(r.Sysctls); err != nil {
		return err
	}
	if err := setInterfaces(ctx, r.Interfaces); err != nil {
		return err
	}
	if err := mountEphemeral(ctx, r.EphemeralDisk, a.places.disk); err != nil {
		return err
	}
	return a.startPause(r)
}

// startPause starts the process that keeps the pod's namespaces, if it has
// any of its own beside the VM's.
func (a *agent) startPause(r *agentapi.SetupSandboxRequest) error {
	a.mu.Lock()
	started := a.sharedPID != "" || a.userns != nil // by a call whose answer was lost
	a.mu.Unlock()
	if started || !r.SharePid && r.UserNamespace == nil {
		return nil
	}
	if r.UserNamespace != nil {
		if err := admitUserNamespace(); err != nil {
			return err
		}
	}
	dir, err := a.reaper.startPause(r.UserNamespace)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.SharePid {
		a.sharedPID = dir + "pid"
	}
	if r.UserNamespace != nil {
		a.userns = &userNamespace{path: dir + "user", first: int(r.UserNamespace.First)}
	}
	return nil
}

func setClock(ns int64) error {
	if ns <= 0 {
		return fmt.Errorf("clock_ns is %d: want the wall clock in nanoseconds since the epoch: %w", ns, errdefs.ErrInvalidArgument)
	}
	ts := unix.NsecToTimespec(ns)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set the clock: %w", err)
	}
	return nil
}

// minEntropy is what the contract asks of the host.
const minEntropy = 32

// mixEntropy credits the host's bytes to the kernel's pool and has the
// generator reseeded from it, so that clones of one template part here.
func mixEntropy(b []byte) error {
	if len(b) < minEntropy || len(b) > 4096 {
		return fmt.Errorf("entropy of %d bytes: want %d to 4096: %w", len(b), minEntropy, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// struct rand_pool_info: bits, size, bytes.
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(b)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(b)))
	info = append(info, b...)
	if err := ioctlBytes(int(f.Fd()), unix.RNDADDENTROPY, info); err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.RNDRESEEDCRNG, 0); err != nil {
		return fmt.Errorf("reseed the random generator: %w", err)
	}
	return nil
}

// setNames sets the hostname and writes the files that containers see.
func (a *agent) setNames(r *agentapi.SetupSandboxRequest) error {
	if !only(r.Hostname, 64, ".-") {
		return fmt.Errorf("hostname %q: want 1 to 64 letters, digits, dots and dashes: %w", r.Hostname, errdefs.ErrInvalidArgument)
	}
	if err := unix.Sethostname([]byte(r.Hostname)); err != nil {
		return fmt.Errorf("set the hostname: %w", err)
	}
	if r.Domainname != "" {
		if err := unix.Setdomainname([]byte(r.Domainname)); err != nil {
			return fmt.Errorf("set the domain name: %w", err)
		}
	}
	if id, err := hex.DecodeString(r.MachineId); err != nil || len(id) != 0 && len(id) != 16 {
		return fmt.Errorf("machine_id %q: want 32 hex digits: %w", r.MachineId, errdefs.ErrInvalidArgument)
	}
	for name, text := range map[string]string{
		"hostname": r.Hostname + "\n", "machine-id": r.MachineId + "\n", "resolv.conf": resolvConf(r.Dns),
	} {
		if err := os.WriteFile(filepath.Join(a.places.etc, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func resolvConf(d *agentapi.DNS) string {
	var b strings.Builder
	if len(d.GetSearches()) > 0 {
		b.WriteString("search " + strings.Join(d.GetSearches(), " ") + "\n")
	}
	for _, s := range d.GetServers() {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(d.GetOptions()) > 0 {
		b.WriteString("options " + strings.Join(d.GetOptions(), " ") + "\n")
	}
	return b.String()
}

// setSysctls writes names with dots or slashes below /proc/sys.
func setSysctls(values map[string]string) error {
	root, err := os.OpenRoot("/proc/sys")
	if err != nil {
		return err
	}
	defer root.Close()
	for name, value := range values {
		f, err := root.OpenFile(sysctlPath(name), os.O_WRONLY, 0)
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("sysctl %s is not known to this kernel: %w", name, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return fmt.Errorf("sysctl %s: %w", name, err)
		}
		_, err = f.WriteString(value)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("sysctl %s=%q: %v: %w", name, value, err, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// sysctlPath turns a sysctl's name into its file, as sysctl(8) does: the
// first separator says which one is meant, and the other one is then literal.
func sysctlPath(name string) string {
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		return strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, name)
	}
	return name
}
