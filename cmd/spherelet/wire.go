package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/component-base/tracing"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/cri"
	"github.com/openatoll/atoll/internal/flock"
	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/netplugin/tap"
	"github.com/openatoll/atoll/spherelet"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/spherelet/resources"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/erofs"
	"github.com/openatoll/atoll/storage/image"
	"github.com/openatoll/atoll/storage/local"
	"github.com/openatoll/atoll/storage/mkfs"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// A host is everything below the node: who runs VMs, their network, images
// and disks, and the runtime that puts them together.
type host struct {
	cfg     *v1alpha1.SphereletConfiguration
	paths   config.Paths
	facts   spherelet.Facts
	driver  *qemu.Driver
	network netplugin.Network
	images  *image.Store
	volumes storage.Disks // nil: none
	// volumesChanged gets a word when somebody has seen volumes comply otherwise.
	volumesChanged <-chan struct{}
	runtime        *cri.Server
	tracing        tracing.TracerProvider // nil: none
}

// run runs the node until ctx ends.
func run(ctx context.Context, cfg *v1alpha1.SphereletConfiguration) (err error) {
	paths, err := config.Prepare(cfg)
	if err != nil {
		return err
	}
	unlock, err := lock(paths.Lock)
	if err != nil {
		return err
	}
	defer unlock()
	h := &host{cfg: cfg, paths: paths}
	defer func() { err = errors.Join(err, h.close()) }()
	if err := h.open(ctx); err != nil {
		return err
	}
	registerLaunchMetrics()
	registerImageMetrics(h.images)
	h.volumesChanged = registerDiskMetrics(h.volumes)
	listener, err := cri.Listen(paths.CRISocket)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return ended(ctx, "the CRI server", h.runtime.Serve(ctx, listener)) })
	g.Go(func() error { return h.serveServices(ctx) })
	g.Go(func() error { return h.serveVolumes(ctx) })
	g.Go(func() error { return h.controlVolumes(ctx) })
	g.Go(func() error { return h.fenceLostNodes(ctx) })
	g.Go(func() error {
		return ended(ctx, "the kubelet", spherelet.Run(ctx, spherelet.Options{
			Config:      cfg,
			Paths:       paths,
			Preparer:    h.runtime,
			Subscribe:   h.runtime.Subscribe,
			Faults:      h.runtime.Faults,
			Starts:      h.runtime.Starts,
			PodVMs:      h.runtime.PodVMs,
			Notices:     h.runtime.Notices,
			VolumeUsage: h.runtime.VolumeUsage,
			SubPaths:    h.runtime.PrepareSubPath,
			CSISocket:   h.csiSocket(),
			Facts:       h.facts,
			ImageDisks:  imageDisks,
		}))
	})
	return g.Wait()
}

// imageDisks is how many images a VM has room for: all disks that the driver
// can plug, less the writable one.
const imageDisks = qemu.MaxDisks - 1

// ended turns a part that ended by itself into an error, so that the others
// end too.
func ended(ctx context.Context, what string, err error) error {
	if err == nil && ctx.Err() == nil {
		return fmt.Errorf("%s ended by itself: %w", what, errdefs.ErrUnknown)
	}
	return err
}

