package qemu

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/flock"
	"github.com/openatoll/atoll/vmpod"
)

// A Driver runs pod VMs as QEMU processes. It implements vmpod.Driver; its
// machines are also vmpod.Plugger, vmpod.Grower and vmpod.Meter.
type Driver struct {
	cfg  Config
	log  *slog.Logger
	qemu binaryFacts
	// virtiofsd is known if there are host directories.
	virtiofsd virtiofsd
	accel     Accelerator
	kvm       KVMStatus
	tscKHz    int
	trees     []hierarchy
	lock      *os.File
	nowhere   *nowhere

	// life ends with Close; it bounds what runs behind the machines.
	life   context.Context
	detach context.CancelFunc

	templates *templateStore

	mu        sync.Mutex
	machines  map[vmpod.ID]*Machine
	turns     map[vmpod.ID]*turn
	users     *userTable
	scratches uint32 // made so far
}

var (
	_ vmpod.Driver  = (*Driver)(nil)
	_ vmpod.Machine = (*Machine)(nil)
	_ vmpod.Plugger = (*Machine)(nil)
	_ vmpod.Grower  = (*Machine)(nil)
	_ vmpod.Meter   = (*Machine)(nil)
	_ vmpod.Pacer   = (*Machine)(nil)

	_ vmpod.Originator = (*Machine)(nil)
)

