package erofs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// whiteout names of OCI layers (image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"

	paxXattr = "SCHILY.xattr."
)

// A sink keeps the contents of files that a Tree holds.
type sink interface {
	// Put keeps size bytes of r and returns a key for them. Size is never 0.
	Put(ctx context.Context, r io.Reader, size int64) (int64, error)
}

// Apply merges one layer, an uncompressed tar stream, over what is there. It
// does what containerd's archive.Apply does on a directory, but for these,
// where it follows the specification or tar: a whiteout or opaque marker hides
// nothing of its own layer, whatever the order of entries; "./" sets the
// attributes of the root; old GNU sparse files are files; names that climb out
// of the root are refused; and a directory's time is not changed by layers
// that only change what is in it. A Tree is of no use after an error.
// Errors wrap ErrDataLoss for a malformed layer and ErrOutOfRange for one that
// passes a limit; others are the sink's or the context's.
func (t *Tree) Apply(ctx context.Context, r io.Reader) error {
	t.layer++
	return eachEntry(ctx, r, func(hdr *tar.Header, body io.Reader) error {
		return t.entry(hdr, func(size int64) (int64, error) { return putContents(ctx, t.sink.Put, body, size) })
	})
}

// eachEntry calls do for each entry of a tar stream and gives what goes wrong
// the entry's name and a class.
func eachEntry(ctx context.Context, r io.Reader, do func(*tar.Header, io.Reader) error) error {
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return readError(err)
		}
		if err := do(hdr, tr); err != nil {
			return entryError(hdr.Name, err)
		}
	}
}

func entryError(name string, err error) error {
	if isOurs(err) {
		return fmt.Errorf("entry %.200q: %w", name, err)
	}
	return fmt.Errorf("entry %.200q: %w: %w", name, err, errdefs.ErrDataLoss)
}

// applyIndex merges one layer by its index; its contents have keys from base
// on.
func (t *Tree) applyIndex(ctx context.Context, r io.Reader, base int64) error {
	t.layer++
	index, err := newIndexReader(r)
	if err != nil {
		return err
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, err := index.next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = t.entry(&e.hdr, func(int64) (int64, error) { return base + e.offset, nil })
		}
		if err != nil {
			return entryError(e.hdr.Name, err)
		}
	}
}

// readError gives a broken tar stream its class, and leaves the errors of
// what it is read from alone.
func readError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("broken tar stream: %w: %w", err, errdefs.ErrDataLoss)
	}
	return err
}

// isOurs tells whether err has its class already: a limit, the sink's or the
// reader's error, the context's end.
func isOurs(err error) bool {
	var fault *sinkError
	return errors.As(err, &fault) || errdefs.IsOutOfRange(err) || errdefs.IsDataLoss(err) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// A sinkError is the fault of where contents go, not of the layer.
type sinkError struct{ err error }

func (e *sinkError) Error() string { return e.err.Error() }
func (e *sinkError) Unwrap() error { return e.err }

// A placer says where the contents of a file are, after keeping them if need
// be. The size is never 0.
type placer func(size int64) (key int64, err error)

func (t *Tree) entry(hdr *tar.Header, place placer) error {
	if t.entries++; t.entries > t.limits.Entries {
		return tooManyFiles(t.limits)
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	if name == "" {
		if hdr.Typeflag == tar.TypeDir {
			return t.setAttributes(t.root, hdr)
		}
		return nil
	}
	dir, base := splitPath(name)
	if isAufsMeta(name) {
		return nil
	}
	components, err := t.resolve(dir)
	if err != nil {
		return err
	}
	parent, err := t.mkdirs(components)
	if err != nil {
		return err
	}
	if base == whiteoutOpaque {
		t.prune(parent)
		return nil
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return t.whiteout(parent, hidden)
	}
	if len(base) > maxName {
		return fmt.Errorf("a name of %d bytes: Linux allows %d", len(base), maxName)
	}
	return t.place(parent, base, hdr, place)
}

func tooManyFiles(limits Limits) error {
	return fmt.Errorf("more than %d files: %w", limits.Entries, errdefs.ErrOutOfRange)
}

// cleanName makes an entry's name relative to the root, "" for the root.
func cleanName(name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", errors.New("a NUL byte in the name")
	}
	if len(name) > maxPath {
		return "", fmt.Errorf("a path of %d bytes: Linux allows %d", len(name), maxPath)
	}
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if clean == ".." || strings.HasPrefix(clean, "../") {
		return "", errors.New("the name leaves the image's root")
	}
	if clean == "." {
		return "", nil
	}
	return clean, nil
}

// isAufsMeta tells AUFS's own files, which are no part of an image.
func isAufsMeta(name string) bool {
	if !strings.Contains(name, whiteoutMeta) {
		return false
	}
	for part := range strings.SplitSeq(name, "/") {
		if strings.HasPrefix(part, whiteoutMeta) && part != whiteoutOpaque {
			return true
		}
	}
	return false
}

func (t *Tree) whiteout(parent *node, hidden string) error {
	if hidden == "" || hidden == "." || hidden == ".." {
		return errors.New("a whiteout that names nothing")
	}
	e := parent.children[hidden]
	switch {
	case e == nil:
	case e.layer != t.layer:
		t.remove(parent, hidden)
	case e.node.isDir():
		t.prune(e.node)
	}
	return nil
}

// place puts one entry under its name, replacing what is there unless both
// are directories.
func (t *Tree) place(parent *node, base string, hdr *tar.Header, place placer) error {
	old := parent.children[base]
	if hdr.Typeflag == tar.TypeDir && old != nil && old.node.isDir() {
		old.layer = t.layer
		return t.setAttributes(old.node, hdr)
	}
	if hdr.Typeflag == tar.TypeLink {
		t.remove(parent, base) // before the target is looked for, which may be in it
	}
	n, err := t.newNode(hdr)
	if err != nil {
		return err
	}
	if err := t.charge(nodeCost + len(base) + len(n.target)); err != nil {
		return err
	}
	if n.isReg() && hdr.Typeflag != tar.TypeLink {
		if err := t.setContents(n, hdr.Size, place); err != nil {
			return err
		}
	}
	if n.nlink++; n.nlink > 1<<31 {
		return errors.New("too many hard links")
	}
	t.remove(parent, base)
	parent.children[base] = &dirent{node: n, layer: t.layer}
	return t.setAttributes(n, hdr)
}

func (t *Tree) newNode(hdr *tar.Header) (*node, error) {
	switch hdr.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		return &node{mode: unix.S_IFREG}, nil
	case tar.TypeDir:
		return newDir(0), nil
	case tar.TypeSymlink:
		if hdr.Linkname == "" || len(hdr.Linkname) >= maxPath || strings.ContainsRune(hdr.Linkname, 0) {
			return nil, fmt.Errorf("a symlink with a target of %d bytes", len(hdr.Linkname))
		}
		return &node{mode: unix.S_IFLNK | 0o777, target: hdr.Linkname}, nil
	case tar.TypeChar, tar.TypeBlock:
		if hdr.Devmajor < 0 || hdr.Devmajor > 0xfff || hdr.Devminor < 0 || hdr.Devminor > 0xfffff {
			return nil, fmt.Errorf("device number %d:%d is none of Linux's", hdr.Devmajor, hdr.Devminor)
		}
		typ := uint32(unix.S_IFCHR)
		if hdr.Typeflag == tar.TypeBlock {
			typ = unix.S_IFBLK
		}
		return &node{mode: typ, rdev: encodeDev(hdr.Devmajor, hdr.Devminor)}, nil
	case tar.TypeFifo:
		return &node{mode: unix.S_IFIFO}, nil
	case tar.TypeLink:
		return t.linkTarget(hdr.Linkname)
	}
	return nil, unknownType(hdr)
}

