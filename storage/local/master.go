package local

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sync/singleflight"

	"github.com/openatoll/atoll/internal/failpoint"
)

const (
	// minBytes is the smallest disk that ext4 makes sense on.
	minBytes = 16 << 20
	// steps is how many sizes there are between one power of two and the next.
	// A size has a master, which is 0.1 to 0.3 MB up to 64 GiB.
	steps = 4
	// smallestMade and largestMade bound what makeAll makes.
	smallestMade = 64 << 20
	largestMade  = 64 << 30

	mastersDir = ".masters"
)

// class is the size of the disk that is made when bytes are asked for: the next
// of the sizes 4, 5, 6, 7 times a power of two.
func class(bytes int64) int64 {
	bytes = max(bytes, minBytes)
	step := int64(1) << (bits.Len64(uint64(bytes-1)) - 1) / steps
	return (bytes + step - 1) / step * step
}

// masters are formatted disks that nobody uses, one for each size, from which
// pods' disks are copied: mkfs would cost each pod a process and 5 to 20 ms.
//
// A master is DIR/.masters/VERSION/SIZE-HASH.ext4. VERSION is that of mkfs and
// of its options, and HASH that of the content, which each copy checks: a
// damaged master is made anew.
type masters struct {
	top     string // of all versions
	mkfs    string
	quota   bool
	flights singleflight.Group
	// noClones is set once the host's file system has refused to share blocks.
	noClones atomic.Bool

	version func() (string, error)
}

func newMasters(dir, mkfs string, quota bool) *masters {
	m := &masters{top: filepath.Join(dir, mastersDir), mkfs: mkfs, quota: quota}
	m.version = sync.OnceValues(m.findVersion)
	return m
}

// options are all that decides about the file system but for its size: mkfs is
// kept from reading the host's mke2fs.conf.
//
// There is no journal, as the disk does not outlive its VM, and no backup of
// the superblock. Inode tables are left as the zeros that a sparse file reads
// as; the guest mounts with noinit_itable, or its kernel would fill them in.
// With the seed of checksums kept apart from the UUID, a copy gets a UUID of
// its own by a change of the superblock alone.
func (m *masters) options() []string {
	features := "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,metadata_csum,metadata_csum_seed," +
		"sparse_super,sparse_super2,large_file,huge_file,dir_nlink,extra_isize"
	extended := "lazy_itable_init=1,nodiscard,num_backup_sb=0,root_owner=0:0"
	if m.quota {
		features += ",quota,project"
		extended += ",quotatype=prjquota"
	}
	return []string{"-q", "-F", "-b", "4096", "-I", "256", "-L", Label, "-m", "0", "-O", features, "-E", extended}
}

// perInode is how many bytes of the disk there are for each inode, as mkfs has
// it by default: more inodes where little space is.
func perInode(class int64) int64 {
	if class < 512<<20 {
		return 4096
	}
	return 16384
}

func (m *masters) findVersion() (string, error) {
	out, err := m.command(context.Background(), "-V").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s -V: %w: %s", m.mkfs, err, strconv.Quote(strings.TrimSpace(string(out))))
	}
	sum := sha256.Sum256([]byte("1\n" + string(out) + strings.Join(m.options(), " ")))
	return hex.EncodeToString(sum[:6]), nil
}

func (m *masters) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, m.mkfs, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "MKE2FS_CONFIG=/dev/null"}
	return cmd
}

// dir is the directory of the present version.
func (m *masters) dir() (string, error) {
	v, err := m.version()
	return filepath.Join(m.top, v), err
}

// makeAll makes first and all usual sizes, and erases those of other versions.
func (m *masters) makeAll(ctx context.Context, first int64) error {
	dir, err := m.dir()
	if err != nil {
		return err
	}
	if _, err := m.find(ctx, first); err != nil {
		return err
	}
	m.tidy(dir)
	for size := int64(smallestMade); size <= largestMade && err == nil; size = class(size + 1) {
		_, err = m.find(ctx, size)
	}
	return err
}

