// Package mkfs makes empty file systems for volumes without touching their
// disks: a tool of the host makes one in a sparse file of the disk's size, and
// what it wrote there, a few hundred KiB, is what the guest writes onto the
// disk. So a host needs neither access to the disk (it may be in vSphere, or
// encrypted) nor a mount, and a guest needs no tools.
package mkfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/holes"
)

const (
	// minExt4 and MinXFS are the smallest disks that get a journal, in bytes:
	// the latter is that of xfsprogs.
	minExt4 = 16 << 20
	MinXFS  = 300 << 20

	maxExtent = 1 << 20
	blockSize = 4096
)

// A Maker makes file systems in a directory of its own. Its methods may be
// called from any goroutine.
type Maker struct {
	dir string
	// tools are programs by the file system they make.
	tools map[string]string
}

// New returns a Maker that works in dir, which it makes; what an earlier process
// left there is erased. The host needs e2fsprogs, and xfsprogs for xfs: what is
// missing is said when it is needed.
func New(dir string) (*Maker, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(dir, "fs-*"))
	if err != nil {
		return nil, err
	}
	for _, p := range left {
		if err := os.Remove(p); err != nil {
			return nil, err
		}
	}
	return &Maker{dir: dir, tools: map[string]string{"ext4": "mkfs.ext4", "xfs": "mkfs.xfs"}}, nil
}

// Format makes an empty file system of fsType, "ext4" or "xfs", for a disk of
// size bytes and calls write with each of its extents: data of at most 1 MiB, or
// nil for length zeroes. The disk reads as zeroes, but with noise only its first
// MiB does. Each file system has a UUID of its own.
//
// ErrInvalidArgument for a disk that is too small, ErrNotImplemented without the
// tool, ErrResourceExhausted if the host's disk is full; what write returns.
func (m *Maker) Format(ctx context.Context, fsType string, size int64, noise bool, write func(offset, length int64, data []byte) error) error {
	args, err := arguments(fsType, size)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(m.dir, "fs-*")
	if err != nil {
		return full(err)
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return fmt.Errorf("a file of %d bytes in %s: %w", size, m.dir, err)
	}
	if err := m.run(ctx, m.tools[fsType], append(args, f.Name()), noise); err != nil {
		return full(err)
	}
	if fsType == "xfs" && noise {
		// The log is zero in the file without having been written.
		at, length, err := xfsLog(f)
		if err != nil {
			return err
		}
		if err := write(at, length, nil); err != nil {
			return err
		}
	}
	return eachExtent(f, size, noise, write)
}

func full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

// arguments are all that decides about the file system: configuration files of
// the host do not. The features are those that Linux 6.1 has.
func arguments(fsType string, size int64) ([]string, error) {
	switch {
	case fsType == "ext4" && size >= minExt4:
		ratio := int64(16384)
		if size < 512<<20 {
			ratio = 4096
		} else if size > 4<<40 {
			ratio = 65536
		}
		return []string{
			"-q", "-F", "-b", "4096", "-I", "256", "-i", strconv.FormatInt(ratio, 10), "-m", "0", "-e", "remount-ro",
			"-O", "none,has_journal,resize_inode,ext_attr,dir_index,filetype,extent,64bit,flex_bg,metadata_csum,sparse_super,large_file,huge_file,dir_nlink,extra_isize",
			"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
		}, nil
	case fsType == "xfs" && size >= MinXFS:
		// Sectors of 4 KiB fit every disk.
		return []string{
			"-q", "-f", "-K", "-b", "size=4096", "-s", "size=4096",
			"-m", "crc=1,finobt=1,bigtime=1,inobtcount=1,reflink=1,rmapbt=0", "-i", "sparse=1",
		}, nil
	case fsType == "ext4" || fsType == "xfs":
		return nil, fmt.Errorf("a disk of %d bytes is too small for %s: claim at least %d MiB: %w", size, fsType, map[string]int64{"ext4": minExt4, "xfs": MinXFS}[fsType]>>20, errdefs.ErrInvalidArgument)
	}
	return nil, fmt.Errorf("file system %q: use ext4 or xfs: %w", fsType, errdefs.ErrInvalidArgument)
}

func (m *Maker) run(ctx context.Context, tool string, args []string, noise bool) error {
	program, err := exec.LookPath(tool)
	for _, dir := range []string{"/usr/sbin", "/sbin"} { // of a service's PATH
		if err != nil {
			program, err = exec.LookPath(filepath.Join(dir, tool))
		}
	}
	if err != nil {
		return fmt.Errorf("%s is not installed on the node: install e2fsprogs (for ext4) or xfsprogs (for xfs): %w", tool, errdefs.ErrNotImplemented)
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "MKE2FS_CONFIG=/dev/null"}
	if noise {
		cmd.Env = append(cmd.Env, "UNIX_IO_NOZEROOUT=1") // zeroes are written, not left as holes
	}
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	text := strings.TrimSpace(string(out))
	if strings.Contains(strings.ToLower(text), unix.ENOSPC.Error()) {
		err = errors.Join(err, unix.ENOSPC)
	}
	return fmt.Errorf("%s: %w: %s", tool, err, strconv.Quote(text[max(0, len(text)-512):]))
}

// eachExtent calls write with what is in a sparse file, without the blocks that
// are zero; with noise those, too, if they were written.
func eachExtent(f *os.File, size int64, noise bool, write func(int64, int64, []byte) error) error {
	buf, zero := make([]byte, maxExtent), make([]byte, blockSize)
	return holes.Data(f, size, func(at, end int64) error {
		for at < end {
			b := buf[:min(int64(len(buf)), end-at)]
			if _, err := f.ReadAt(b, at); err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			if err := eachRun(b, at, zero, noise, write); err != nil {
				return err
			}
			at += int64(len(b))
		}
		return nil
	})
}

// eachRun calls write with each run of blocks that are not all zero.
func eachRun(b []byte, at int64, zero []byte, noise bool, write func(int64, int64, []byte) error) error {
	if noise {
		return write(at, int64(len(b)), b)
	}
	from := -1
	for i := 0; i < len(b); i += blockSize {
		block := b[i:min(i+blockSize, len(b))]
		if bytes.Equal(block, zero[:len(block)]) {
			if from >= 0 {
				if err := write(at+int64(from), int64(i-from), b[from:i]); err != nil {
					return err
				}
			}
			from = -1
		} else if from < 0 {
			from = i
		}
	}
	if from < 0 {
		return nil
	}
	return write(at+int64(from), int64(len(b)-from), b[from:])
}

// xfsLog finds the log by the superblock (struct xfs_dsb of
// fs/xfs/libxfs/xfs_format.h).
func xfsLog(f io.ReaderAt) (at, length int64, err error) {
	var sb [512]byte
	if _, err := f.ReadAt(sb[:], 0); err != nil {
		return 0, 0, err
	}
	if string(sb[:4]) != "XFSB" {
		return 0, 0, fmt.Errorf("mkfs.xfs made no superblock: %w", errdefs.ErrInternal)
	}
	be := binary.BigEndian
	start := be.Uint64(sb[48:])
	group, block := start>>sb[124], start&(1<<sb[124]-1)
	bytes := int64(be.Uint32(sb[4:]))
	return (int64(group)*int64(be.Uint32(sb[84:])) + int64(block)) * bytes, int64(be.Uint32(sb[96:])) * bytes, nil
}