// open opens the parts in the order in which they need each other.
func (h *host) open(ctx context.Context) error {
	guest, err := guestimage.Load(h.cfg.Hypervisor.Guest)
	if err != nil {
		return err
	}
	uid, gid, uids, err := vmUser(h.cfg.Hypervisor.User)
	if err != nil {
		return err
	}
	driverConfig := driverConfig(h.cfg, h.paths, guest)
	driverConfig.UID, driverConfig.GID, driverConfig.UIDs = uid, gid, uids
	if driverConfig.Templates, err = templates(h.cfg); err != nil {
		return err
	}
	if h.driver, err = qemu.New(driverConfig); err != nil {
		return err
	}
	launchMetrics.driver.Store(h.driver)
	h.facts = facts(ctx, h.driver, h.paths, guest)

	tapConfig, err := tapConfig(h.cfg)
	if err != nil {
		return err
	}
	taps, err := tap.New(tapConfig)
	if err != nil {
		return err
	}
	if h.network, err = remember(ctx, taps, filepath.Join(tapConfig.StateDir, "podcidr.json")); err != nil {
		return err
	}
	unpacked, err := resource.ParseQuantity(h.cfg.Images.MaxUnpackedSize)
	if err != nil {
		return err
	}
	if h.images, err = image.Open(ctx, image.Config{
		Root: h.paths.Images, HostsDir: h.cfg.Images.HostsDir, MaxConcurrentDownloads: h.cfg.Images.MaxConcurrentDownloads,
		Timeouts: image.Timeouts{Stall: duration(h.cfg.Images.ProgressTimeout)}, Limits: erofs.Limits{Bytes: unpacked.Value()},
	}); err != nil {
		return err
	}
	ephemeral, err := local.NewEphemeral(local.Config{Dir: h.paths.Disks, Quota: guest.Quota})
	if err != nil {
		return err
	}
	if h.volumes, err = openVolumes(ctx, h.cfg, h.paths, liveCopier{h.driver}); err != nil {
		return err
	}
	byDefault, err := resource.ParseQuantity(h.cfg.Hypervisor.EphemeralDefault)
	if err != nil {
		return err
	}
	streamTLS, err := streamTLS(h.cfg.Streaming)
	if err != nil {
		return err
	}
	traced, err := h.openTracing(ctx)
	if err != nil {
		return err
	}
	runtimeConfig := cri.Config{
		StreamIdleTimeout: duration(h.cfg.Streaming.IdleTimeout), StreamTLS: streamTLS,
		Driver: h.driver, Network: h.network, Images: h.images, Ephemeral: ephemeral,
		StateDir: h.paths.CRIState, SecretsDir: filepath.Join(h.cfg.RunDir, secretsName), KubeletRoot: h.paths.Kubelet,
		HostDirectories: config.HostDirectories(h.cfg), DefaultEphemeralBytes: byDefault.Value(), GuestOverhead: resources.GuestShare,
		Version: version.Version, Info: h.info, ServerOptions: traced, NodeName: h.cfg.NodeName,
	}
	if h.facts.Accelerator == string(qemu.AcceleratorTCG) {
		runtimeConfig.StartsAtOnce = startsAtOnce()
	}
	if h.volumes != nil {
		runtimeConfig.Disks = h.volumes
		if runtimeConfig.Formatter, err = mkfs.New(h.paths.Formatting); err != nil {
			return err
		}
	}
	h.runtime, err = cri.New(ctx, runtimeConfig)
	if err == nil {
		go makeMasters(ctx, ephemeral, byDefault.Value())
	}
	return err
}

// startsAtOnce is a start a CPU. With 10 boots at once on 2 CPUs, each took a third
// more CPU time than with 2 or 3 at once; of 20 pods at once the last was running
// after 0.43 of the time of 20 boots, and with one start more after 0.55.
func startsAtOnce() int { return runtime.NumCPU() }

// makeMasters formats, behind the start, what pods' disks are copied from.
// Without it each first disk of a size waits for its master.
func makeMasters(ctx context.Context, disks *local.Ephemeral, byDefault int64) {
	if err := disks.MakeMasters(ctx, byDefault); err != nil && ctx.Err() == nil {
		slog.Warn("masters of the pods' disks could not be made; pods' disks try again", "err", err)
	}
}

// close leaves the VMs running.
func (h *host) close() error {
	var errs []error
	if h.runtime != nil {
		errs = append(errs, h.runtime.Close())
	}
	if h.images != nil {
		errs = append(errs, h.images.Close())
	}
	if h.driver != nil {
		errs = append(errs, h.driver.Close())
	}
	h.closeTracing()
	return errors.Join(errs...)
}

