package podinit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// deviceTimeout is how long a disk or NIC that the host has plugged may take
// to show up.
const deviceTimeout = 10 * time.Second

// findDisk waits for the disk of a serial and returns its device.
func findDisk(ctx context.Context, serial string) (string, error) {
	var dev string
	err := waitDevice(ctx, "disk "+serial, deviceTimeout, func() (bool, error) {
		dev = diskBySerial(sysBlock, serial)
		if dev == "" {
			return false, nil
		}
		_, err := os.Stat("/dev/" + dev) // devtmpfs follows sysfs
		return err == nil, nil
	})
	return "/dev/" + dev, err
}

// diskBySerial looks for virtio-blk's serial and for SCSI's unit serial number
// page (VPD 0x80: four bytes of header, then text).
func diskBySerial(sysBlock, serial string) string {
	entries, _ := os.ReadDir(sysBlock)
	for _, e := range entries {
		dir := filepath.Join(sysBlock, e.Name())
		if b, err := os.ReadFile(filepath.Join(dir, "serial")); err == nil && string(bytes.TrimSpace(b)) == serial {
			return e.Name()
		}
		if b, err := os.ReadFile(filepath.Join(dir, "device", "vpd_pg80")); err == nil && len(b) > 4 && string(bytes.TrimSpace(b[4:])) == serial {
			return e.Name()
		}
	}
	return ""
}

// mountEphemeral mounts the pod's writable disk, or a tmpfs if it has none.
func mountEphemeral(ctx context.Context, serial, dir string) error {
	if mounted(dir) {
		return nil
	}
	if serial == "" {
		if err := unix.Mount("ephemeral", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0711"); err != nil {
			return fmt.Errorf("tmpfs for the writable layers: %w", err)
		}
		return nil
	}
	dev, err := findDisk(ctx, serial)
	if err != nil {
		return err
	}
	go dropScheduler(sysBlock, dev)
	// The inode tables are left as the host's mkfs left them: zeroing them in
	// the background would fill a sparse file.
	const options = "discard,noinit_itable"
	err = unix.Mount(dev, dir, "ext4", unix.MS_NOATIME|unix.MS_NODEV, options+",prjquota")
	if errors.Is(err, unix.EINVAL) { // one without quotas
		err = unix.Mount(dev, dir, "ext4", unix.MS_NOATIME|unix.MS_NODEV, options)
	}
	if err != nil {
		return fmt.Errorf("mount the ephemeral disk %s (%s): %w", serial, dev, err)
	}
	return nil
}

// mounted says whether something is mounted on a directory.
func mounted(dir string) bool {
	var a, b unix.Stat_t
	return unix.Stat(dir, &a) == nil && unix.Stat(filepath.Dir(dir), &b) == nil && a.Dev != b.Dev
}

// imageMounts mounts each image disk once, for all containers of the pod.
type imageMounts struct {
	dir  string
	mu   sync.Mutex
	refs map[string]int
	busy map[string]*sync.Mutex
}

func newImageMounts(dir string) *imageMounts {
	return &imageMounts{dir: dir, refs: map[string]int{}, busy: map[string]*sync.Mutex{}}
}

func (m *imageMounts) lock(serial string) func() {
	m.mu.Lock()
	l, ok := m.busy[serial]
	if !ok {
		l = &sync.Mutex{}
		m.busy[serial] = l
	}
	m.mu.Unlock()
	l.Lock()
	return l.Unlock
}

// acquire returns the directory where the image is mounted. No serial means
// an image without a file in it.
func (m *imageMounts) acquire(ctx context.Context, serial string) (string, error) {
	if serial == "" {
		dir := filepath.Join(m.dir, "_empty")
		return dir, os.MkdirAll(dir, 0o755)
	}
	if err := checkID("disk", serial); err != nil {
		return "", err
	}
	defer m.lock(serial)()
	dir := filepath.Join(m.dir, serial)
	if m.count(serial, 0) > 0 {
		m.count(serial, 1)
		return dir, nil
	}
	dev, err := findDisk(ctx, serial)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount(dev, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
		return "", fmt.Errorf("mount the image disk %s (%s): %w", serial, dev, err)
	}
	m.count(serial, 1)
	return dir, nil
}

func (m *imageMounts) count(serial string, add int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.refs[serial] += add
	return m.refs[serial]
}

// release unmounts an image with its last container, so that the host can
// unplug its disk.
func (m *imageMounts) release(serial string) error {
	if serial == "" {
		return nil
	}
	defer m.lock(serial)()
	if m.count(serial, -1) > 0 {
		return nil
	}
	return detach(filepath.Join(m.dir, serial))
}

// detach unmounts what may be busy or gone.
func detach(dir string) error {
	err := unix.Unmount(dir, unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
