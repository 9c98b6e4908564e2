package podinit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
)

// probeBytes is how much at either end of a disk tells what is on it.
const probeBytes = 1 << 20

// sectorBytes is what a disk writes as a whole or not at all.
const sectorBytes = 512

// formMark fills the first sector of a disk from before the first until after
// the last byte of its formatting: what else is on such a disk was written by
// nobody but us, and no one has ever used it.
var formMark = append([]byte("atoll: this disk is being formatted\n"), make([]byte, sectorBytes-36)...)

// contents says what is on a disk.
type contents struct {
	blank bool
	// kind is "ext4" (or an older ext), "xfs", or words for people; empty when
	// blank.
	kind string
}

// probeDisk looks at both ends of a disk. With noise, what lies behind the first
// MiB says nothing.
func probeDisk(dev *os.File, noise bool) (c contents, size int64, err error) {
	if size, err = dev.Seek(0, io.SeekEnd); err != nil {
		return c, 0, err
	}
	head := make([]byte, min(probeBytes, size))
	if _, err := dev.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return c, size, err
	}
	var tail []byte
	if !noise {
		tail = make([]byte, min(probeBytes, size))
		if _, err := dev.ReadAt(tail, size-int64(len(tail))); err != nil && !errors.Is(err, io.EOF) {
			return c, size, err
		}
	}
	return probe(head, tail), size, nil
}

// A signature is what a kind of content begins with, as util-linux' libblkid
// knows it.
type signature struct {
	kind   string
	offset int
	magic  string
}

// signatures in the order in which they are tried: what covers a whole disk
// before what may be left of something else.
var signatures = []signature{
	{"xfs", 0, "XFSB"},
	{"ext4", 1024 + 56, "\x53\xef"},
	{"btrfs", 64<<10 + 64, "_BHRfS_M"},
	{"a LUKS container", 0, "LUKS\xba\xbe"},
	{"a LUKS container", 16 << 10, "SKUL\xba\xbe"},
	{"an LVM physical volume", 0, "LABELONE"},
	{"an LVM physical volume", 512, "LABELONE"},
	{"an LVM physical volume", 1024, "LABELONE"},
	{"an LVM physical volume", 1536, "LABELONE"},
	{"a GPT partition table", 512, "EFI PART"},
	{"a GPT partition table", 4096, "EFI PART"},
	{"swap space", 4096 - 10, "SWAPSPACE2"},
	{"swap space", 4096 - 10, "SWAP-SPACE"},
	{"swap space", 64<<10 - 10, "SWAPSPACE2"},
	{"a RAID member", 0, "\xfc\x4e\x2b\xa9"},
	{"a RAID member", 4096, "\xfc\x4e\x2b\xa9"},
	{"f2fs", 1024, "\x10\x20\xf5\xf2"},
	{"erofs", 1024, "\xe2\xe1\xf5\xe0"},
	{"squashfs", 0, "hsqs"},
	{"jfs", 32 << 10, "JFS1"},
	{"reiserfs", 64<<10 + 52, "ReIsEr"},
	{"an ISO 9660 image", 32<<10 + 1, "CD001"},
	{"a Ceph OSD", 0, "bluestore block device"},
	{"ntfs", 3, "NTFS    "},
	{"exfat", 3, "EXFAT   "},
	{"a FAT file system", 54, "FAT1"},
	{"a FAT file system", 82, "FAT32   "},
	{"a partition table", 510, "\x55\xaa"}, // last: boot sectors of many have it
}

// tailSignatures are at the end, offsets counted from there.
var tailSignatures = []signature{
	{"a GPT partition table", 512, "EFI PART"},
	{"a GPT partition table", 4096, "EFI PART"},
	{"a RAID member", 8 << 10, "\xfc\x4e\x2b\xa9"},
	{"a RAID member", 64 << 10, "\xfc\x4e\x2b\xa9"},
}

// probe judges the first and the last bytes of a disk.
func probe(head, tail []byte) contents {
	if bytes.HasPrefix(head, formMark) {
		return contents{blank: true}
	}
	for _, s := range signatures {
		if has(head, s.offset, s.magic) {
			return contents{kind: s.kind}
		}
	}
	for _, s := range tailSignatures {
		if has(tail, len(tail)-s.offset, s.magic) {
			return contents{kind: s.kind}
		}
	}
	if at := firstByte(head); at >= 0 {
		return contents{kind: fmt.Sprintf("data of an unknown kind (at byte %d)", at)}
	}
	if at := firstByte(tail); at >= 0 {
		return contents{kind: fmt.Sprintf("data of an unknown kind (%d bytes before its end)", len(tail)-at)}
	}
	return contents{blank: true}
}

func has(b []byte, at int, magic string) bool {
	return at >= 0 && at+len(magic) <= len(b) && string(b[at:at+len(magic)]) == magic
}

// firstByte is where the first byte that is not zero is, -1 if there is none.
func firstByte(b []byte) int {
	for i := 0; i+8 <= len(b); i += 8 {
		if binary.NativeEndian.Uint64(b[i:]) != 0 {
			for b[i] == 0 {
				i++
			}
			return i
		}
	}
	for i := len(b) &^ 7; i < len(b); i++ {
		if b[i] != 0 {
			return i
		}
	}
	return -1
}
