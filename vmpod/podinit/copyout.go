package podinit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

func statOf(fi fs.FileInfo) *syscall.Stat_t { return fi.Sys().(*syscall.Stat_t) }

// serveCopyOut sends the end of one file of a container, running or not.
func (a *agent) serveCopyOut(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	c, err := a.container(h.ContainerId)
	if err != nil {
		return err
	}
	if h.Limit <= 0 || h.Limit > agentapi.MaxCopyOut {
		return fmt.Errorf("copy out: limit %d is not in 1…%d: %w", h.Limit, agentapi.MaxCopyOut, errdefs.ErrInvalidArgument)
	}
	root, rel := c.locate(h.Path)
	f, err := openInRoot(root, rel)
	if err != nil {
		return fmt.Errorf("copy %s out of container %s: %w", h.Path, c.id, err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := s.Accept(); err != nil {
		return nil
	}
	if _, err := f.Seek(max(st.Size()-h.Limit, 0), io.SeekStart); err != nil {
		return err
	}
	if _, err := io.Copy(s, io.LimitReader(f, h.Limit)); err != nil {
		return quiet(err)
	}
	return quiet(s.CloseWrite())
}

// locate says below which of our directories a container's path lies: a
// volume mounted there, the termination message, or its root. Links in the
// root that lead into a volume are not followed into it.
func (c *container) locate(p string) (root, rel string) {
	p = path.Clean("/" + p)
	root, rel = c.root, p
	best := 0
	for _, b := range c.binds {
		if d := path.Clean(b.destination); (p == d || strings.HasPrefix(p, d+"/")) && len(d) > best {
			root, rel, best = b.source, strings.TrimPrefix(p, d), len(d)
		}
	}
	return root, rel
}

// openInRoot opens a regular file for reading as if root were the root of the
// file system: neither links nor dots lead out of it. root may be the file
// itself, rel then being empty.
func openInRoot(root, rel string) (*os.File, error) {
	// O_NONBLOCK: a FIFO must not hold us up.
	const flags = unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	var fd int
	var err error
	if rel == "" {
		fd, err = unix.Open(root, flags|unix.O_NOFOLLOW, 0)
	} else {
		var dir int
		if dir, err = unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			defer unix.Close(dir)
			fd, err = unix.Openat2(dir, rel, &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
		}
	}
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("no such file: %w", errdefs.ErrNotFound)
	case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("not a regular file (%v): %w", err, errdefs.ErrNotFound)
	case err != nil:
		return nil, err
	}
	f := os.NewFile(uintptr(fd), rel)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		f.Close()
		return nil, fmt.Errorf("not a regular file: %w", errdefs.ErrNotFound)
	}
	return f, nil
}
