package erofs

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"

	"github.com/openatoll/atoll/storage/treesum"
)

// Manifest describes the tree that layers add up to, without writing it
// anywhere: what a container of the image should see.
func Manifest(ctx context.Context, layers []Layer, limits Limits) ([]treesum.Entry, error) {
	sums := &hashSink{}
	tree := newTree(sums, limits)
	if err := tree.applyLayers(ctx, layers); err != nil {
		return nil, err
	}
	var entries []treesum.Entry
	nodes := map[string]*node{}
	_ = tree.walk(func(path string, n *node) error {
		entries = append(entries, describe(path, n, sums))
		nodes[treesum.Text(path)] = n
		return nil
	})
	treesum.Sort(entries)
	first := map[*node]int{}
	for i := range entries {
		n := nodes[entries[i].Path]
		if n.isDir() || n.nlink < 2 {
			continue
		}
		j, ok := first[n]
		if !ok {
			first[n] = i
			continue
		}
		entries[i].Same, entries[j].Same = entries[j].Path, entries[j].Path
	}
	return entries, nil
}

func describe(path string, n *node, sums *hashSink) treesum.Entry {
	e := treesum.Entry{
		Path: treesum.Text(path), Type: treesum.TypeOf(n.mode), Mode: fmt.Sprintf("%04o", n.mode&0o7777),
		UID: n.uid, GID: n.gid, Mtime: treesum.FormatMtime(n.mtime, n.mtimeNs),
		Target: treesum.Text(n.target),
	}
	switch e.Type {
	case "file":
		e.Size, e.SHA256 = n.size, emptySum
		if n.size > 0 {
			e.SHA256 = sums.sums[n.data]
		}
	case "char", "block":
		major, minor := decodeDev(n.rdev)
		e.Device = fmt.Sprintf("%d:%d", major, minor)
	}
	if !n.isDir() {
		e.Nlink = uint64(n.nlink)
	}
	for name, value := range n.xattrs {
		if e.Xattrs == nil {
			e.Xattrs = map[string][]byte{}
		}
		e.Xattrs[name] = []byte(value)
	}
	return e
}

var emptySum = hex.EncodeToString(sha256.New().Sum(nil))

// A hashSink keeps digests in place of contents.
type hashSink struct{ sums []string }

func (h *hashSink) Put(_ context.Context, r io.Reader, size int64) (int64, error) {
	sum := sha256.New()
	if n, err := io.Copy(sum, io.LimitReader(r, size)); err != nil {
		return 0, err
	} else if n != size {
		return 0, io.ErrUnexpectedEOF
	}
	h.sums = append(h.sums, hex.EncodeToString(sum.Sum(nil)))
	return int64(len(h.sums) - 1), nil
}
