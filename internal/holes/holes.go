// Package holes finds what sparse files hold.
package holes

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// Data calls fn with each part of the first size bytes of a file that is no
// hole, in order, what is only in the page cache included (lseek(2), SEEK_DATA).
// A file system that does not know holes has one part. It returns fn's first
// error, and moves the file's offset.
func Data(f *os.File, size int64, fn func(start, end int64) error) error {
	for at := int64(0); at < size; {
		start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // nothing but a hole
			return nil
		case errors.Is(err, unix.EINVAL):
			return fn(at, size)
		case err != nil:
			return &os.PathError{Op: "seek", Path: f.Name(), Err: err}
		case start >= size:
			return nil
		}
		if at, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE); err != nil {
			return &os.PathError{Op: "seek", Path: f.Name(), Err: err}
		}
		if err := fn(start, min(at, size)); err != nil {
			return err
		}
	}
	return nil
}