func driverConfig(c *v1alpha1.SphereletConfiguration, p config.Paths, g guestimage.Guest) qemu.Config {
	return qemu.Config{
		Binary:      c.Hypervisor.QEMU,
		Accelerator: qemu.Accelerator(c.Hypervisor.Accelerator),
		Guest:       qemu.Guest{Kernel: g.Kernel, Initrd: g.Initrd, Cmdline: g.Cmdline},
		StateDir:    p.VMs,
		RunDir:      filepath.Join(c.RunDir, vmSocketsName),
		Cgroup:      p.Cgroup,

		HostDirectories: config.HostDirectories(c),
	}
}

func tapConfig(c *v1alpha1.SphereletConfiguration) (tap.Config, error) {
	ip, err := spherelet.NodeIP(c)
	if err != nil {
		return tap.Config{}, err
	}
	t := tap.Config{StateDir: filepath.Join(c.DataDir, "network"), NodeIP: ip}
	for _, s := range strings.Split(c.ClusterCIDR, ",") {
		if s == "" {
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return t, fmt.Errorf("clusterCIDR: %v: %w", err, errdefs.ErrInvalidArgument)
		}
		t.ClusterCIDRs = append(t.ClusterCIDRs, p)
	}
	return t, nil
}

// facts asks what the Node shall say of its hypervisor.
func facts(ctx context.Context, d *qemu.Driver, p config.Paths, g guestimage.Guest) spherelet.Facts {
	accelerator, _ := d.Accelerator()
	f := spherelet.Facts{Accelerator: string(accelerator), GuestKernel: g.Flavour, GuestRelease: g.KernelRelease, KVM: spherelet.KVMUsable}
	if s := qemu.ProbeKVM(ctx, p.VMs); !s.Usable {
		f.KVM, f.KVMReason = spherelet.KVMUnusable, s.Reason
		if _, err := os.Stat("/dev/kvm"); errors.Is(err, os.ErrNotExist) {
			f.KVM = spherelet.KVMAbsent
		}
	}
	return f
}

// info is what `crictl info` shows of the host.
func (h *host) info() map[string]string {
	return map[string]string{
		"accelerator": h.facts.Accelerator, "kvm": h.facts.KVM, "kvmReason": h.facts.KVMReason,
		"guestKernel": h.facts.GuestKernel, "guestRelease": h.facts.GuestRelease, "dataDir": h.cfg.DataDir,
		"templates": templateInfo(h.driver),
	}
}

// Users of pod VMs, one each. Debian and systemd give out nothing between
// 65536 and 524287 (systemd's UIDS-GIDS.md).
const (
	firstUID = 400417
	uidCount = 65536
)

// vmUser is whom QEMU runs as: the one user that is named, by name or number,
// or by default count users from uid on, one a VM.
func vmUser(name string) (uid, gid, count uint32, err error) {
	if name == "" {
		return firstUID, firstUID, uidCount, nil
	}
	if n, err := strconv.ParseUint(name, 10, 31); err == nil {
		return uint32(n), uint32(n), 1, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return 0, 0, 0, fmt.Errorf("hypervisor.user is %q: %v: make the user (useradd --system), or leave the key out: %w", name, err, errdefs.ErrInvalidArgument)
	}
	id, err := strconv.ParseUint(u.Uid, 10, 32)
	group, gerr := strconv.ParseUint(u.Gid, 10, 32)
	return uint32(id), uint32(group), 1, errors.Join(err, gerr)
}

// lock keeps a second spherelet from the same run directory.
func lock(path string) (unlock func(), err error) {
	f, err := flock.Take(path)
	if held := (*flock.HeldError)(nil); errors.As(err, &held) {
		return nil, fmt.Errorf("another spherelet (pid %d) runs on %s: stop it, or use another data directory: %w",
			held.PID, filepath.Dir(path), errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}