// tidy is best effort: what it leaves is small, and the next start tries again.
func (m *masters) tidy(dir string) {
	versions, _ := os.ReadDir(m.top)
	for _, v := range versions {
		if path := filepath.Join(m.top, v.Name()); path != dir {
			_ = os.RemoveAll(path)
		}
	}
}

// find returns the path of a size's master, made if it is not there.
func (m *masters) find(ctx context.Context, class int64) (string, error) {
	dir, err := m.dir()
	if err != nil {
		return "", err
	}
	found, err := filepath.Glob(filepath.Join(dir, strconv.FormatInt(class, 10)+"-*"+suffix))
	if err != nil {
		return "", err
	}
	if len(found) > 0 {
		return found[0], nil
	}
	// Whoever waits for the maker must not fail with the maker's context.
	made := m.flights.DoChan(strconv.FormatInt(class, 10), func() (any, error) {
		return m.make(context.WithoutCancel(ctx), dir, class)
	})
	select {
	case r := <-made:
		path, _ := r.Val.(string)
		return path, r.Err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// make formats a master beside its place and renames it there.
func (m *masters) make(ctx context.Context, dir string, class int64) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if err := room(dir); err != nil {
		return "", err
	}
	// One flight at a time makes a size.
	temp := filepath.Join(dir, tempPrefix+strconv.FormatInt(class, 10))
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer f.Close()
	path, err := m.fill(ctx, f, dir, class)
	if err != nil {
		_ = os.Remove(temp) // what is wrong is said already
	}
	return path, err
}

func (m *masters) fill(ctx context.Context, f *os.File, dir string, class int64) (string, error) {
	if err := f.Truncate(class); err != nil {
		return "", err
	}
	args := append(m.options(), "-i", strconv.FormatInt(perInode(class), 10), f.Name())
	out, err := m.command(ctx, args...).CombinedOutput()
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return "", ctx.Err()
	case strings.Contains(strings.ToLower(string(out)), syscall.ENOSPC.Error()):
		return "", syscall.ENOSPC
	default:
		return "", fmt.Errorf("%s: %w: %s", m.mkfs, err, strconv.Quote(strings.TrimSpace(string(out))))
	}
	failpoint.Hit(failpoint.MasterFormatted)
	sum, err := copyData(f, nil)
	if err != nil {
		return "", err
	}
	// A master whose name is on the disk and whose content is not would only
	// be made again; it need not be synced for that.
	path := filepath.Join(dir, fmt.Sprintf("%d-%s%s", class, sum, suffix))
	if err := os.Rename(f.Name(), path); err != nil {
		return "", err
	}
	failpoint.Hit(failpoint.MasterNamed)
	return path, nil
}

// errDamaged says that a master is not what its name says.
var errDamaged = errors.New("the master is damaged")

// copyTo makes f a copy of the master of a size.
func (m *masters) copyTo(ctx context.Context, f *os.File, class int64) error {
	for try := 0; ; try++ {
		path, err := m.find(ctx, class)
		if err != nil {
			return err
		}
		err = m.copyMaster(f, path, class)
		// It may also have been damaged, found and erased by another copy.
		if try > 0 || !errors.Is(err, errDamaged) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
}

func (m *masters) copyMaster(f *os.File, path string, class int64) error {
	src, err := os.Open(path)
	if err != nil {
		return err
	}
	defer src.Close()
	if st, err := src.Stat(); err != nil || st.Size() != class {
		return fmt.Errorf("%s: %w", path, errDamaged)
	}
	if err := f.Truncate(0); err != nil { // of a first try
		return err
	}
	dst := f
	if m.share(f, src) {
		dst = nil
	} else if err := f.Truncate(class); err != nil {
		return err
	}
	sum, err := copyData(src, dst)
	if err != nil {
		return err
	}
	_, want, _ := strings.Cut(strings.TrimSuffix(filepath.Base(path), suffix), "-")
	if sum != want {
		return fmt.Errorf("%s: %w", path, errDamaged)
	}
	return nil
}
