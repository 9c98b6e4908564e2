package local

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"hash/crc32"
	"os"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/holes"
)

// share gives f the blocks of src, where the host's file system can (XFS,
// btrfs): the two are told apart as they are written.
func (m *masters) share(f, src *os.File) bool {
	if m.noClones.Load() {
		return false
	}
	if err := unix.IoctlFileClone(int(f.Fd()), int(src.Fd())); err != nil {
		m.noClones.Store(true)
		return false
	}
	return true
}

// copyData copies all blocks of a sparse file that are not zeros to dst, whose
// size is that of src, and returns a hash of them. A nil dst is left out.
func copyData(src, dst *os.File) (string, error) {
	h := sha256.New()
	buf := make([]byte, copyBuffer)
	st, err := src.Stat()
	if err != nil {
		return "", err
	}
	err = holes.Data(src, st.Size(), func(at, end int64) error {
		for at < end {
			n, err := src.ReadAt(buf[:min(copyBuffer, end-at)], at)
			if n == 0 && err != nil {
				return fmt.Errorf("read %s: %w", src.Name(), err)
			}
			if err := copyBlocks(h, dst, buf[:n], at); err != nil {
				return err
			}
			at += int64(n)
		}
		return nil
	})
	return hex.EncodeToString(h.Sum(nil)[:16]), err
}

const (
	copyBuffer = 256 << 10
	block      = 4096
)

var zeros [block]byte

// copyBlocks hashes and writes the blocks in b, at most a write for each run of
// blocks that are not zeros.
func copyBlocks(h hash.Hash, dst *os.File, b []byte, at int64) error {
	run := 0 // begins here in b
	flush := func(end int) error {
		if end == run || dst == nil {
			return nil
		}
		_, err := dst.WriteAt(b[run:end], at+int64(run))
		return err
	}
	for i := 0; i < len(b); i += block {
		this := b[i:min(i+block, len(b))]
		if bytes.Equal(this, zeros[:len(this)]) {
			if err := flush(i); err != nil {
				return err
			}
			run = i + len(this)
			continue
		}
		var where [8]byte
		binary.LittleEndian.PutUint64(where[:], uint64(at+int64(i)))
		_, _ = h.Write(where[:]) // a hash gives no errors
		_, _ = h.Write(this)
	}
	return flush(len(b))
}

// Offsets in ext4's superblock, which begins at 1024
// (Documentation/filesystems/ext4/super.rst).
const (
	superAt       = 1024
	superBytes    = 1024
	superMagic    = 0x38
	superIncompat = 0x60
	superUUID     = 0x68
	superHashSeed = 0xEC
	superChecksum = 0x3FC

	ext4Magic    = 0xEF53
	incompatSeed = 0x2000
)

// newIdentity gives a copied file system a UUID and a seed for its directories'
// hashes of its own.
func newIdentity(f *os.File) error {
	sb := make([]byte, superBytes)
	if _, err := f.ReadAt(sb, superAt); err != nil {
		return fmt.Errorf("superblock of %s: %w", f.Name(), err)
	}
	if binary.LittleEndian.Uint16(sb[superMagic:]) != ext4Magic || binary.LittleEndian.Uint32(sb[superIncompat:])&incompatSeed == 0 {
		return fmt.Errorf("%s has no ext4 whose UUID can be changed", f.Name())
	}
	id := make([]byte, 32)
	if _, err := rand.Read(id); err != nil {
		return err
	}
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // version 4, RFC 9562
	copy(sb[superUUID:], id[:16])
	copy(sb[superHashSeed:], id[16:])
	// The kernel's crc32c is not inverted at its end.
	sum := ^crc32.Checksum(sb[:superChecksum], crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(sb[superChecksum:], sum)
	_, err := f.WriteAt(sb, superAt)
	return err
}
