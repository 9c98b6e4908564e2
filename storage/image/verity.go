package image

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// fs-verity has the kernel check each block of a file against a tree of hashes
// whenever it reads it from the disk, for all readers: what is wrong is a read
// that fails (EIO). The file can no longer be written. Its seal, the digest over
// the tree's root and the file's size, is had in constant time; a file that has
// the seal it was made with need not be read to know what a read will give.
//
// ext4 and f2fs have it since Linux 5.4, btrfs since 5.15, XFS not; the kernel
// needs CONFIG_FS_VERITY (Debian's have it), and ext4 the feature (mkfs.ext4 -O
// verity, or tune2fs -O verity), which mkfs does not turn on by itself. Blocks
// of hashes that are smaller than a page, and ext4 whose blocks are, came with
// 6.3. A seal costs one SHA-256 of the file when it is made, and a wait until
// the file is written to the disk (on kernels that drop it from memory then, a
// first read from there), 0.8 % of its size on the disk, and a SHA-256 of each
// block that comes from there. Direct I/O becomes buffered.

// A sealer seals files, as fs-verity does.
type sealer interface {
	// seal makes a file that nobody has open for writing what it is for good.
	seal(path string) error
	// measure returns the seal of a file that has one.
	measure(path string) (digest.Digest, error)
}

// fsVerity is the kernel's own sealer.
type fsVerity struct{}

// busy bounds the wait for somebody who has the file open for writing: a child
// of this process between fork and exec, which has all that its parent has.
const busy = 2 * time.Second

func (fsVerity) seal(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	arg := unix.FsverityEnableArg{Version: 1, Hash_algorithm: unix.FS_VERITY_HASH_ALG_SHA256, Block_size: uint32(os.Getpagesize())}
	for deadline := time.Now().Add(busy); ; time.Sleep(5 * time.Millisecond) {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg)))
		switch {
		case errno == 0:
			return nil
		case errno == unix.ETXTBSY && time.Now().Before(deadline):
		default:
			return &os.PathError{Op: "FS_IOC_ENABLE_VERITY", Path: path, Err: errno}
		}
	}
}

func (fsVerity) measure(path string) (digest.Digest, error) {
	f, err := openPart(path, os.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var arg struct {
		unix.FsverityDigest
		sum [32]byte
	}
	arg.Size = uint16(len(arg.sum))
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_MEASURE_VERITY, uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return "", &os.PathError{Op: "FS_IOC_MEASURE_VERITY", Path: path, Err: errno}
	}
	if arg.Algorithm != unix.FS_VERITY_HASH_ALG_SHA256 {
		return "", fmt.Errorf("%s is sealed with hash %d, not SHA-256", path, arg.Algorithm)
	}
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(arg.sum[:])), nil
}

// probeSealer returns nil if files of the store cannot be sealed.
func (s *Store) probeSealer(with sealer) sealer {
	err := s.trySealer(with)
	switch {
	case err == nil:
		s.log.Info("image layers are sealed with fs-verity")
		return with
	case errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EOPNOTSUPP):
		s.log.Debug("image layers are not sealed: the file system has no fs-verity", "error", err)
	default:
		s.log.Warn("image layers are not sealed: fs-verity does not work", "error", err)
	}
	return nil
}

func (s *Store) trySealer(with sealer) error {
	f, err := s.tempFile(s.layerDir())
	if err != nil {
		return err
	}
	defer f.discard()
	if _, err := f.WriteString("sealed?"); err != nil {
		return err
	}
	if err := f.finish(); err != nil {
		return err
	}
	if err := with.seal(f.Name()); err != nil {
		return err
	}
	_, err = with.measure(f.Name())
	return err
}

// keepSealed names a file that is whole, and returns its seal; none where
// there is no fs-verity, or it fails: such a file is read again after a boot.
func (s *Store) keepSealed(f *tempFile, path string) (seal digest.Digest, err error) {
	if err := f.finish(); err != nil {
		return "", err
	}
	if s.sealer != nil {
		if err = s.sealer.seal(f.Name()); err == nil {
			seal, err = s.sealer.measure(f.Name())
		}
		if err != nil {
			s.log.Warn("a file of images could not be sealed with fs-verity", "file", path, "error", err)
			seal = ""
		}
	}
	return seal, os.Rename(f.Name(), path)
}

// sealed says that the kernel gives nothing of the file at path but what had
// this seal.
func (s *Store) sealed(path string, seal digest.Digest) bool {
	if s.sealer == nil || seal == "" {
		return false
	}
	now, err := s.sealer.measure(path)
	return err == nil && now == seal
}

// layerSealed says so of both files of a layer.
func (s *Store) layerSealed(id digest.Digest, rec layerRecord) bool {
	return s.sealed(s.layerPath(id, dataSuffix), rec.DataSeal) && s.sealed(s.layerPath(id, indexSuffix), rec.IndexSeal)
}
