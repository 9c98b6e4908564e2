package podinit

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// dataLink is the link that the kubelet swaps to publish new content
// (pkg/volume/util/atomic_writer.go).
const dataLink = "..data"

// serveTree takes a tar for a TREE volume and answers when it is in place.
func (a *agent) serveTree(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	v, ok := a.volume(h.Volume)
	if !ok {
		return fmt.Errorf("volume %q is not in this VM: %w", h.Volume, errdefs.ErrNotFound)
	}
	if v.kind != agentapi.AddVolumeRequest_TREE {
		return fmt.Errorf("volume %s is %s and takes no tree: %w", v.id, v.kind, errdefs.ErrFailedPrecondition)
	}
	if err := s.Accept(); err != nil {
		return nil
	}
	l := a.lockOf("v/" + v.id)
	l.Lock()
	defer l.Unlock()
	err := replaceTree(v.root, filepath.Join(a.places.volumes, ".new-"+v.id), s, a.userns.shift())
	if errdefs.IsUnavailable(err) {
		return err // the host is gone and reads no answer
	}
	return quiet(s.Finish(err))
}

// replaceTree makes dir what the tar says. The tar is unpacked into stage
// first, on the same file system; only when all of it is there does dir
// change, in an order that never shows half of an update to who reads through
// the `..data` link: new directories, then the link, then the rest.
//
// Owners are shifted into the pod's user namespace.
//
// The inodes of dir, of its directories and of its plain files stay, because
// containers have them mounted: a plain file is rewritten in place.
func replaceTree(dir, stage string, r io.Reader, shift int) error {
	if err := os.RemoveAll(stage); err != nil {
		return err
	}
	if err := os.Mkdir(stage, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(stage)
	from, err := os.OpenRoot(stage)
	if err != nil {
		return err
	}
	defer from.Close()
	if err := unpack(from, r, shift); err != nil {
		return err
	}
	to, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer to.Close()
	return merge(from, to, ".")
}

// unpack writes a tar below root, with ids that are shift higher. The stream must end behind the archive.
func unpack(root *os.Root, r io.Reader, shift int) error {
	tr := tar.NewReader(r)
	type dirMode struct {
		name string
		h    *tar.Header
	}
	var dirs []dirMode // their modes and times come last
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return tarError(err)
		}
		h.Uid, h.Gid = h.Uid+shift, h.Gid+shift
		name := path.Clean("/" + h.Name)[1:]
		if name == "" {
			name = "."
		}
		if h.Typeflag == tar.TypeDir {
			if err := root.MkdirAll(name, 0o755); err != nil {
				return err
			}
			dirs = append(dirs, dirMode{name, h})
			continue
		}
		if err := unpackOne(root, name, h, tr); err != nil {
			return fmt.Errorf("%s: %w", name, tarError(err))
		}
	}
	// What follows the archive is only padding; its orderly end counts.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := setMeta(root, dirs[i].name, dirs[i].h); err != nil {
			return err
		}
	}
	return nil
}

// tarError gives a malformed archive its class and leaves the stream's errors
// as they are.
func tarError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("malformed tar (%v): %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

func unpackOne(root *os.Root, name string, h *tar.Header, r io.Reader) error {
	if parent := path.Dir(name); parent != "." {
		if err := root.MkdirAll(parent, 0o755); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		return setMeta(root, name, h)
	case tar.TypeSymlink:
		if err := root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return chownLink(root, name, h)
	case tar.TypeLink:
		return root.Link(path.Clean("/" + h.Linkname)[1:], name)
	}
	return fmt.Errorf("a tree holds files, directories and links, not type %q: %w", h.Typeflag, errdefs.ErrInvalidArgument)
}

func chownLink(root *os.Root, name string, h *tar.Header) error {
	if os.Geteuid() != 0 {
		return nil
	}
	return root.Lchown(name, h.Uid, h.Gid)
}

func setMeta(root *os.Root, name string, h *tar.Header) error {
	if err := chownLink(root, name, h); err != nil {
		return err
	}
	if err := root.Chmod(name, h.FileInfo().Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return root.Chtimes(name, h.ModTime, h.ModTime)
}

// merge makes the directory rel of to equal to that of from.
func merge(from, to *os.Root, rel string) error {
	wanted, err := names(from, rel)
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	var first, rest []string
	hasData := false
	for _, n := range wanted {
		keep[n] = true
		switch {
		case n == dataLink:
			hasData = true
		case strings.HasPrefix(n, ".."):
			first = append(first, n)
		default:
			rest = append(rest, n)
		}
	}
	if hasData {
		first = append(first, dataLink)
	}
	for _, n := range append(first, rest...) {
		if err := place(from, to, filepath.Join(rel, n)); err != nil {
			return err
		}
	}
	old, err := names(to, rel)
	if err != nil {
		return err
	}
	for _, n := range old {
		if !keep[n] {
			if err := to.RemoveAll(filepath.Join(rel, n)); err != nil {
				return err
			}
		}
	}
	return copyMeta(from, to, rel)
}

func names(r *os.Root, rel string) ([]string, error) {
	d, err := r.Open(rel)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

// place moves one entry of from into to, or makes the one there equal.
func place(from, to *os.Root, name string) error {
	want, err := from.Lstat(name)
	if err != nil {
		return err
	}
	have, err := to.Lstat(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil || have.Mode().Type() != want.Mode().Type() {
		if err == nil {
			if err := to.RemoveAll(name); err != nil {
				return err
			}
		}
		return renameBetween(from, to, name)
	}
	switch want.Mode().Type() {
	case fs.ModeDir:
		return merge(from, to, name)
	case fs.ModeSymlink:
		a, err := from.Readlink(name)
		if err != nil {
			return err
		}
		if b, err := to.Readlink(name); err != nil || a == b {
			return err
		}
		return renameBetween(from, to, name) // over the old one, atomically
	}
	return rewrite(from, to, name)
}

// renameBetween moves an entry over whatever of its type is there.
func renameBetween(from, to *os.Root, name string) error {
	a, err := from.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := to.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer b.Close()
	base := filepath.Base(name)
	return unix.Renameat(int(a.Fd()), base, int(b.Fd()), base)
}

// rewrite gives a plain file new content without giving it a new inode.
func rewrite(from, to *os.Root, name string) error {
	a, err := from.ReadFile(name)
	if err != nil {
		return err
	}
	b, err := to.ReadFile(name)
	if err != nil {
		return err
	}
	if !bytes.Equal(a, b) {
		f, err := to.OpenFile(name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		// Longer content first overwrites, then the tail goes: a reader in
		// between sees old or new bytes, not an empty file.
		_, err = f.WriteAt(a, 0)
		if err = errors.Join(err, f.Truncate(int64(len(a))), f.Close()); err != nil {
			return err
		}
	}
	return copyMeta(from, to, name)
}

// copyMeta copies owner and mode where they differ.
func copyMeta(from, to *os.Root, name string) error {
	a, err := from.Stat(name)
	if err != nil {
		return err
	}
	b, err := to.Stat(name)
	if err != nil {
		return err
	}
	sa, sb := statOf(a), statOf(b)
	if sa.Uid != sb.Uid || sa.Gid != sb.Gid {
		if err := to.Lchown(name, int(sa.Uid), int(sa.Gid)); err != nil {
			return err
		}
	}
	if a.Mode() != b.Mode() {
		return to.Chmod(name, a.Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky))
	}
	return nil
}
