package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxTermination is what the kubelet reads of a termination message.
const maxTermination = 4096

// fetchTermination copies the container's termination message out of the
// guest into the file that the kubelet will read.
func (p *pod) fetchTermination(ctx context.Context, c *container) error {
	if c.Termination == nil {
		return nil
	}
	session, err := p.link.session(ctx)
	if err != nil {
		return err
	}
	b, err := session.CopyOut(ctx, c.ID, c.Termination.ContainerPath, maxTermination)
	if errdefs.IsNotFound(err) {
		return nil // it wrote none
	}
	if err != nil {
		return err
	}
	if len(b) > maxTermination {
		b = b[len(b)-maxTermination:]
	}
	return writeTermination(c.Termination.HostPath, b)
}

// writeTermination writes through a handle on the directory and follows no
// symbolic link.
func writeTermination(path string, b []byte) error {
	d, err := unix.Open(filepath.Dir(path), unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_PATH, 0)
	if err != nil {
		return fmt.Errorf("directory of %s: %w", path, err)
	}
	defer unix.Close(d)
	fd, err := unix.Openat(d, filepath.Base(path), unix.O_WRONLY|unix.O_TRUNC|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0o644)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	_, err = f.Write(b)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}