func (t *Tree) linkTarget(name string) (*node, error) {
	clean, err := cleanName(name)
	if err != nil {
		return nil, fmt.Errorf("hard link to %.200q: %w", name, err)
	}
	n, err := t.find(clean)
	switch {
	case err != nil:
		return nil, err
	case n == nil:
		return nil, fmt.Errorf("hard link to %.200q, which is not in the image", name)
	case n.isDir():
		return nil, fmt.Errorf("hard link to %.200q, which is a directory", name)
	}
	return n, nil
}

func (t *Tree) setContents(n *node, size int64, place placer) error {
	if size < 0 || size > t.limits.Bytes-t.bytes {
		return tooLarge(t.limits.Bytes)
	}
	t.bytes += size
	if n.size = size; size == 0 {
		return nil
	}
	var err error
	n.data, err = place(size)
	return err
}

func tooLarge(limit int64) error {
	return fmt.Errorf("the image unpacks to more than %d MiB: %w", limit>>20, errdefs.ErrOutOfRange)
}

// putContents keeps what a file of a tar stream has, and tells the stream's
// errors from the keeper's.
func putContents(ctx context.Context, put func(context.Context, io.Reader, int64) (int64, error), r io.Reader, size int64) (int64, error) {
	fault := &faultReader{r: r}
	key, err := put(ctx, fault, size)
	switch {
	case err == nil:
		return key, nil
	case fault.err != nil:
		return 0, readError(fault.err)
	}
	return 0, &sinkError{err}
}

// A faultReader remembers the error of what it reads, to tell it from the
// sink's.
type faultReader struct {
	r   io.Reader
	err error
}

func (f *faultReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && err != io.EOF {
		f.err = err
	}
	return n, err
}

func (t *Tree) setAttributes(n *node, hdr *tar.Header) error {
	n.uid, n.gid = uint32(hdr.Uid), uint32(hdr.Gid)
	n.setMtime(hdr.ModTime)
	if !n.isLink() {
		n.mode = n.typ() | uint32(hdr.Mode)&0o7777
	}
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok {
			continue
		}
		if !keepXattr(n, name, value) {
			space, _, _ := strings.Cut(name, ".")
			t.dropped[space]++
			continue
		}
		if n.xattrs == nil {
			n.xattrs = map[string]string{}
		}
		n.xattrs[name] = value
		if err := t.charge(len(name) + len(value)); err != nil {
			return err
		}
	}
	if size := xattrSize(n.xattrs); size > t.limits.ExtendedAttributes {
		return tooManyAttributes(size, t.limits)
	}
	return nil
}

// charge counts what names and attributes take in memory.
func (t *Tree) charge(bytes int) error {
	if t.meta += int64(bytes); t.meta > t.limits.Metadata {
		return tooManyNames(t.limits)
	}
	return nil
}

func tooManyNames(limits Limits) error {
	return fmt.Errorf("names and attributes of all files take more than %d MiB: %w", limits.Metadata>>20, errdefs.ErrOutOfRange)
}

// keepXattr leaves out what no file can have, and user.* on anything but files
// and directories: Linux refuses it, with an error that containerd ignores too.
func keepXattr(n *node, name, value string) bool {
	index, _ := xattrIndex(name)
	return canHold(name, value) && (index != xattrUser || n.isReg() || n.isDir())
}

// canHold refuses what overlayfs would take for orders (trusted.*), and what
// EROFS has no name space or no room for.
func canHold(name, value string) bool {
	index, suffix := xattrIndex(name)
	return index != 0 && index != xattrTrusted && len(suffix) <= maxName && len(value) < 1<<16
}
