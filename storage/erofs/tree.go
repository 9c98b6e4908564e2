package erofs

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// limits of Linux that no image may pass.
const (
	maxName     = 255
	maxPath     = 4096
	maxSymlinks = 255 // as containerd's fs.RootPath
)

// A node is an inode: several directory entries may hold the same one.
type node struct {
	mode     uint32 // S_IF… and the 12 permission bits
	uid, gid uint32
	nlink    uint32 // directory entries of a file; unused for directories
	rdev     uint32 // as Linux's new_encode_dev
	mtime    int64  // seconds, never negative
	mtimeNs  uint32
	size     int64  // of a regular file
	data     int64  // where a placer said the contents are
	target   string // of a symlink
	xattrs   map[string]string
	children map[string]*dirent // of a directory

	// where WriteImage put it
	nid    uint64
	layout nodeLayout
}

// nodeCost is what an entry takes in memory beside its strings, about: node,
// dirent and its part of the parent's map.
const nodeCost = 300

// A dirent is a name in a directory. layer is the last layer that mentioned
// the name or something below it, which is what whiteouts and opaque markers
// of that same layer must not hide.
type dirent struct {
	node  *node
	layer int
}

func (n *node) typ() uint32  { return n.mode & unix.S_IFMT }
func (n *node) isDir() bool  { return n.typ() == unix.S_IFDIR }
func (n *node) isReg() bool  { return n.typ() == unix.S_IFREG }
func (n *node) isLink() bool { return n.typ() == unix.S_IFLNK }

func (n *node) setMtime(t time.Time) {
	// containerd bounds times to what a file system can hold the same way.
	if t.Unix() < 0 || t.Unix() > 1<<33 {
		n.mtime, n.mtimeNs = 0, 0
		return
	}
	n.mtime, n.mtimeNs = t.Unix(), uint32(t.Nanosecond())
}

func newDir(mode uint32) *node {
	return &node{mode: unix.S_IFDIR | mode, children: map[string]*dirent{}}
}

// A Tree is the file system that layers add up to. Apply them in order, the
// lowest first. It is not safe for concurrent use.
type Tree struct {
	root    *node
	sink    sink // of Apply
	limits  Limits
	layer   int // the one being applied, from 1
	entries int // tar entries of all layers so far
	bytes   int64
	meta    int64          // bytes of memory, about
	dropped map[string]int // xattr name space → times left out: trusted.* (overlayfs would obey), what EROFS cannot hold
}

// newTree returns a Tree that is an empty directory (0755, root's).
func newTree(sink sink, limits Limits) *Tree {
	return &Tree{root: newDir(0o755), sink: sink, limits: limits.withDefaults(), dropped: map[string]int{}}
}

// resolve follows the symlinks of a directory path inside the tree, as if it
// were chrooted there: the result holds no symlink among what exists. Missing
// components stay as they are.
func (t *Tree) resolve(path string) ([]string, error) {
	rest := strings.Split(path, "/")
	slices.Reverse(rest)
	var done []string
	nodes := []*node{t.root} // nodes[i] is done[:i], nil where nothing is
	for links := 0; len(rest) > 0; {
		name := rest[len(rest)-1]
		rest = rest[:len(rest)-1]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(done) > 0 {
				done, nodes = done[:len(done)-1], nodes[:len(nodes)-1]
			}
			continue
		}
		var child *node
		if cur := nodes[len(nodes)-1]; cur != nil {
			if !cur.isDir() {
				return nil, fmt.Errorf("%q is not a directory", "/"+strings.Join(done, "/"))
			}
			if e := cur.children[name]; e != nil {
				child = e.node
			}
		}
		if child == nil || !child.isLink() {
			done, nodes = append(done, name), append(nodes, child)
			continue
		}
		if links++; links > maxSymlinks {
			return nil, fmt.Errorf("too many symlinks in %q", path)
		}
		if strings.HasPrefix(child.target, "/") {
			done, nodes = done[:0], nodes[:1]
		}
		target := strings.Split(child.target, "/")
		slices.Reverse(target)
		rest = append(rest, target...)
		if len(rest) > maxPath {
			return nil, fmt.Errorf("symlinks in %q expand without end", path)
		}
	}
	return done, nil
}

// mkdirs walks resolved components, making directories that are missing
// (0755, root's, time 0: nothing in the layer says more), and notes that the
// current layer touched them.
func (t *Tree) mkdirs(components []string) (*node, error) {
	cur := t.root
	length := 0
	for i, name := range components {
		if length += len(name) + 1; length >= maxPath {
			return nil, fmt.Errorf("a directory path of more than %d bytes", maxPath)
		}
		if len(name) > maxName {
			return nil, fmt.Errorf("a name of %d bytes, %.40q…: Linux allows %d", len(name), name, maxName)
		}
		e := cur.children[name]
		if e == nil {
			if err := t.charge(nodeCost + len(name)); err != nil {
				return nil, err
			}
			e = &dirent{node: newDir(0o755)}
			cur.children[name] = e
		}
		if !e.node.isDir() {
			return nil, fmt.Errorf("%q is not a directory", "/"+strings.Join(components[:i+1], "/"))
		}
		e.layer = t.layer
		cur = e.node
	}
	return cur, nil
}

// find returns what a path names, following symlinks in its directory part
// only, or nil.
func (t *Tree) find(path string) (*node, error) {
	dir, base := splitPath(path)
	components, err := t.resolve(dir)
	if err != nil {
		return nil, err
	}
	cur := t.root
	for _, name := range append(components, base) {
		if name == "" {
			continue
		}
		if !cur.isDir() || cur.children[name] == nil {
			return nil, nil
		}
		cur = cur.children[name].node
	}
	return cur, nil
}

// remove takes a name and all below it out of dir.
func (t *Tree) remove(dir *node, name string) {
	e := dir.children[name]
	if e == nil {
		return
	}
	delete(dir.children, name)
	t.drop(e.node)
}

// drop ends one entry's hold on n, and on all below it if n is a directory.
func (t *Tree) drop(n *node) {
	if n.isDir() {
		for _, e := range n.children {
			t.drop(e.node)
		}
		return
	}
	n.nlink--
}

// prune removes from dir everything that only lower layers have.
func (t *Tree) prune(dir *node) {
	for name, e := range dir.children {
		switch {
		case e.layer != t.layer:
			t.remove(dir, name)
		case e.node.isDir():
			t.prune(e.node)
		}
	}
}

// names returns a directory's names in EROFS's order, bytewise.
func (n *node) names() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// walk calls fn for every entry, a directory before what is in it, in
// bytewise order of names within each directory. The root's path is "/".
func (t *Tree) walk(fn func(path string, n *node) error) error {
	var visit func(path string, n *node) error
	visit = func(path string, n *node) error {
		if err := fn(path, n); err != nil || !n.isDir() {
			return err
		}
		for _, name := range n.names() {
			if err := visit(strings.TrimSuffix(path, "/")+"/"+name, n.children[name].node); err != nil {
				return err
			}
		}
		return nil
	}
	return visit("/", t.root)
}

func splitPath(path string) (dir, base string) {
	i := strings.LastIndexByte(path, '/')
	return path[:i+1], path[i+1:]
}

// encodeDev is Linux's new_encode_dev: 12 bits of major, 20 of minor.
func encodeDev(major, minor int64) uint32 {
	return uint32(minor&0xff) | uint32(major&0xfff)<<8 | uint32(minor&0xfff00)<<12
}

func decodeDev(dev uint32) (major, minor uint32) {
	return dev >> 8 & 0xfff, dev&0xff | dev>>12&0xfff00
}
