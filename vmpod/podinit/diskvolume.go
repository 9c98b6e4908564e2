package podinit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// A diskVolume is what a volume on a disk of its own has beside any other.
type diskVolume struct {
	request *agentapi.VolumeDisk
	device  string
	// base is where its file system is mounted, if that is not the volume's
	// root: below a mount with the ids of the pod's user namespace.
	base string
}

// A blankDisk waits for its file system.
type blankDisk struct {
	request *agentapi.VolumeDisk
	device  string
}

// addDisk is AddVolume for a DISK. The volume's lock is held.
func (a *agent) addDisk(ctx context.Context, r *agentapi.AddVolumeRequest) (*agentapi.AddVolumeResponse, error) {
	if r.Disk == nil {
		return nil, fmt.Errorf("no disk is named: %w", errdefs.ErrInvalidArgument)
	}
	if err := checkID("disk", r.Disk.Serial); err != nil {
		return nil, err
	}
	device, err := findDisk(ctx, r.Disk.Serial)
	if err != nil {
		return nil, err
	}
	go dropScheduler(sysBlock, device)
	ro, err := readOnlyDevice(device)
	if err != nil {
		return nil, fmt.Errorf("ask whether disk %s can be written: %w", r.Disk.Serial, err)
	}
	if ro != r.Disk.ReadOnly {
		return nil, fmt.Errorf("disk %s can be written: %t; it was to be read only: %t: %w", r.Disk.Serial, !ro, r.Disk.ReadOnly, errdefs.ErrFailedPrecondition)
	}
	v := &volume{id: r.Id, kind: r.Kind, disk: &diskVolume{request: r.Disk, device: device}}
	size, blank, err := a.openDisk(v, r)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if blank {
		a.blanks[r.Id] = &blankDisk{request: r.Disk, device: device}
	} else {
		delete(a.blanks, r.Id)
		a.volumes[r.Id] = v
	}
	return &agentapi.AddVolumeResponse{Blank: blank, Bytes: size}, nil
}

// openDisk mounts what is on a disk, if it is what the volume should have.
func (a *agent) openDisk(v *volume, r *agentapi.AddVolumeRequest) (size int64, blank bool, err error) {
	dev, err := os.Open(v.disk.device)
	if err != nil {
		return 0, false, err
	}
	defer dev.Close()
	if r.Disk.Block {
		size, err := dev.Seek(0, io.SeekEnd)
		return size, false, err
	}
	found, size, err := probeDisk(dev, r.Disk.Noise)
	if err != nil {
		return 0, false, fmt.Errorf("read disk %s: %w", r.Disk.Serial, err)
	}
	switch {
	case found.blank && r.Disk.ReadOnly:
		return 0, false, fmt.Errorf("disk %s is blank and read-only: there is nothing to read until a pod has had it writable: %w", r.Disk.Serial, errdefs.ErrFailedPrecondition)
	case found.blank:
		return size, true, nil
	case found.kind != r.Disk.FsType:
		return 0, false, fmt.Errorf("disk %s holds %s and not the %s file system that the volume is to have; it is left as it is: %w", r.Disk.Serial, found.kind, r.Disk.FsType, errdefs.ErrFailedPrecondition)
	}
	return size, false, a.mountDisk(v, r, size)
}

func (a *agent) mountDisk(v *volume, r *agentapi.AddVolumeRequest, size int64) (err error) {
	v.root = filepath.Join(a.places.volumes, r.Id)
	a.mu.Lock()
	userns := a.userns
	a.mu.Unlock()
	if userns != nil {
		v.disk.base = filepath.Join(a.places.volumes, ".disk-"+r.Id)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.unmountDisk())
		}
	}()
	base := v.mountPoint()
	if err := os.MkdirAll(base, 0o711); err != nil {
		return err
	}
	if err := mountFileSystem(v.disk.device, base, r.Disk); err != nil {
		return fmt.Errorf("mount disk %s as %s: %w", r.Disk.Serial, r.Disk.FsType, err)
	}
	if !r.Disk.ReadOnly && !readOnlyMount(base) {
		// It may have grown while no one had it.
		if err := growFileSystem(base, r.Disk.FsType, size); err != nil {
			slog.Warn("a file system cannot grow to its disk's size", "serial", r.Disk.Serial, "error", err)
		}
		if r.HasFsGroup {
			if err := giveToGroup(base, int(r.FsGroup), r.Disk.FsGroupOnRootMismatch); err != nil {
				return fmt.Errorf("give the files of disk %s to group %d: %w", r.Disk.Serial, r.FsGroup, err)
			}
		}
	}
	if userns != nil {
		return userns.mountShifted(base, v.root)
	}
	return nil
}

// mountPoint is where the file system itself is mounted.
func (v *volume) mountPoint() string {
	if v.disk.base != "" {
		return v.disk.base
	}
	return v.root
}

