package treesum

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

type inode struct{ dev, ino uint64 }

// Dir describes what is in root. Paths in skip ("/proc") are left out with all
// below them; so is what is mounted below root, except a mount point itself.
func Dir(root string, skip ...string) ([]Entry, error) {
	var entries []Entry
	var rootDev uint64
	raw := map[string]string{} // Entry.Path → path
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := "/" + strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
		if below(name, skip) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if name == "/" {
			rootDev = st.Dev
		}
		e, err := entry(path, name, &st)
		if err != nil {
			return err
		}
		raw[e.Path] = path
		entries = append(entries, e)
		if d.IsDir() {
			// overlayfs gives files of its layers other device numbers, but
			// never directories.
			if st.Dev != rootDev {
				return fs.SkipDir
			}
			return nil
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	Sort(entries)
	return entries, sameInodes(entries, raw)
}

// sameInodes fills in which entries are one inode, in the list's order.
func sameInodes(entries []Entry, raw map[string]string) error {
	first := map[inode]int{}
	for i, e := range entries {
		if e.Type == "dir" || e.Nlink < 2 {
			continue
		}
		var st unix.Stat_t
		if err := unix.Lstat(raw[e.Path], &st); err != nil {
			return fmt.Errorf("%s: %w", e.Path, err)
		}
		key := inode{st.Dev, st.Ino}
		j, ok := first[key]
		if !ok {
			first[key] = i
			continue
		}
		entries[i].Same, entries[j].Same = entries[j].Path, entries[j].Path
	}
	return nil
}

var types = map[uint32]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "dir", unix.S_IFLNK: "symlink",
	unix.S_IFCHR: "char", unix.S_IFBLK: "block", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
}

// TypeOf is how Entry has the type of a mode.
func TypeOf(mode uint32) string { return types[mode&unix.S_IFMT] }

func entry(path, name string, st *unix.Stat_t) (Entry, error) {
	e := Entry{
		Path: Text(name), Type: TypeOf(st.Mode), Mode: fmt.Sprintf("%04o", st.Mode&0o7777),
		UID: st.Uid, GID: st.Gid, Mtime: FormatMtime(st.Mtim.Sec, uint32(st.Mtim.Nsec)),
	}
	var err error
	switch e.Type {
	case "file":
		e.Size = st.Size
		if e.SHA256, err = hashFile(path); err != nil {
			return e, err
		}
	case "symlink":
		target, err := os.Readlink(path)
		if err != nil {
			return e, err
		}
		e.Target = Text(target)
	case "char", "block":
		e.Device = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	if e.Type != "dir" {
		e.Nlink = st.Nlink
	}
	e.Xattrs, err = xattrs(path)
	return e, err
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// xattrs returns a file's attributes, without those that the place and not the
// tree gives it (SELinux's label of the host, overlayfs's notes).
func xattrs(path string) (map[string][]byte, error) {
	buf := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("attributes of %s: %w", path, err)
	}
	var found map[string][]byte
	for name := range bytes.SplitSeq(buf[:n], []byte{0}) {
		if len(name) == 0 || strings.HasPrefix(string(name), "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, string(name), value)
		if err != nil {
			return nil, fmt.Errorf("attribute %s of %s: %w", name, path, err)
		}
		if found == nil {
			found = map[string][]byte{}
		}
		found[string(name)] = value[:n]
	}
	return found, nil
}
