package erofs

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// write writes the tree's metadata, an EROFS image but for the contents of
// files: they follow behind it, data bytes in all, and their keys are offsets
// there, multiples of 4096. It returns the metadata's size. What it writes
// depends on the tree, the keys and uuid alone.
func (t *Tree) write(w io.Writer, data int64, uuid [16]byte) (int64, error) {
	l := &imageLayout{tree: t, next: blockSize}
	l.placeBlocks()
	metaBlock := l.next >> blockBits
	l.placeInodes()
	total := align(l.next+l.metaSize, blockSize)
	if (total+data)>>blockBits > 1<<32-1 {
		return 0, fmt.Errorf("an image of %d GiB: EROFS ends at 16 TiB: %w", (total+data)>>30, errdefs.ErrOutOfRange)
	}
	l.base = total
	head := super{
		rootNid:   uint16(t.root.nid),
		inodes:    uint64(len(l.order)),
		blocks:    uint32((total + data) >> blockBits),
		metaBlock: uint32(metaBlock),
		uuid:      uuid,
	}
	buf := bufio.NewWriterSize(w, 256<<10)
	if _, err := buf.Write(head.block()); err != nil {
		return 0, err
	}
	if err := l.write(buf); err != nil {
		return 0, err
	}
	return total, buf.Flush()
}

// An imageLayout decides where everything goes: first the blocks of large
// directories and long symlinks, then the inodes.
type imageLayout struct {
	tree     *Tree
	next     int64   // end of what has a place, before the inodes
	order    []*node // every inode once, in the order written
	parents  map[*node]*node
	metaSize int64
	base     int64 // where the contents of files begin
}

// firstSlot keeps node id 0 unused: it is the inode number that user space
// sees, and 0 means "none" there.
const firstSlot = 2

// placeBlocks decides which directories and symlinks are stored behind their
// inodes, and gives the others blocks.
func (l *imageLayout) placeBlocks() {
	seen := map[*node]bool{}
	l.parents = map[*node]*node{l.tree.root: l.tree.root}
	_ = l.tree.walk(func(_ string, n *node) error {
		if n.nlink > 1 {
			if seen[n] {
				return nil
			}
			seen[n] = true
		}
		l.order = append(l.order, n)
		n.layout = nodeLayout{}
		tail := l.tail(n)
		if n.isDir() {
			n.layout.size = tail
			for _, e := range n.children {
				if e.node.isDir() {
					l.parents[e.node] = n
				}
			}
		}
		switch {
		case tail == 0:
		case inlineFits(n, tail):
			n.layout.inline = true
		default:
			n.layout.block = uint32(l.next >> blockBits)
			l.next += align(tail, blockSize)
		}
		return nil
	})
}

// inlineFits: the kernel wants inline data in one block with nothing of it
// crossing; a node that would leave much of a block empty gets its own.
func inlineFits(n *node, tail int64) bool {
	head := int64(inodeSize + xattrSize(n.xattrs))
	return tail <= blockSize/2 && head+tail <= blockSize
}

// tail is the size of what is stored behind n's inode or in blocks.
func (l *imageLayout) tail(n *node) int64 {
	switch {
	case n.isDir() && n.layout.size > 0:
		return n.layout.size
	case n.isDir():
		return dirSize(n.names())
	case n.isLink():
		return int64(len(n.target))
	}
	return 0
}

// placeInodes gives every inode its node id, such that neither the fixed part
// with the head of the attributes nor inline data crosses a block.
func (l *imageLayout) placeInodes() {
	off := int64(firstSlot * slotSize)
	for _, n := range l.order {
		xattrs := int64(xattrSize(n.xattrs))
		need := int64(inodeSize) + min(xattrs, xattrHeaderSize)
		var inline int64
		if n.layout.inline {
			inline = l.tail(n)
			need = inodeSize + xattrs + inline
		}
		if off%blockSize+need > blockSize {
			off = align(off, blockSize)
		}
		n.nid = uint64(off / slotSize)
		off = align(off+inodeSize+xattrs+inline, slotSize)
	}
	l.metaSize = off
}

