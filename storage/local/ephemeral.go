// Package local keeps pods' writable disks as sparse files in a directory of
// the host.
package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
)

// Label is the file system label of every ephemeral disk; the guest finds the
// disk by it.
const Label = "atoll-eph"

const (
	// reserve is what must be free on the host for a disk to be made (which
	// takes 0.2 MB up to 64 GiB, 3 MB for 1 TiB).
	reserve = 8 << 20

	suffix     = ".ext4"
	tempPrefix = ".making-"
)

// A Config says where disks lie and what their file systems can do.
type Config struct {
	// Dir keeps the disks, and the masters that they are copied from.
	Dir string
	// Quota has file systems count what each project uses, and limit it. The
	// guest's kernel must know project quotas, or it refuses to mount them.
	Quota bool
}

// Ephemeral implements storage.Ephemeral. Keys are at most 128 characters of
// [A-Za-z0-9._-], the first a letter or digit.
type Ephemeral struct {
	dir     string
	masters *masters
}

var _ storage.Ephemeral = (*Ephemeral)(nil)

// NewEphemeral keeps disks in c.Dir, which it makes (0711: QEMU may run as
// another user, which is told the path; each disk is 0600). It erases what a
// Create that died left. It needs mkfs.ext4 of e2fsprogs.
func NewEphemeral(c Config) (*Ephemeral, error) {
	mkfs, err := lookMkfs()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o711); err != nil {
		return nil, fmt.Errorf("directory of the pods' disks: %w", err)
	}
	for _, pattern := range []string{tempPrefix + "*", filepath.Join(mastersDir, "*", tempPrefix+"*")} {
		left, err := filepath.Glob(filepath.Join(c.Dir, pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range left {
			if err := os.Remove(path); err != nil {
				return nil, err
			}
		}
	}
	return &Ephemeral{dir: c.Dir, masters: newMasters(c.Dir, mkfs, c.Quota)}, nil
}

// MakeMasters formats the masters of first (bytes, a disk's size) and of all
// sizes up to 64 GiB, so that no Create has to wait for one. It returns at once
// when they are there. Meant to run behind a start.
func (e *Ephemeral) MakeMasters(ctx context.Context, first int64) error {
	if err := e.masters.makeAll(ctx, class(first)); err != nil {
		return e.explain("masters", err)
	}
	return nil
}

func lookMkfs() (string, error) {
	for _, path := range []string{"mkfs.ext4", "/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4"} {
		if found, err := exec.LookPath(path); err == nil {
			return found, nil
		}
	}
	return "", fmt.Errorf("mkfs.ext4 is not installed, and pods' disks need it: apt-get install e2fsprogs: %w", errdefs.ErrFailedPrecondition)
}

var keyPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

func (e *Ephemeral) path(key string) (string, error) {
	if !keyPattern.MatchString(key) {
		return "", fmt.Errorf("%q is no key of a disk: want 1 to 128 characters of [A-Za-z0-9._-]: %w", key, errdefs.ErrInvalidArgument)
	}
	return filepath.Join(e.dir, key+suffix), nil
}

// Create implements storage.Ephemeral: an ext4 file system with a UUID of its
// own on a sparse file, copied from a master. Its size is bytes rounded up to a
// size that has one: at least 16 MiB, at most a quarter more than bytes. A disk
// that is there is returned as it is, whatever its size. Errors wrap
// ErrInvalidArgument for a bad key or size and ErrResourceExhausted when the
// host's disk is full.
func (e *Ephemeral) Create(ctx context.Context, key string, bytes int64) (string, error) {
	path, err := e.path(key)
	if err != nil {
		return "", err
	}
	if bytes <= 0 || bytes > 16<<40 {
		return "", fmt.Errorf("ephemeral disk %s of %d bytes: want more than 0 and at most 16 TiB: %w", key, bytes, errdefs.ErrInvalidArgument)
	}
	if _, err := os.Lstat(path); err == nil {
		return path, nil
	}
	if err := e.make(ctx, path, key, class(bytes)); err != nil {
		return "", e.explain(key, err)
	}
	return path, nil
}

// make fills a file beside path and links it there, so that path is whole or
// not there; of two that make the same disk, one comes first and is kept.
func (e *Ephemeral) make(ctx context.Context, path, key string, class int64) error {
	if err := room(e.dir); err != nil {
		return err
	}
	f, err := os.CreateTemp(e.dir, tempPrefix+key+"-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = e.masters.copyTo(ctx, f, class)
	if err == nil {
		err = newIdentity(f)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	failpoint.Hit(failpoint.DiskFormatted)
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	failpoint.Hit(failpoint.DiskLinked)
	return nil
}

// room is ENOSPC when the host's disk is about to be full: copying metadata
// takes little, and what it would take from a full disk others need more.
func room(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if int64(st.Bavail)*st.Bsize < reserve {
		return syscall.ENOSPC
	}
	return nil
}

// explain names the directory and the cure of a full disk.
func (e *Ephemeral) explain(key string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("ephemeral disk %s: the host's disk under %s is full: free space there or move the data directory to a larger disk: %w: %w",
			key, e.dir, err, errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("ephemeral disk %s in %s: %w", key, e.dir, err)
}

// Remove implements storage.Ephemeral.
func (e *Ephemeral) Remove(_ context.Context, key string) error {
	path, err := e.path(key)
	if err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("erase ephemeral disk %s: %w", key, err)
	}
	failpoint.Hit(failpoint.DiskErased)
	return nil
}

// List implements storage.Ephemeral; the keys are sorted.
func (e *Ephemeral) List(context.Context) ([]string, error) {
	entries, err := os.ReadDir(e.dir)
	if err != nil {
		return nil, fmt.Errorf("list ephemeral disks: %w", err)
	}
	var keys []string
	for _, entry := range entries {
		if key, ok := strings.CutSuffix(entry.Name(), suffix); ok && keyPattern.MatchString(key) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// Usage implements storage.Ephemeral: Bytes is what the disk takes on the
// host, CapacityBytes its size, AvailableBytes what the host could still give
// it. How full the file system inside is, only the guest knows. It returns
// ErrNotFound for a disk that is not there.
func (e *Ephemeral) Usage(_ context.Context, key string) (storage.Usage, error) {
	path, err := e.path(key)
	if err != nil {
		return storage.Usage{}, err
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if err == unix.ENOENT {
			return storage.Usage{}, fmt.Errorf("ephemeral disk %s is not in %s: %w", key, e.dir, errdefs.ErrNotFound)
		}
		return storage.Usage{}, fmt.Errorf("ephemeral disk %s: %w", key, err)
	}
	var host unix.Statfs_t
	if err := unix.Statfs(e.dir, &host); err != nil {
		return storage.Usage{}, fmt.Errorf("ephemeral disk %s: %w", key, err)
	}
	used := uint64(st.Blocks) * 512
	size := uint64(st.Size)
	return storage.Usage{
		Time: time.Now(), Path: path,
		Bytes: used, Inodes: 1,
		CapacityBytes:  size,
		AvailableBytes: min(size-min(used, size), host.Bavail*uint64(host.Bsize)),
	}, nil
}
