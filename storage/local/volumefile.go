package local

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/holes"
	"github.com/openatoll/atoll/storage"
)

const mib = 1 << 20

// A filer makes and judges disk files.
type filer struct {
	qemuImg, qemuIO string // empty if not installed
}

// luksIterations is how long QEMU derives a key, in milliseconds, when a volume
// is made and each time it is opened, while the guest waits. Keys are made by
// machines; they need no stretching.
const luksIterations = "50"

// luksAttempts bounds how often QEMU may fail to measure that.
const luksAttempts = 10

// passphrase is what of a key QEMU and cryptsetup are given: they want text.
func passphrase(k storage.Key) storage.Key {
	return storage.Key(base64.StdEncoding.EncodeToString(k))
}

// makeDisk makes the file of an empty volume, at once on the disk.
func (x *filer) makeDisk(ctx context.Context, d *datastore, root *os.Root, r record, key storage.Key) error {
	switch r.Disk.Format {
	case storage.FormatRaw:
		f, err := createFile(root, r.Disk)
		if err != nil {
			return err
		}
		err = size(f, r.Bytes, r.Thick)
		return errors.Join(err, f.Sync(), f.Close(), syncDir(root, disksDir))
	case storage.FormatLUKS:
		return x.makeLUKS(ctx, d, root, r, key)
	}
	return x.makeQCOW2(ctx, d, root, r.Disk, r.Bytes, r.Thick)
}

// makeQCOW2 makes a qcow2 file that is all zeroes.
func (x *filer) makeQCOW2(ctx context.Context, d *datastore, root *os.Root, f diskFile, bytes int64, thick bool) error {
	options := "preallocation=off"
	if thick {
		options = "preallocation=falloc"
	}
	return x.create(ctx, d, root, f, "-o", options, "--", d.path(f.path()), strconv.FormatInt(bytes, 10))
}

// createFile makes a file that was not there, for its owner alone.
func createFile(root *os.Root, f diskFile) (*os.File, error) {
	return root.OpenFile(f.path(), os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
}

// size makes a file so large, and its bytes its own if it is thick.
func size(f *os.File, bytes int64, thick bool) error {
	if err := f.Truncate(bytes); err != nil {
		return err
	}
	if !thick {
		return nil
	}
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, bytes)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP):
			return fmt.Errorf("its file system cannot reserve space (fallocate): use a thin policy there: %w", errdefs.ErrFailedPrecondition)
		case err != nil:
			return &fs.PathError{Op: "fallocate", Path: f.Name(), Err: err}
		}
		return nil
	}
}