func (l *imageLayout) write(w io.Writer) error {
	var b []byte
	for _, n := range l.order { // the blocks, in the order placeBlocks gave
		if n.layout.inline || l.tail(n) == 0 {
			continue
		}
		b = l.appendTail(b[:0], n)
		b = pad(b, align(int64(len(b)), blockSize)-int64(len(b)))
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	var off int64
	for i, n := range l.order {
		b = pad(b[:0], int64(n.nid)*slotSize-off)
		b = appendInode(b, n, uint32(i+1), l.nlink(n), l.size(n), l.base)
		b = appendXattrs(b, n.xattrs)
		if n.layout.inline {
			b = l.appendTail(b, n)
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		off += int64(len(b))
	}
	b = pad(b[:0], align(off, blockSize)-off)
	_, err := w.Write(b)
	return err
}

func (l *imageLayout) size(n *node) int64 {
	switch {
	case n.isReg():
		return n.size
	case n.isDir():
		return n.layout.size
	}
	return int64(len(n.target))
}

func (l *imageLayout) nlink(n *node) uint32 {
	if !n.isDir() {
		return n.nlink
	}
	links := uint32(2)
	for _, e := range n.children {
		if e.node.isDir() {
			links++
		}
	}
	return links
}

func (l *imageLayout) appendTail(b []byte, n *node) []byte {
	if n.isLink() {
		return append(b, n.target...)
	}
	return l.appendDir(b, n)
}

// dirNames returns what a directory lists, "." and ".." among the names: the
// kernel searches the whole by bisection.
func dirNames(names []string) []string {
	all := make([]string, 0, len(names)+2)
	dots := []string{".", ".."}
	for _, name := range names {
		for len(dots) > 0 && dots[0] < name {
			all, dots = append(all, dots[0]), dots[1:]
		}
		all = append(all, name)
	}
	return append(all, dots...)
}

// dirBlocks cuts a directory's names into blocks, each an array of entries
// and then the names.
func dirBlocks(names []string, block func(names []string, size int)) {
	names = dirNames(names)
	start, size := 0, 0
	for i, name := range names {
		need := direntSize + len(name)
		if size+need > blockSize {
			block(names[start:i], size)
			start, size = i, 0
		}
		size += need
	}
	block(names[start:], size)
}

func dirSize(names []string) int64 {
	var total int64
	dirBlocks(names, func(_ []string, size int) {
		total = align(total, blockSize) + int64(size)
	})
	return total
}

func (l *imageLayout) appendDir(b []byte, dir *node) []byte {
	le := binary.LittleEndian
	start := len(b)
	first := true
	dirBlocks(dir.names(), func(names []string, _ int) {
		if !first {
			b = pad(b, align(int64(len(b)-start), blockSize)-int64(len(b)-start))
		}
		first = false
		nameOff := len(names) * direntSize
		for _, name := range names {
			n := l.entry(dir, name)
			b = le.AppendUint64(b, n.nid)
			b = le.AppendUint16(b, uint16(nameOff))
			b = append(b, fileType(n.mode), 0)
			nameOff += len(name)
		}
		for _, name := range names {
			b = append(b, name...)
		}
	})
	return b
}

func (l *imageLayout) entry(dir *node, name string) *node {
	switch name {
	case ".":
		return dir
	case "..":
		return l.parents[dir]
	}
	return dir.children[name].node
}

// fileType is Linux's FT_*, as in directory entries.
func fileType(mode uint32) byte {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return 1
	case unix.S_IFDIR:
		return 2
	case unix.S_IFCHR:
		return 3
	case unix.S_IFBLK:
		return 4
	case unix.S_IFIFO:
		return 5
	case unix.S_IFSOCK:
		return 6
	case unix.S_IFLNK:
		return 7
	}
	return 0
}

func align(n, to int64) int64 { return (n + to - 1) / to * to }

// pad appends n zero bytes.
func pad(b []byte, n int64) []byte {
	return append(b, make([]byte, n)...)
}
