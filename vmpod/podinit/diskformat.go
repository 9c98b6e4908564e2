package podinit

import (
	"errors"
	"fmt"
	"io"
	"os"
	"unsafe"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"golang.org/x/sys/unix"
)

// headBytes at the start of a disk are written last: the superblocks of ext4
// and xfs are there, so that nothing takes the disk for formatted before.
const headBytes = 4096

// serveFormat takes the extents of an empty file system for a disk that was
// found blank, and answers when all of it is on the disk.
func (a *agent) serveFormat(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	l := a.lockOf("v/" + h.Volume)
	l.Lock()
	defer l.Unlock()
	a.mu.Lock()
	d := a.blanks[h.Volume]
	a.mu.Unlock()
	if d == nil {
		return fmt.Errorf("volume %q has no blank disk in this VM; AddVolume first: %w", h.Volume, errdefs.ErrFailedPrecondition)
	}
	if err := s.Accept(); err != nil {
		return nil
	}
	err := formatDisk(d, s)
	if errdefs.IsUnavailable(err) {
		return err // the host is gone and reads no answer
	}
	if err != nil {
		err = fmt.Errorf("format volume %s: %w", h.Volume, err)
	}
	return quiet(s.Finish(err))
}

func formatDisk(d *blankDisk, r io.Reader) error {
	f, err := os.OpenFile(d.device, os.O_RDWR|unix.O_EXCL, 0) // not what is mounted
	if err != nil {
		return err
	}
	defer f.Close()
	found, size, err := probeDisk(f, d.request.Noise)
	if err != nil {
		return err
	}
	if !found.blank {
		return fmt.Errorf("the disk is not blank, it holds %s: %w", found.kind, errdefs.ErrFailedPrecondition)
	}
	if err := form(f, size, d.request.FsType, r); err != nil {
		return err
	}
	return f.Close()
}

// A formable is a block device, or a file in a test.
type formable interface {
	io.WriterAt
	Sync() error
	Fd() uintptr
}

// form writes an empty file system. Whenever it is cut off, the disk has the
// mark in its first sector, and else is as if nothing had happened: the mark
// goes, in the one write of a sector, when all the rest is on the disk.
func form(f formable, size int64, fsType string, r io.Reader) error {
	if size < headBytes {
		return fmt.Errorf("a disk of %d bytes: %w", size, errdefs.ErrInvalidArgument)
	}
	if err := writeSync(f, formMark, 0); err != nil {
		return err
	}
	head := make([]byte, headBytes)
	if err := writeExtents(f, size, head, r); err != nil {
		return err
	}
	if got := probe(head, nil).kind; got != fsType {
		return fmt.Errorf("what the host sent is %q, not %s: %w", got, fsType, errdefs.ErrInvalidArgument)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := writeSync(f, head[sectorBytes:], sectorBytes); err != nil {
		return err
	}
	return writeSync(f, head[:sectorBytes], 0)
}

func writeSync(f formable, b []byte, at int64) error {
	if _, err := f.WriteAt(b, at); err != nil {
		return err
	}
	return f.Sync()
}

// writeExtents writes what r sends, but for what belongs into head.
func writeExtents(f formable, size int64, head []byte, r io.Reader) error {
	buf := make([]byte, agentapi.MaxExtent)
	for {
		e, err := agentapi.ReadExtent(r, buf, size)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if e.Data == nil {
			if e.Offset < headBytes {
				return fmt.Errorf("zeroes at %d: %w", e.Offset, errdefs.ErrInvalidArgument)
			}
			if err := zeroOut(f, e.Offset, e.Length); err != nil {
				return fmt.Errorf("zero %d bytes at %d: %w", e.Length, e.Offset, err)
			}
			continue
		}
		if e.Offset < headBytes {
			n := copy(head[e.Offset:], e.Data)
			e.Data, e.Offset = e.Data[n:], e.Offset+int64(n)
		}
		if _, err := f.WriteAt(e.Data, e.Offset); err != nil {
			return err
		}
	}
}

// zeroOut makes a part of a block device zero, without writing it where the
// device can do so itself.
func zeroOut(f formable, at, length int64) error {
	span := [2]uint64{uint64(at), uint64(length)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&span))); errno != 0 {
		return errno
	}
	return nil
}
