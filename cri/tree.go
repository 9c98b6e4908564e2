package cri

import (
	"archive/tar"
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
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// maxTree bounds what is copied into a guest for one volume: a ConfigMap
	// or Secret holds 1 MiB at most, a projected volume several of them.
	maxTree = 16 * mib
	// maxTreeFiles bounds the number of its files.
	maxTreeFiles = 4096
	// treeTries is how often a tree that is swapped while it is read is read
	// again.
	treeTries = 5
)

// packTree makes a tar of a volume's host directory, or of one file (then
// named by its base name), and the hash of its content. Symbolic links are
// kept as links: upstream's atomic writer publishes through them.
func packTree(v *volume) ([]byte, string, error) {
	for try := 0; ; try++ {
		b, err := packOnce(v)
		if err == nil {
			sum := sha256.Sum256(b)
			return b, hex.EncodeToString(sum[:]), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || try == treeTries {
			cure := ""
			if strings.HasPrefix(v.ID, "host-") {
				cure = " (or have the operator share it, by " + hostDirectoriesKey + " of the node's configuration)"
			}
			return nil, "", fmt.Errorf("copy %s into the guest: %w%s", v.HostPath, err, cure)
		}
		time.Sleep(20 * time.Millisecond) // the writer was swapping
	}
}

func packOnce(v *volume) ([]byte, error) {
	if v.Inline != "" {
		return packInline(filepath.Base(v.HostPath), v.Inline)
	}
	dir := v.HostPath
	if v.File {
		dir = filepath.Dir(dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	p := &packer{root: root}
	p.tar = tar.NewWriter(&p.buf)
	if v.File {
		fi, err := root.Lstat(filepath.Base(v.HostPath))
		if err != nil {
			return nil, err
		}
		if err = p.add(filepath.Base(v.HostPath), fi); err != nil {
			return nil, err
		}
	} else if err := fs.WalkDir(root.FS(), ".", p.walk); err != nil {
		return nil, err
	}
	if err := p.tar.Close(); err != nil {
		return nil, err
	}
	return p.buf.Bytes(), nil
}

func packInline(name, content string) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(w, content); err != nil {
		return nil, err
	}
	err := w.Close()
	return buf.Bytes(), err
}

type packer struct {
	root  *os.Root
	buf   bytes.Buffer
	tar   *tar.Writer
	files int
}

func (p *packer) walk(name string, d fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	fi, err := p.root.Lstat(name)
	if err != nil {
		return err
	}
	return p.add(name, fi)
}

func (p *packer) add(name string, fi fs.FileInfo) error {
	if p.files++; p.files > maxTreeFiles {
		return fmt.Errorf("it has more than %d files: put them into an image or a persistent volume: %w", maxTreeFiles, errdefs.ErrInvalidArgument)
	}
	if fi.Mode().IsRegular() && int64(p.buf.Len())+fi.Size() > maxTree {
		return fmt.Errorf("it has more than %d MiB: put them into an image or a persistent volume: %w", maxTree/mib, errdefs.ErrInvalidArgument)
	}
	link := ""
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		var err error
		if link, err = p.root.Readlink(name); err != nil {
			return err
		}
	case !fi.IsDir() && !fi.Mode().IsRegular():
		return fmt.Errorf("%s in it is a %s, which cannot be copied: %w", name, kindOf(fi.Mode()), errdefs.ErrInvalidArgument)
	}
	h, err := tar.FileInfoHeader(fi, link)
	if err != nil {
		return err
	}
	h.Name = name
	if fi.IsDir() {
		h.Name += "/"
	}
	// Owner by number and nothing that changes without the content changing.
	h.Uname, h.Gname, h.Format = "", "", tar.FormatPAX
	h.AccessTime, h.ChangeTime, h.ModTime = time.Time{}, time.Time{}, fi.ModTime().Truncate(time.Second)
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		h.Uid, h.Gid = int(st.Uid), int(st.Gid)
	}
	if !fi.Mode().IsRegular() {
		return p.tar.WriteHeader(h)
	}
	f, err := p.root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	n, err := io.Copy(p.tar, io.LimitReader(f, h.Size))
	if err == nil && n != h.Size {
		err = fmt.Errorf("%s shrank while it was read: %w", name, fs.ErrNotExist)
	}
	return err
}
