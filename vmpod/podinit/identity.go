package podinit

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// A VM that was cloned wakes up with the time, the random numbers and the names
// of its template. Until it has its own, the agent runs nothing and lets no
// packet out. What clones share in spite of that, and why it may be:
// docs/decisions/0011-what-clones-share.md.

// An item is one step of SetupSandbox.
type item struct {
	name  string
	given bool // the host has said what is needed for it
	do    func() error
}

// items are the steps in their order: each relies on those before it. All may
// be done again. The host's clock was what r says at the time arrived, by the
// guest's.
func (a *agent) items(ctx context.Context, r *agentapi.SetupSandboxRequest, arrived time.Time) []item {
	return []item{
		{"clock", r.GetClockNs() != 0, func() error { return a.clock.set(r.ClockNs, arrived) }},
		{"entropy", len(r.GetEntropy()) > 0, func() error { return mixEntropy(r.Entropy) }},
		{"boot id", true, a.drawBootID},
		{"hostname", r.GetHostname() != "", func() error { return a.setHostname(r.Hostname, r.Domainname) }},
		{"machine id", r.GetMachineId() != "", func() error { return a.setMachineID(r.MachineId) }},
		{"VM UUID", r.GetVmUuid() != "", func() error { return a.setProductUUID(r.VmUuid) }},
		{"DNS and sysctls", true, func() error { return a.setSettings(r) }},
		{"interfaces", haveAddresses(r.GetInterfaces()), func() error { return setInterfaces(ctx, r.Interfaces) }},
		{"ephemeral disk", true, func() error { return mountEphemeral(ctx, r.EphemeralDisk, a.places.disk) }},
		{"namespaces", true, func() error { return a.startPause(r) }},
	}
}

// itemNames are those of all items, in their order.
func (a *agent) itemNames() (names []string) {
	for _, i := range a.items(context.Background(), nil, time.Time{}) {
		names = append(names, i.name)
	}
	return names
}

// setUp does all items, up to one that the host has not given. What is undone
// then is what calls are refused for.
func (a *agent) setUp(ctx context.Context, r *agentapi.SetupSandboxRequest, arrived time.Time) error {
	todo := a.items(ctx, r, arrived)
	for n, i := range todo {
		a.mu.Lock()
		a.lacks = a.lacks[:0]
		for _, left := range todo[n:] {
			a.lacks = append(a.lacks, left.name)
		}
		a.mu.Unlock()
		if !i.given {
			return fmt.Errorf("%s: the host has not given it: %w", i.name, errdefs.ErrFailedPrecondition)
		}
		if err := i.do(); err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		}
	}
	return nil
}

// Rest is called when a session has ended. A guest without an identity may now
// be saved, and cloned for as long as its host runs: all that it needed to come
// so far is given back, since clones copy what they write to. It has no name, no
// address and no interface that is up, lo included: the kernel draws the secrets
// behind sequence numbers, ports and hash tables when they are first needed,
// which is then in each clone, after it got entropy of its own.
func (a *agent) Rest() {
	<-a.modules
	a.mu.Lock()
	ready := a.ready
	a.mu.Unlock()
	if !ready {
		dropSchedulers(sysBlock)
		rehearse()
		debug.FreeOSMemory()
	}
}

// requireSandbox is the gate before all that serves a pod.
func (a *agent) requireSandbox() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.ready {
		return fmt.Errorf("the sandbox is not set up, it lacks %s; SetupSandbox comes first: %w", strings.Join(a.lacks, ", "), errdefs.ErrFailedPrecondition)
	}
	return nil
}

func haveAddresses(interfaces []*agentapi.Interface) bool {
	for _, i := range interfaces {
		if i.Mac == "" || len(i.Addresses) == 0 {
			return false
		}
	}
	return len(interfaces) > 0
}

// minEntropy is what the contract asks of the host, in bytes.
const minEntropy = 64

// mixEntropy credits the host's bytes to the kernel's pool and has the
// generator reseeded from it, so that clones of one template part here. The
// kernel throws away at once what it had drawn ahead, on every CPU.
func mixEntropy(b []byte) error {
	if len(b) < minEntropy || len(b) > 4096 {
		return fmt.Errorf("%d bytes: want %d to 4096: %w", len(b), minEntropy, errdefs.ErrInvalidArgument)
	}
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return credit(b, func(request uint, arg []byte) error { return ioctlBytes(int(f.Fd()), request, arg) })
}

// credit is mixEntropy's way with the random device.
func credit(b []byte, ioctl func(request uint, arg []byte) error) error {
	// struct rand_pool_info: bits, size, bytes.
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(b)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(b)))
	if err := ioctl(unix.RNDADDENTROPY, append(info, b...)); err != nil {
		return fmt.Errorf("add it: %w", err)
	}
	if err := ioctl(unix.RNDRESEEDCRNG, []byte{0}); err != nil {
		return fmt.Errorf("reseed the random generator: %w", err)
	}
	return nil
}

// bootIDFile is never read before entropy was mixed in: the kernel draws the
// id at the first read, for good.
const bootIDFile = "/proc/sys/kernel/random/boot_id"

func (a *agent) drawBootID() error {
	b, err := os.ReadFile(bootIDFile)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.bootID = strings.TrimSpace(string(b))
	return nil
}

func (a *agent) setHostname(host, domain string) error {
	if !only(host, 64, ".-") {
		return fmt.Errorf("%q: want 1 to 64 letters, digits, dots and dashes: %w", host, errdefs.ErrInvalidArgument)
	}
	if err := unix.Sethostname([]byte(host)); err != nil {
		return err
	}
	if domain != "" {
		if err := unix.Setdomainname([]byte(domain)); err != nil {
			return fmt.Errorf("set the domain name: %w", err)
		}
	}
	return a.writeEtc("hostname", host, 0o644)
}

func (a *agent) setMachineID(id string) error {
	if b, err := hex.DecodeString(id); err != nil || len(b) != 16 {
		return fmt.Errorf("%q: want 32 hex digits: %w", id, errdefs.ErrInvalidArgument)
	}
	return a.writeEtc("machine-id", id, 0o644)
}

// productUUID is where containers find the machine's UUID. The kernel has read
// it from the firmware at its boot, which was the template's.
const productUUID = "/sys/devices/virtual/dmi/id/product_uuid"

// setProductUUID keeps what containers see there, with the mode that the
// kernel gives it.
func (a *agent) setProductUUID(id string) error {
	if len(id) != 36 || !only(id, 36, "-") {
		return fmt.Errorf("%q: want a UUID: %w", id, errdefs.ErrInvalidArgument)
	}
	if _, err := os.Stat(productUUID); err != nil {
		return nil // a machine without such tables shows containers none
	}
	a.mu.Lock()
	a.productUUID = filepath.Join(a.places.etc, "product_uuid")
	a.mu.Unlock()
	return a.writeEtc("product_uuid", strings.ToLower(id), 0o400)
}

// writeEtc writes one line that containers see.
func (a *agent) writeEtc(name, line string, mode os.FileMode) error {
	return os.WriteFile(filepath.Join(a.places.etc, name), []byte(line+"\n"), mode)
}