// mountFlags are what mount options mean to the kernel.
var mountFlags = map[string]struct{ set, clear uintptr }{
	"ro": {unix.MS_RDONLY, 0}, "rw": {0, unix.MS_RDONLY}, "defaults": {}, "async": {0, unix.MS_SYNCHRONOUS},
	"noatime": {unix.MS_NOATIME, unix.MS_RELATIME | unix.MS_STRICTATIME}, "relatime": {unix.MS_RELATIME, unix.MS_NOATIME | unix.MS_STRICTATIME},
	"strictatime": {unix.MS_STRICTATIME, unix.MS_NOATIME | unix.MS_RELATIME}, "nodiratime": {unix.MS_NODIRATIME, 0},
	"lazytime": {unix.MS_LAZYTIME, 0}, "nolazytime": {0, unix.MS_LAZYTIME},
	"nodev": {unix.MS_NODEV, 0}, "dev": {0, unix.MS_NODEV}, "nosuid": {unix.MS_NOSUID, 0}, "suid": {0, unix.MS_NOSUID},
	"noexec": {unix.MS_NOEXEC, 0}, "exec": {0, unix.MS_NOEXEC}, "sync": {unix.MS_SYNCHRONOUS, 0}, "dirsync": {unix.MS_DIRSYNC, 0},
}

// mountArguments are flags and data of a mount. Nobody trims the file systems
// of a pod, so they give up blocks as they become free, unless that is refused.
// Device nodes in them are none.
func mountArguments(d *agentapi.VolumeDisk) (flags uintptr, data []string, err error) {
	flags = unix.MS_NODEV
	discard := true
	for _, o := range d.Options {
		if o == "discard" || o == "nodiscard" {
			discard = o == "discard"
			continue
		}
		f, ok := mountFlags[o]
		if !ok {
			return 0, nil, fmt.Errorf("mount option %q is not allowed: %w", o, errdefs.ErrInvalidArgument)
		}
		flags = flags&^f.clear | f.set
	}
	if d.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if discard && flags&unix.MS_RDONLY == 0 {
		data = append(data, "discard")
	}
	switch d.FsType {
	case "ext4":
		// What the file system is not sure of must not be built upon.
		data = append(data, "errors=remount-ro")
		if !d.Noise {
			// The inode tables are zero as the disk is: writing that would fill it.
			data = append(data, "noinit_itable")
		}
	case "xfs":
		data = append(data, "nouuid") // a volume and its clone may be in one pod
	default:
		return 0, nil, fmt.Errorf("file system %q: want ext4 or xfs: %w", d.FsType, errdefs.ErrInvalidArgument)
	}
	return flags, data, nil
}

func mountFileSystem(device, dir string, d *agentapi.VolumeDisk) error {
	flags, data, err := mountArguments(d)
	if err != nil {
		return err
	}
	err = unix.Mount(device, dir, d.FsType, flags, strings.Join(data, ","))
	if errors.Is(err, unix.ENODEV) {
		channel, rest := modulesIn("/modules/" + d.FsType)
		loadModules(append(channel, rest...))
		err = unix.Mount(device, dir, d.FsType, flags, strings.Join(data, ","))
	}
	switch {
	case d.ReadOnly && errors.Is(err, unix.EROFS):
		// Without its journal, what was acknowledged would be missing.
		return fmt.Errorf("its last VM was cut off, and the journal has to be replayed, which a read-only disk cannot: let a pod mount it writable once: %w", errdefs.ErrFailedPrecondition)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("the guest's kernel has no %s: %w", d.FsType, errdefs.ErrNotImplemented)
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EIO), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("the file system is damaged, or has features that the guest's kernel does not know; it is left as it is (%w): %w", err, errdefs.ErrDataLoss)
	}
	return err
}

func readOnlyMount(dir string) bool {
	var s unix.Statfs_t
	return unix.Statfs(dir, &s) == nil && s.Flags&unix.ST_RDONLY != 0
}

// readOnlyDevice says whether the device refuses writes.
func readOnlyDevice(device string) (bool, error) {
	b, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(device), "ro"))
	return strings.TrimSpace(string(b)) == "1", err
}

// removeDisk is RemoveVolume for a DISK: all that was written goes to the disk,
// and nobody has it open afterwards.
func (v *volume) removeDisk(ctx context.Context) error {
	if v.disk.request.Block {
		return flushDevice(v.disk.device)
	}
	synced := syncFileSystem(v.mountPoint())
	if err := v.unmountDisk(); err != nil {
		return err
	}
	if err := awaitUnused(ctx, v.disk.device); err != nil {
		return err
	}
	if synced != nil {
		return fmt.Errorf("disk %s has refused writes, so that the last of them may be lost (%w): %w", v.disk.request.Serial, synced, errdefs.ErrDataLoss)
	}
	return nil
}

// unmountDisk unmounts all that mountDisk mounted; what is not mounted is well.
func (v *volume) unmountDisk() error {
	for _, dir := range []string{v.root, v.disk.base} {
		if dir == "" {
			continue
		}
		err := unix.Unmount(dir, 0)
		switch {
		case errors.Is(err, unix.EBUSY):
			return fmt.Errorf("it is still in use: %w", errdefs.ErrUnavailable)
		case err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT):
			return err
		}
		if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// unmountPatience bounds the wait for mounts that the kernel gives up behind
// the processes that had them.
const unmountPatience = 10 * time.Second

// awaitUnused waits until no file system is on a device: ended containers have
// had mounts of their own.
func awaitUnused(ctx context.Context, device string) error {
	ctx, cancel := context.WithTimeout(ctx, unmountPatience)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		fd, err := unix.Open(device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("a process of the pod still uses it: %w", errdefs.ErrUnavailable)
		}
	}
}

func syncFileSystem(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// flushDevice writes what containers have written to a raw device.
func flushDevice(device string) error {
	f, err := os.Open(device)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("the disk has refused writes, so that the last of them may be lost (%w): %w", err, errdefs.ErrDataLoss)
	}
	return nil
}
