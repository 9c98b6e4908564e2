package erofs

import (
	"encoding/binary"
	"hash/crc32"
	"slices"
	"strings"
)

// The on-disk format, from the kernel's fs/erofs/erofs_fs.h (6.1).
const (
	blockSize = 4096
	blockBits = 12

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xE0F5E1E2

	compatChecksum = 1 << 0 // SB_CHKSUM
	compatMtime    = 1 << 1 // times on disk are mtime

	inodeSize       = 64 // extended
	slotSize        = 32 // unit of node ids
	layoutPlain     = 0
	layoutInline    = 2
	direntSize      = 12
	xattrHeaderSize = 12
	xattrEntrySize  = 4

	xattrUser    = 1
	xattrTrusted = 4
)

// A nodeLayout is how WriteImage stores the data of a directory or symlink;
// file contents are always plain.
type nodeLayout struct {
	inline bool   // behind the inode, in its block
	block  uint32 // else: the first block
	size   int64  // of a directory's data
}

// xattrIndex splits a name into EROFS's name space (0: none fits) and the
// rest.
func xattrIndex(name string) (index byte, suffix string) {
	switch name {
	case "system.posix_acl_access":
		return 2, ""
	case "system.posix_acl_default":
		return 3, ""
	}
	for prefix, index := range map[string]byte{"user.": xattrUser, "trusted.": xattrTrusted, "security.": 6} {
		if suffix, ok := strings.CutPrefix(name, prefix); ok && suffix != "" {
			return index, suffix
		}
	}
	return 0, ""
}

func xattrEntryLen(name, value string) int {
	_, suffix := xattrIndex(name)
	return (xattrEntrySize + len(suffix) + len(value) + 3) &^ 3
}

// xattrSize is what a node's attributes take behind its inode.
func xattrSize(xattrs map[string]string) int {
	if len(xattrs) == 0 {
		return 0
	}
	size := xattrHeaderSize
	for name, value := range xattrs {
		size += xattrEntryLen(name, value)
	}
	return size
}

func appendXattrs(b []byte, xattrs map[string]string) []byte {
	if len(xattrs) == 0 {
		return b
	}
	b = append(b, make([]byte, xattrHeaderSize)...)
	names := make([]string, 0, len(xattrs))
	for name := range xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		index, suffix := xattrIndex(name)
		value := xattrs[name]
		b = append(b, byte(len(suffix)), index)
		b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
		b = append(append(b, suffix...), value...)
		for i := xattrEntrySize + len(suffix) + len(value); i&3 != 0; i++ {
			b = append(b, 0)
		}
	}
	return b
}

// appendInode appends the 64 bytes of n, of whose contents the keys begin at
// base. data is the inode's union: the first block, or the device number.
func appendInode(b []byte, n *node, number, nlink uint32, size, base int64) []byte {
	le := binary.LittleEndian
	layout, data := uint16(layoutPlain), n.layout.block
	switch {
	case n.layout.inline:
		layout, data = layoutInline, 0
	case n.isReg() && n.size > 0:
		data = uint32((base + n.data) >> blockBits)
	case !n.isReg() && !n.isDir() && !n.isLink():
		data = n.rdev
	}
	icount := uint16(0)
	if x := xattrSize(n.xattrs); x > 0 {
		icount = uint16((x-xattrHeaderSize)/4 + 1)
	}
	b = le.AppendUint16(b, 1|layout<<1) // extended
	b = le.AppendUint16(b, icount)
	b = le.AppendUint16(b, uint16(n.mode))
	b = le.AppendUint16(b, 0)
	b = le.AppendUint64(b, uint64(size))
	b = le.AppendUint32(b, data)
	b = le.AppendUint32(b, number)
	b = le.AppendUint32(b, n.uid)
	b = le.AppendUint32(b, n.gid)
	b = le.AppendUint64(b, uint64(n.mtime))
	b = le.AppendUint32(b, n.mtimeNs)
	b = le.AppendUint32(b, nlink)
	return append(b, make([]byte, 16)...)
}

// A super is what the superblock says of an image.
type super struct {
	rootNid   uint16
	inodes    uint64
	blocks    uint32
	metaBlock uint32
	uuid      [16]byte
}

// block returns block 0: the superblock at 1024, with its checksum.
func (s super) block() []byte {
	le := binary.LittleEndian
	b := make([]byte, blockSize)
	sb := b[superOffset:]
	le.PutUint32(sb[0:], superMagic)
	le.PutUint32(sb[8:], compatChecksum|compatMtime)
	sb[12] = blockBits
	le.PutUint16(sb[14:], s.rootNid)
	le.PutUint64(sb[16:], s.inodes)
	le.PutUint32(sb[36:], s.blocks)
	le.PutUint32(sb[40:], s.metaBlock)
	copy(sb[48:64], s.uuid[:])
	le.PutUint32(sb[4:], superChecksum(sb))
	return b
}

// superChecksum is the kernel's: crc32c without the final inversion, over the
// rest of block 0 with the checksum's own field zero.
func superChecksum(sb []byte) uint32 {
	sb = slices.Clone(sb)
	clear(sb[4:8])
	return ^crc32.Checksum(sb, crc32.MakeTable(crc32.Castagnoli))
}
