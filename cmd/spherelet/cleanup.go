package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/netplugin/proxy"
	"github.com/openatoll/atoll/netplugin/tap"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/spherelet/volumes"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/local"
	"github.com/openatoll/atoll/vmpod/guestimage"
	"github.com/openatoll/atoll/vmpod/qemu"
)

// cleanup removes every VM, tap, packet filter, mount, cgroup, pod directory
// and socket of the data directory. Images, certificates and the runtime's
// records stay: the next start makes new sandboxes. It works when the daemon
// is dead, does what it can when a part fails, and may be repeated.
func cleanup(ctx context.Context, cfg *v1alpha1.SphereletConfiguration) error {
	p := config.PathsOf(cfg)
	if _, err := os.Stat(cfg.DataDir); errors.Is(err, fs.ErrNotExist) {
		return removeRunDir(cfg)
	}
	if err := os.MkdirAll(cfg.RunDir, 0o700); err != nil {
		return err
	}
	unlock, err := lock(p.Lock)
	if err != nil {
		return err
	}
	defer unlock()
	var errs []error
	step := func(what string, err error) {
		if err != nil {
			slog.Error("clean up", "part", what, "err", err)
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
		}
	}
	vms := removeVMs(ctx, cfg, p)
	step("VMs", vms)
	step("network", removeNetwork(ctx, cfg))
	step("loop devices", detachLoops(p.KubeletReal))
	step("mounts", unmountKubelet(p.KubeletReal))
	if vms == nil { // a VM that may be left keeps its volumes
		step("volumes", freeVolumes(ctx, cfg, p))
	}
	step("pod directories", removePodDirs(p))
	step("disks", removeDisks(ctx, p))
	step("cgroups", removeCgroups("/sys/fs/cgroup", p.Cgroup))
	if len(errs) == 0 {
		step("run directory", removeRunDir(cfg))
	}
	return errors.Join(errs...)
}

