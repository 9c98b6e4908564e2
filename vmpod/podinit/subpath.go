package podinit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// PrepareSubPath looks a sub-path up as CreateContainer will, and makes what is
// missing of it.
func (a *agent) PrepareSubPath(_ context.Context, r *agentapi.PrepareSubPathRequest) (*agentapi.PrepareSubPathResponse, error) {
	if err := a.requireSandbox(); err != nil {
		return nil, err
	}
	if err := checkID("volume", r.Volume); err != nil {
		return nil, err
	}
	l := a.lockOf("v/" + r.Volume)
	l.Lock()
	defer l.Unlock()
	v, err := a.mountable(r.Volume)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.Volume, err)
	}
	f, err := openSubPath(v.root, r.SubPath)
	if err != nil {
		return nil, err
	}
	f.Close()
	return &agentapi.PrepareSubPathResponse{}, nil
}

// openSubPath opens what is to be mounted of a volume. It resolves below the
// volume's root alone; directories that are missing are made with the mode
// of the root (and so with the fsGroup's bits). The caller closes the file.
func openSubPath(root, sub string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	fd, err := openBeneath(dir, sub, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) {
		if err = makeBeneath(dir, sub); err == nil {
			fd, err = openBeneath(dir, sub, unix.O_PATH)
		}
	}
	if err != nil {
		return nil, subPathError(sub, err)
	}
	return os.NewFile(uintptr(fd), filepath.Join(root, sub)), nil
}

// subPathError says what is wrong with a sub-path that could be neither opened
// nor made, and what to do about it.
func subPathError(sub string, err error) error {
	var errno unix.Errno
	errors.As(err, &errno)
	switch errno {
	case unix.EXDEV:
		return fmt.Errorf(`sub-path %q leads out of the volume, by a symbolic link or "..": put a directory in place of the link, or use another subPath: %w`, sub, errdefs.ErrInvalidArgument)
	case unix.ELOOP:
		return fmt.Errorf("sub-path %q leads over symbolic links without end: remove them, or use another subPath: %w", sub, errdefs.ErrInvalidArgument)
	case unix.ENOTDIR:
		return fmt.Errorf("sub-path %q leads through what is no directory: remove that, or use another subPath: %w", sub, errdefs.ErrInvalidArgument)
	case unix.ENAMETOOLONG:
		return fmt.Errorf("sub-path %q: %w: use a shorter subPath: %w", sub, errno, errdefs.ErrInvalidArgument)
	case unix.ENOENT: // also after it was made
		return fmt.Errorf("sub-path %q leads over a symbolic link to what is not there: make that, remove the link, or use another subPath: %w", sub, errdefs.ErrFailedPrecondition)
	case unix.EROFS:
		return fmt.Errorf("sub-path %q is not in the volume and cannot be made, for the volume is read-only: make it from a pod that has the volume without readOnly, or use another subPath: %w", sub, errdefs.ErrFailedPrecondition)
	case unix.ENOSPC, unix.EDQUOT:
		return fmt.Errorf("sub-path %q is not in the volume and cannot be made: %w: remove something from the volume, or make it larger: %w", sub, errno, errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("sub-path %q: %w", sub, err)
}

// openImageDirectory opens a directory of an image, for a volume: nothing is
// made, and a single file is refused, as by other runtimes (KEP-4639).
func openImageDirectory(root, sub string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	fd, err := openBeneath(dir, sub, unix.O_PATH|unix.O_DIRECTORY)
	switch {
	case err == nil:
		return os.NewFile(uintptr(fd), filepath.Join(root, sub)), nil
	case errors.Is(err, unix.ENOENT):
		return nil, fmt.Errorf("the image has no directory %q: %w", sub, errdefs.ErrNotFound)
	case errors.Is(err, unix.ENOTDIR):
		return nil, fmt.Errorf("%q is no directory of the image; single files cannot be mounted: %w", sub, errdefs.ErrInvalidArgument)
	case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("sub-path %q leads out of the image: %w", sub, errdefs.ErrInvalidArgument)
	}
	return nil, fmt.Errorf("sub-path %q: %w", sub, err)
}

func openBeneath(dir int, sub string, flags uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(dir, sub, &how)
		if err != unix.EAGAIN && err != unix.EINTR { // a rename was in the way
			return fd, err
		}
	}
}

// makeBeneath makes the directories of sub, one by one, each below the one
// that was opened before, so that nothing can be swapped in between.
func makeBeneath(dir int, sub string) error {
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return err
	}
	parent := filepath.Dir(sub)
	at, name := dir, filepath.Base(sub)
	if parent != "." && parent != "/" {
		fd, err := openBeneath(dir, parent, unix.O_PATH|unix.O_DIRECTORY)
		if errors.Is(err, unix.ENOENT) {
			if err := makeBeneath(dir, parent); err != nil {
				return err
			}
			fd, err = openBeneath(dir, parent, unix.O_PATH|unix.O_DIRECTORY)
		}
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		at = fd
	}
	if name == ".." || name == "." || name == "/" {
		return unix.EXDEV
	}
	if err := unix.Mkdirat(at, name, 0o700); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
		return err
	}
	fd, err := openBeneath(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fchown(fd, -1, int(st.Gid)); err != nil && os.Geteuid() == 0 {
		return err
	}
	return unix.Fchmod(fd, st.Mode&0o7777)
}