// makeLUKS makes an encrypted disk whose first MiB reads as zeroes.
func (x *filer) makeLUKS(ctx context.Context, d *datastore, root *os.Root, r record, key storage.Key) error {
	path := d.path(r.Disk.path())
	for attempt := 1; ; attempt++ {
		err := x.create(ctx, d, root, r.Disk, "--object", keyObject, "-o", "key-secret=key,iter-time="+luksIterations,
			"--", path, strconv.FormatInt(r.Bytes, 10), key)
		if err == nil {
			break
		}
		// QEMU measures how fast it derives keys by a clock that counts ticks,
		// and gives up if it has seen none (qcrypto_pbkdf2_count_iters).
		if attempt == luksAttempts || !strings.Contains(err.Error(), "accurate CPU usage") {
			return err
		}
		if err := erase(root, r.Disk.path()); err != nil {
			return err
		}
	}
	image := "driver=luks,key-secret=key,file.driver=file,file.filename=" + strings.ReplaceAll(path, ",", ",,")
	if err := run(ctx, key, x.qemuIO, "--object", keyObject, "-c", "write -P 0 0 1M", "-c", "flush", "--image-opts", image); err != nil {
		return err
	}
	f, err := root.OpenFile(r.Disk.path(), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	offset, err := luksPayload(f)
	if err == nil {
		err = size(f, offset+r.Bytes, r.Thick)
	}
	return errors.Join(err, f.Sync(), f.Close(), syncDir(root, disksDir))
}

// keyObject is a secret that comes by a pipe.
const keyObject = "secret,id=key,format=raw,file=/proc/self/fd/3"

// create runs qemu-img create. A key at the end is not an argument but what
// the secret reads.
func (x *filer) create(ctx context.Context, d *datastore, root *os.Root, f diskFile, args ...any) error {
	made, err := createFile(root, f) // ours, and 0600 before anything is in it
	if err != nil {
		return err
	}
	made.Close()
	var key storage.Key
	argv := []string{"create", "-q", "-f", f.Format}
	for _, a := range args {
		if k, ok := a.(storage.Key); ok {
			key = k
			continue
		}
		argv = append(argv, a.(string))
	}
	if err := run(ctx, key, x.qemuImg, argv...); err != nil {
		return err
	}
	return syncFile(root, f)
}

func syncFile(root *os.Root, f diskFile) error {
	h, err := root.OpenFile(f.path(), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	return errors.Join(h.Sync(), h.Close(), syncDir(root, disksDir))
}

// run runs a tool of QEMU's to its end; a key reaches it through descriptor 3.
func run(ctx context.Context, key storage.Key, tool string, args ...string) error {
	if tool == "" {
		return fmt.Errorf("qemu-img and qemu-io are not installed: apt-get install qemu-utils: %w", errdefs.ErrFailedPrecondition)
	}
	cmd := exec.CommandContext(ctx, tool, args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}
	if key != nil {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		// It fits into the pipe, so that this waits for nobody.
		_, err = w.Write(passphrase(key))
		if err = errors.Join(err, w.Close()); err != nil {
			return err
		}
		cmd.ExtraFiles = []*os.File{r}
	}
	out, err := cmd.CombinedOutput()
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil && strings.Contains(strings.ToLower(string(out)), syscall.ENOSPC.Error()): // the C library begins it with a capital
		return fmt.Errorf("%s: %w", strings.TrimSpace(string(out)), syscall.ENOSPC)
	case err != nil:
		return fmt.Errorf("%s: %w: %s", tool, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// overlay makes a qcow2 file that begins as what is below it. That is named in
// it for people and their tools alone: Atoll goes by its records.
func (x *filer) overlay(ctx context.Context, d *datastore, root *os.Root, f diskFile, below diskFile, bytes int64) error {
	return x.create(ctx, d, root, f, "-u", "-b", below.Name, "-F", below.Format, "--", d.path(f.path()), strconv.FormatInt(bytes, 10))
}

// grow makes a file larger that nobody has open.
func (x *filer) grow(ctx context.Context, d *datastore, root *os.Root, r record, bytes int64) error {
	f, err := root.OpenFile(r.Disk.path(), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	switch r.Disk.Format {
	case storage.FormatRaw:
		err = size(f, bytes, r.Thick)
	case storage.FormatLUKS:
		var offset int64
		if offset, err = luksPayload(f); err == nil {
			err = size(f, offset+bytes, r.Thick)
		}
	default:
		var is int64
		if is, err = qcow2Size(f); err == nil && is < bytes {
			how := "--preallocation=off"
			if r.Thick {
				how = "--preallocation=falloc"
			}
			err = run(ctx, nil, x.qemuImg, "resize", "-q", "-f", "qcow2", how, d.path(r.Disk.path()), strconv.FormatInt(bytes, 10))
		}
	}
	return errors.Join(err, f.Sync())
}

// check refuses files that are not what the record says.
func check(root *os.Root, r record) error {
	for i, df := range r.chain() {
		if err := checkFile(root, r, df, i == 0); err != nil {
			return err
		}
	}
	return nil
}

func checkFile(root *os.Root, r record, df diskFile, own bool) error {
	f, err := root.OpenFile(df.path(), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return damaged(r.ID, "its file %s is gone", df.path())
	}
	if err != nil {
		return damaged(r.ID, "its file %s cannot be opened: %v", df.path(), err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return damaged(r.ID, "%s is not a file (%v)", df.path(), err)
	}
	is := st.Size()
	switch df.Format {
	case storage.FormatLUKS:
		offset, err := luksPayload(f)
		if err != nil {
			return damaged(r.ID, "%s: %v", df.path(), err)
		}
		is -= offset
	case storage.FormatQCOW2:
		if is, err = qcow2Size(f); err != nil {
			return damaged(r.ID, "%s: %v", df.path(), err)
		}
	}
	// What lies below may be smaller; a file may have grown whose record does
	// not say so yet.
	if own && is != r.Bytes && (r.Growing == 0 || is < r.Bytes || is > r.Growing) {
		return damaged(r.ID, "%s is a disk of %d bytes, its record says %d", df.path(), is, r.Bytes)
	}
	return nil
}

// luksPayload is where the data begin in a LUKS1 file (LUKS On-Disk Format
// Specification 1.2.3, figure 1).
func luksPayload(f *os.File) (int64, error) {
	b := make([]byte, 112)
	if _, err := f.ReadAt(b, 0); err != nil || string(b[:8]) != "LUKS\xba\xbe\x00\x01" {
		return 0, fmt.Errorf("no LUKS header is where it should begin (%v)", err)
	}
	return int64(binary.BigEndian.Uint32(b[104:])) * 512, nil
}

// qcow2Size is the size of the disk in a qcow2 file (docs/interop/qcow2.txt of
// QEMU).
func qcow2Size(f *os.File) (int64, error) {
	b := make([]byte, 32)
	if _, err := f.ReadAt(b, 0); err != nil || string(b[:4]) != "QFI\xfb" {
		return 0, fmt.Errorf("no qcow2 header is where it should begin (%v)", err)
	}
	return int64(binary.BigEndian.Uint64(b[24:])), nil
}

// reflink has two files share all blocks, apart from then on.
func (d *datastore) reflink(dst, src *os.File) bool {
	if d.noClones.Load() {
		return false
	}
	err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENOSYS) {
		d.noClones.Store(true)
	}
	return err == nil
}

// copyStep bounds what is copied between two looks at the context.
const copyStep = 64 << 20

// copySparse copies the data of src and leaves its holes.
func copySparse(ctx context.Context, dst, src *os.File, progress func(done, total int64)) error {
	st, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(st.Size()); err != nil {
		return err
	}
	done, total := int64(0), int64(0)
	err = holes.Data(src, st.Size(), func(start, end int64) error {
		total += end - start
		return nil
	})
	if err != nil {
		return err
	}
	return holes.Data(src, st.Size(), func(at, end int64) error {
		for at < end {
			if err := ctx.Err(); err != nil {
				return err
			}
			from, to := at, at
			n, err := unix.CopyFileRange(int(src.Fd()), &from, int(dst.Fd()), &to, int(min(copyStep, end-at)), 0)
			if err != nil {
				return &fs.PathError{Op: "copy", Path: src.Name(), Err: err}
			}
			if n == 0 {
				return fmt.Errorf("%s ends at %d while it is copied: %w", src.Name(), at, errdefs.ErrUnavailable)
			}
			at, done = at+int64(n), done+int64(n)
			progress(done, total)
		}
		return nil
	})
}
