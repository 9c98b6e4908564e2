package cri

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A cutDisk is the host's disk below a volume, with a cache that a power cut
// loses: a FUSE file system of one file, mounted on the volume's file. A write
// is in the cache until the next flush; when the power is cut, each sector that
// was written since has its old content or its new one, by chance, whatever the
// order of the writes.
type cutDisk struct {
	path string
	file *os.File // the volume's file, below the mount
	dev  int      // /dev/fuse

	mu sync.Mutex
	// was has the content of each sector at the last flush, of those that were
	// written since.
	was map[int64][]byte
	// lies: a flush is acknowledged, and does nothing.
	lies bool
	// off: the power is cut, and no request does anything.
	off bool
	// flushes counts those that did something.
	flushes int
	// trip is called after the write that makes left 0.
	left int
	trip func()
}

// sector is what a disk writes as a whole, in bytes.
const sector = 512

// Of FUSE's protocol, version 7.31 (linux/fuse.h).
const (
	fuseLookup, fuseForget, fuseGetattr, fuseSetattr                         = 1, 2, 3, 4
	fuseOpen, fuseRead, fuseWrite, fuseStatfs, fuseRelease, fuseFsync        = 14, 15, 16, 17, 18, 20
	fuseInit, fuseInterrupt, fuseDestroy, fuseBatchForget                    = 26, 36, 38, 42
	fuseInHeader, fuseMaxWrite                                               = 40, 128 << 10
	fuseDirectIO, fuseBigWrites, fuseAsyncRead, fuseSetSize, fuseRegularFile = 1, 1 << 5, 1, 1 << 3, unix.S_IFREG | 0o600
)

// newCutDisk mounts itself on a file, until the test ends.
func newCutDisk(t *testing.T, path string) *cutDisk {
	t.Helper()
	d := &cutDisk{path: path, was: map[int64][]byte{}}
	var err error
	if d.file, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	if d.dev, err = unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0); errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) {
		t.Skipf("no FUSE here: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("atoll-test", path, "fuse", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=%o,user_id=0,group_id=0,allow_other", d.dev, fuseRegularFile)); errors.Is(err, unix.EPERM) {
		t.Skipf("cannot mount FUSE: %v", err)
	} else if err != nil {
		t.Fatalf("mount FUSE: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- d.serve() }()
	t.Cleanup(func() {
		if err := d.unmount(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		unix.Close(d.dev)
		d.file.Close()
	})
	// What is not implemented is asked for once. It must not be asked of this
	// process while it cannot run: in an epoll_ctl, or between fork and exec.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	return d
}

// unmount lays the volume's file open. It may be called again.
func (d *cutDisk) unmount() error {
	err := unix.Unmount(d.path, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

// serve answers the kernel until the file system is unmounted.
func (d *cutDisk) serve() error {
	buf := make([]byte, fuseMaxWrite+1<<16)
	for {
		n, err := unix.Read(d.dev, buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.ENODEV):
			return nil // unmounted
		case err != nil:
			return os.NewSyscallError("read /dev/fuse", err)
		}
		op := binary.NativeEndian.Uint32(buf[4:])
		if op == fuseForget || op == fuseBatchForget || op == fuseInterrupt {
			continue
		}
		body, errno := d.answer(op, buf[fuseInHeader:n])
		if errno != 0 {
			body = nil
		}
		reply := make([]byte, 0, 16+len(body))
		reply = binary.NativeEndian.AppendUint32(reply, uint32(16+len(body)))
		reply = binary.NativeEndian.AppendUint32(reply, uint32(-int32(errno)))
		reply = append(append(reply, buf[8:16]...), body...)
		if _, err := unix.Write(d.dev, reply); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			return os.NewSyscallError("write /dev/fuse", err)
		}
	}
}

// words are a body of numbers of the sizes that binary.Append knows.
func words(values ...any) []byte {
	var b []byte
	for _, v := range values {
		b, _ = binary.Append(b, binary.NativeEndian, v) // fixed sizes alone
	}
	return b
}

// answer does one request.
func (d *cutDisk) answer(op uint32, in []byte) ([]byte, unix.Errno) {
	u64 := func(at int) int64 { return int64(binary.NativeEndian.Uint64(in[at:])) }
	u32 := func(at int) int { return int(binary.NativeEndian.Uint32(in[at:])) }
	switch op {
	case fuseInit:
		return words(uint32(7), uint32(31), uint32(0), uint32(fuseBigWrites|fuseAsyncRead), uint16(12), uint16(9), uint32(fuseMaxWrite), uint32(1), make([]byte, 36)), 0
	case fuseGetattr:
		return d.attributes()
	case fuseSetattr:
		if u32(0)&fuseSetSize != 0 {
			if err := d.file.Truncate(u64(16)); err != nil {
				return nil, unix.EIO
			}
		}
		return d.attributes()
	case fuseOpen:
		return words(uint64(0), uint32(fuseDirectIO), uint32(0)), 0
	case fuseRead:
		b := make([]byte, u32(16))
		n, _ := d.file.ReadAt(b, u64(8)) // short at the end
		return b[:n], 0
	case fuseWrite:
		return d.write(u64(8), in[40:40+u32(16)])
	case fuseFsync:
		return nil, d.flush()
	case fuseStatfs:
		return words(uint64(1<<20), uint64(1<<19), uint64(1<<19), uint64(1), uint64(0), uint32(4096), uint32(255), uint32(4096), make([]byte, 28)), 0
	case fuseRelease, fuseDestroy:
		return nil, 0
	case fuseLookup:
		return nil, unix.ENOENT
	}
	return nil, unix.ENOSYS
}

func (d *cutDisk) attributes() ([]byte, unix.Errno) {
	st, err := d.file.Stat()
	if err != nil {
		return nil, unix.EIO
	}
	size := uint64(st.Size())
	return words(uint64(0), uint32(0), uint32(0), // not to be remembered
		uint64(1), size, size/sector, make([]byte, 3*8+3*4), uint32(fuseRegularFile), uint32(1), make([]byte, 3*4), uint32(4096), uint32(0)), 0
}

// write does a write, and has the power cut if it is the one for that.
func (d *cutDisk) write(at int64, data []byte) ([]byte, unix.Errno) {
	d.mu.Lock()
	body, errno := d.cache(at, data)
	d.left--
	trip := d.trip
	if d.left != 0 {
		trip = nil
	}
	d.mu.Unlock()
	if trip != nil {
		trip()
	}
	return body, errno
}

// cutAfter calls trip when so many more writes have been done, before the next
// request.
func (d *cutDisk) cutAfter(writes int, trip func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.left, d.trip = writes, trip
}

func (d *cutDisk) cache(at int64, data []byte) ([]byte, unix.Errno) {
	if d.off {
		return nil, unix.EIO
	}
	for s := at / sector; s*sector < at+int64(len(data)); s++ {
		if d.was[s] != nil {
			continue
		}
		b := make([]byte, sector)
		if _, err := d.file.ReadAt(b, s*sector); err != nil {
			return nil, unix.EIO
		}
		d.was[s] = b
	}
	if _, err := d.file.WriteAt(data, at); err != nil {
		return nil, unix.EIO
	}
	return words(uint32(len(data)), uint32(0)), 0
}

func (d *cutDisk) flush() unix.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.off:
		return unix.EIO
	case d.lies:
		return 0
	}
	clear(d.was)
	d.flushes++
	return 0
}