// removeRunDir removes the default run directory, which is nobody else's, and
// /run/atoll once nothing else is in there. A directory that the configuration
// names may hold other things: only what is ours is removed, and then the
// directory if that was all.
func removeRunDir(cfg *v1alpha1.SphereletConfiguration) error {
	if cfg.RunDir != config.RunDir(cfg.DataDir) {
		var errs []error
		for _, name := range runDirNames {
			errs = append(errs, os.RemoveAll(filepath.Join(cfg.RunDir, name)))
		}
		if err := unix.Rmdir(cfg.RunDir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	err := os.RemoveAll(cfg.RunDir)
	if err == nil {
		if err := unix.Rmdir(filepath.Dir(cfg.RunDir)); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return err
}

// runDirNames are all that is ever in a run directory.
var runDirNames = []string{vmSocketsName, secretsName, servicesMarkName, "cri.sock", "csi.sock", "hints.sock", "kubelet", "spherelet.lock"}

// removeVMs needs no guest image: nothing is launched.
func removeVMs(ctx context.Context, cfg *v1alpha1.SphereletConfiguration, p config.Paths) error {
	if entries, err := os.ReadDir(p.VMs); err != nil || len(entries) == 0 {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	c := driverConfig(cfg, p, guestimage.Guest{Kernel: self, Initrd: self})
	c.Accelerator = qemu.AcceleratorTCG
	d, err := qemu.New(c)
	if err != nil {
		return err
	}
	defer d.Close()
	machines, err := d.List(ctx)
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, m := range machines {
		g.Go(func() error {
			if err := m.Remove(ctx); err != nil {
				return fmt.Errorf("VM %s: %w", m.Spec().ID, err)
			}
			slog.Info("VM removed", "pod_uid", m.Spec().ID.PodUID, "vm", m.Spec().ID.String())
			return nil
		})
	}
	return g.Wait()
}

// removeNetwork has nothing to do when the network namespace is gone: links
// and tables went with it.
func removeNetwork(ctx context.Context, cfg *v1alpha1.SphereletConfiguration) error {
	if cfg.NetworkNamespace != "" {
		if _, err := os.Stat(namespacePath(cfg.NetworkNamespace)); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	err := tap.Cleanup(ctx, tap.Config{StateDir: filepath.Join(cfg.DataDir, "network")})
	if _, merr := os.Stat(servicesMark(cfg)); merr == nil {
		err = errors.Join(err, proxy.Cleanup(ctx))
	}
	if rerr := os.Remove(filepath.Join(cfg.DataDir, "network", "podcidr.json")); !errors.Is(rerr, fs.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return err
}

// unmountKubelet unmounts what the kubelet mounted: tmpfs of Secrets and tokens,
// and its own directory on itself. The innermost go first. What else is
// mounted in the data directory is the user's own file system, and stays.
func unmountKubelet(dir string) error {
	real, err := filepath.EvalSymlinks(dir) // as the list has it
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(real))
	if err != nil {
		return err
	}
	slices.SortFunc(mounts, func(a, b *mountinfo.Info) int { return strings.Compare(b.Mountpoint, a.Mountpoint) })
	var errs []error
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

// detachLoops frees the loop devices that the kubelet has put on the records of
// raw volumes.
func detachLoops(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return volumes.DetachLoops(func(backing string) bool { return strings.HasPrefix(backing, real+"/") })
}

// freeVolumes ends the holds of VMs that are gone by now. The volumes stay.
func freeVolumes(ctx context.Context, cfg *v1alpha1.SphereletConfiguration, p config.Paths) error {
	if _, err := os.Stat(p.VolumeState); errors.Is(err, fs.ErrNotExist) {
		return nil // there never was one
	}
	disks, err := openVolumes(ctx, cfg, p, nil)
	if err != nil || disks == nil {
		return err
	}
	_, err = disks.Fence(ctx, storage.Holder{Host: cfg.NodeName})
	if errdefs.IsUnavailable(err) {
		slog.Warn("volumes on a datastore that is away stay held by this host", "err", err)
		return nil
	}
	return err
}

// removePodDirs erases what the kubelet keeps of pods: their volumes were in
// the guests, or are made again.
func removePodDirs(p config.Paths) error {
	return errors.Join(
		os.RemoveAll(filepath.Join(p.KubeletReal, "pods")),
		os.RemoveAll(filepath.Join(p.KubeletReal, "plugins", "kubernetes.io", "csi")),
		os.RemoveAll(p.PodLogs),
	)
}

func removeDisks(ctx context.Context, p config.Paths) error {
	if _, err := os.Stat(p.Disks); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	disks, err := local.NewEphemeral(local.Config{Dir: p.Disks})
	if err != nil {
		return err
	}
	keys, err := disks.List(ctx)
	for _, key := range keys {
		err = errors.Join(err, disks.Remove(ctx, key))
	}
	return err
}

// removeCgroups removes the groups of this data directory, and the one above
// once no other's is in there. Version 2 has one tree, version 1 several.
func removeCgroups(mount, group string) error {
	var errs []error
	for _, tree := range []string{".", "*"} {
		tops, err := filepath.Glob(filepath.Join(mount, tree, group))
		if err != nil {
			return err
		}
		for _, top := range tops {
			errs = append(errs, rmdirTree(top))
			if err := unix.Rmdir(filepath.Dir(top)); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
				errs = append(errs, fmt.Errorf("remove %s: %w", filepath.Dir(top), err))
			}
		}
	}
	return errors.Join(errs...)
}

// rmdirTree removes a group and those in it: a cgroup's files are not removed.
func rmdirTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, rmdirTree(filepath.Join(dir, e.Name())))
		}
	}
	if rerr := unix.Rmdir(dir); rerr != nil && !errors.Is(rerr, unix.ENOENT) {
		err = errors.Join(err, fmt.Errorf("remove %s: %w", dir, rerr))
	}
	return err
}
