package local

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Locks are ranges of one file in the datastore, one byte each, taken as open
// file description locks: they end with the process, whoever it is, and NFS
// carries them to the other hosts. Byte 0 is for whoever changes records that
// name each other's files; the others are for what is done to one volume or
// snapshot, which may take long.

// recordsLock is byte 0.
const recordsLock = int64(0)

// objectLock is the byte of a volume or snapshot. Two may share one, which has
// them wait for each other for no reason.
func objectLock(id string) int64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id)) // a hash gives no errors
	return int64(h.Sum64()>>2) | 1
}

// A lock is held until release.
type lock struct{ f *os.File }

// take waits for the locks of all that is named, in an order that is the same
// for everybody.
func take(ctx context.Context, root *os.Root, bytes ...int64) (*lock, error) {
	slices.Sort(bytes)
	l, err := newLock(root)
	if err != nil {
		return nil, err
	}
	for _, b := range slices.Compact(bytes) {
		if err := l.wait(ctx, b); err != nil {
			l.release()
			return nil, err
		}
	}
	return l, nil
}

// tryTake is nil if somebody else has the lock.
func tryTake(root *os.Root, b int64) (*lock, error) {
	l, err := newLock(root)
	if err != nil {
		return nil, err
	}
	got, err := l.try(b)
	if err != nil || !got {
		l.release()
		return nil, err
	}
	return l, nil
}

func newLock(root *os.Root) (*lock, error) {
	f, err := root.OpenFile(lockFile, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("lock of the datastore: %w", err)
	}
	return &lock{f}, nil
}

func (l *lock) try(b int64) (bool, error) {
	fl := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: b, Len: 1}
	err := unix.FcntlFlock(l.f.Fd(), unix.F_OFD_SETLK, &fl)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return false, nil
	}
	if err != nil {
		return false, os.NewSyscallError("fcntl(F_OFD_SETLK)", err)
	}
	return true, nil
}

// wait polls, since the call that waits cannot be ended by a context.
func (l *lock) wait(ctx context.Context, b int64) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		got, err := l.try(b)
		if got || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("another act on it is under way: %w", ctx.Err())
		case <-time.After(pause):
		}
	}
}

// release ends the locks: they are the description's.
func (l *lock) release() { l.f.Close() }

// QEMU locks bytes 100 to 108 and 200 to 208 of an image that it has open,
// shared, by what it does and by what it lets others do (block/file-posix.c,
// RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE).
const (
	qemuLocks    = 100
	qemuLocksLen = 200
)

// opened says whether a QEMU, on whatever host, has the image open.
func opened(root *os.Root, name string) (bool, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	fl := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: qemuLocks, Len: qemuLocksLen}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &fl); err != nil {
		return false, os.NewSyscallError("fcntl(F_OFD_GETLK)", err)
	}
	return fl.Type != unix.F_UNLCK, nil
}