// New returns a Driver over cfg's directories, making them if need be, and
// sweeps what a crash left in them. It decides the accelerator, which may
// take a second once a host boot, and fails with ErrUnavailable if another
// process drives the same StateDir. VMs of an earlier process are adopted when
// Open or List meets them.
func New(cfg Config) (*Driver, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	for _, dir := range []string{cfg.StateDir, cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	lock, err := lockDir(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	d := &Driver{cfg: cfg, log: cfg.Logger, lock: lock, machines: map[vmpod.ID]*Machine{}, turns: map[vmpod.ID]*turn{},
		users: newUserTable(cfg.UID, cfg.UIDs), nowhere: newNowhere()}
	if d.nowhere.err != nil {
		d.log.Warn("QEMU runs in the host's network namespace", "reason", d.nowhere.err)
	}
	d.life, d.detach = context.WithCancel(context.Background())
	d.templates = newTemplateStore(d)
	if err := d.prepare(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Driver) prepare() error {
	if err := sweep(d.cfg.StateDir); err != nil {
		return err
	}
	// What we were started with open must not reach QEMU; what Go opens is
	// closed on exec anyway.
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil && !errors.Is(err, unix.ENOSYS) {
		return os.NewSyscallError("close_range", err)
	}
	var err error
	if d.qemu, err = examine(d.life, d.cfg.Binary); err != nil {
		return err
	}
	if len(d.cfg.HostDirectories) > 0 {
		if d.virtiofsd, err = findVirtiofsd(d.life); err != nil {
			return err
		}
	}
	if !d.qemu.sandbox {
		d.log.Warn("QEMU runs without its seccomp sandbox", "binary", d.cfg.Binary, "reason", d.qemu.sandboxReason)
	}
	d.accel = d.cfg.Accelerator
	if d.accel != AcceleratorTCG {
		d.kvm = ProbeKVM(d.life, d.cfg.StateDir)
	}
	switch {
	case d.accel == AcceleratorKVM && !d.kvm.Usable:
		return fmt.Errorf("KVM is not usable: %s: enable virtualisation or choose the accelerator tcg: %w", d.kvm.Reason, errdefs.ErrFailedPrecondition)
	case d.accel == AcceleratorAuto && d.kvm.Usable:
		d.accel = AcceleratorKVM
	case d.accel == AcceleratorAuto:
		d.accel = AcceleratorTCG
		d.log.Warn("pod VMs are emulated: slow, and no security boundary", "reason", d.kvm.Reason)
	}
	if d.cfg.Overhead <= 0 {
		d.cfg.Overhead = DefaultOverheadKVM
		if d.accel == AcceleratorTCG {
			d.cfg.Overhead = DefaultOverheadTCG
		}
	}
	if d.accel == AcceleratorTCG {
		d.tscKHz = hostTSCkHz()
	}
	if d.trees = hierarchies("/sys/fs/cgroup"); len(d.trees) == 0 {
		d.log.Warn("pod VMs are not limited by cgroups", "reason", "no usable hierarchy below /sys/fs/cgroup")
	}
	if err := d.endScratches(); err != nil {
		return err
	}
	return d.templates.start()
}

// lockDir takes the directory for this process; the kernel frees it with it.
func lockDir(dir string) (*os.File, error) {
	f, err := flock.Take(filepath.Join(dir, ".lock"))
	if held := (*flock.HeldError)(nil); errors.As(err, &held) {
		return nil, fmt.Errorf("directory %s is in use by another driver, of process %d: stop that one first: %w", dir, held.PID, errdefs.ErrUnavailable)
	}
	return f, err
}

// Accelerator returns what VMs launched now run on, and if that is TCG though
// KVM was wanted, why.
func (d *Driver) Accelerator() (Accelerator, string) { return d.accel, d.kvm.Reason }

// Close lets go of all VMs, which go on running, and of StateDir.
func (d *Driver) Close() error {
	d.detach()
	d.mu.Lock()
	ms := make([]*Machine, 0, len(d.machines))
	for _, m := range d.machines {
		ms = append(ms, m)
	}
	clear(d.machines)
	d.mu.Unlock()
	for _, m := range ms {
		m.background.Wait()
		m.closeAgent() // or the next driver's would wait behind it
	}
	d.templates.stop()
	d.nowhere.close()
	return d.lock.Close()
}

// A turn serialises what is done to one VM.
type turn struct {
	token chan struct{} // holds one token
	users int           // guarded by Driver.mu
}

// take waits for the VM's turn; the returned function gives it back.
func (d *Driver) take(ctx context.Context, id vmpod.ID) (func(), error) {
	d.mu.Lock()
	t := d.turns[id]
	if t == nil {
		t = &turn{token: make(chan struct{}, 1)}
		d.turns[id] = t
	}
	t.users++
	d.mu.Unlock()
	release := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if t.users--; t.users == 0 {
			delete(d.turns, id)
		}
	}
	select {
	case t.token <- struct{}{}:
		if err := d.life.Err(); err != nil {
			<-t.token
			release()
			return nil, fmt.Errorf("the QEMU driver is closed: %w", errdefs.ErrUnavailable)
		}
		return func() { <-t.token; release() }, nil
	case <-ctx.Done():
		release()
		return nil, ctx.Err()
	}
}

// Launch implements vmpod.Driver.
func (d *Driver) Launch(ctx context.Context, spec vmpod.Spec) (vmpod.Machine, error) {
	if err := checkSpec(spec); err != nil {
		return nil, err
	}
	done, err := d.take(ctx, spec.ID)
	if err != nil {
		return nil, err
	}
	defer done()
	m, err := d.find(spec.ID)
	if err == nil {
		if !equalSpecs(m.launched, spec) {
			return nil, fmt.Errorf("pod VM %s is there with another spec: remove it first: %w", spec.ID, errdefs.ErrAlreadyExists)
		}
		return m, nil
	}
	if !errdefs.IsNotFound(err) {
		return nil, err
	}
	m, err = d.launch(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("launch pod VM %s: %w", spec.ID, err)
	}
	return m, nil
}

// Open implements vmpod.Driver.
func (d *Driver) Open(ctx context.Context, id vmpod.ID) (vmpod.Machine, error) {
	if !podUIDRE.MatchString(id.PodUID) {
		return nil, fmt.Errorf("pod VM %q: %w", id.String(), errdefs.ErrNotFound)
	}
	done, err := d.take(ctx, id)
	if err != nil {
		return nil, err
	}
	defer done()
	m, err := d.find(id)
	if err != nil {
		return nil, err
	}
	return m, nil
}

// List implements vmpod.Driver. A machine that cannot be opened (its files
// are damaged) is left out with a logged error, so that one bad VM does not
// hide the others.
func (d *Driver) List(ctx context.Context) ([]vmpod.Machine, error) {
	entries, err := os.ReadDir(d.cfg.StateDir)
	if err != nil {
		return nil, err
	}
	var ms []vmpod.Machine
	for _, e := range entries {
		id, err := vmpod.ParseID(e.Name())
		if err != nil || !e.IsDir() || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		m, err := d.Open(ctx, id)
		switch {
		case err == nil:
			ms = append(ms, m)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !errdefs.IsNotFound(err):
			d.log.Error("pod VM cannot be opened", "pod_uid", id.PodUID, "attempt", id.Attempt, "err", err)
		}
	}
	return ms, nil
}

// find returns the machine called id, adopting it if an earlier process made
// it, or ErrNotFound. The caller has the VM's turn.
func (d *Driver) find(id vmpod.ID) (*Machine, error) {
	d.mu.Lock()
	m := d.machines[id]
	d.mu.Unlock()
	if m != nil {
		return m, nil
	}
	dir := vmDir(filepath.Join(d.cfg.StateDir, id.String()))
	if _, err := os.Stat(string(dir)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("pod VM %s is not on this host: %w", id, errdefs.ErrNotFound)
	}
	m, err := d.adopt(id, dir)
	if err != nil {
		return nil, err
	}
	d.remember(m)
	return m, nil
}

func (d *Driver) remember(m *Machine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.machines[m.id] = m
}

func (d *Driver) forget(m *Machine) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.machines[m.id] == m {
		delete(d.machines, m.id)
	}
}

// shortHash is the first digits of the SHA-256 in hex.
func shortHash(text string, digits int) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])[:digits]
}

// socketPaths are where a VM's sockets are. The name is a hash, because a
// pod's UID is too long for a socket's path.
func (d *Driver) socketPaths(id vmpod.ID) map[string]string {
	base := filepath.Join(d.cfg.RunDir, shortHash(id.String(), 12))
	return map[string]string{
		qmpSocket:     base + "." + qmpSocket,
		agentSocket:   base + "." + agentSocket,
		consoleSocket: base + "." + consoleSocket,
		shareSocket:   base + "." + shareSocket,
	}
}

// cgroupPath is a VM's group relative to its hierarchy.
func (d *Driver) cgroupPath(spec vmpod.Spec) string {
	return filepath.Join(d.cfg.Cgroup, spec.Pool, spec.ID.String())
}