// lie acknowledges flushes from now on, and does nothing.
func (d *cutDisk) lie() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lies = true
}

// cut ends the power: nothing that comes now is done.
func (d *cutDisk) cut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.off = true
}

// powerOn is the disk after a cut, without what the cache had. A disk that lies
// loses all of it.
func (d *cutDisk) powerOn(t *testing.T, rng *rand.Rand) (lost, kept, flushes int) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, s := range slices.Sorted(maps.Keys(d.was)) { // in order, so that a seed tells it all
		b := d.was[s]
		now := make([]byte, sector)
		if _, err := d.file.ReadAt(now, s*sector); err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(now, b) {
			continue
		}
		if !d.lies && rng.IntN(2) == 0 {
			kept++
			continue
		}
		lost++
		if _, err := d.file.WriteAt(b, s*sector); err != nil {
			t.Fatal(err)
		}
	}
	clear(d.was)
	d.off = false
	return lost, kept, d.flushes
}

// TestCutDisk: what was flushed stays, and what was not may not.
func TestCutDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 64*sector), 0o600); err != nil {
		t.Fatal(err)
	}
	d := newCutDisk(t, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flushed, cached := bytes.Repeat([]byte("f"), 8*sector), bytes.Repeat([]byte("c"), 32*sector)
	write := func(b []byte, at int64) {
		t.Helper()
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	write(flushed, 100)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	write(cached, 16*sector)
	d.cut()
	if _, err := f.WriteAt(flushed, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("a write without power: %v", err)
	}
	lost, kept, _ := d.powerOn(t, rand.New(rand.NewPCG(1, 1)))
	if lost == 0 || kept == 0 || lost+kept != 32 {
		t.Errorf("of 32 sectors in the cache %d are lost and %d are kept", lost, kept)
	}
	b := make([]byte, len(flushed))
	if _, err := f.ReadAt(b, 100); err != nil || !bytes.Equal(b, flushed) {
		t.Errorf("what was flushed is not there: %v", err)
	}
	d.lie()
	write(cached, 0)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	d.cut()
	d.powerOn(t, nil)
	if _, err := f.ReadAt(b, 100); err != nil || !bytes.Equal(b, flushed) {
		t.Errorf("a disk that lies keeps what was flushed before: %v", err)
	}
}
