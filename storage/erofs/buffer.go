package erofs

import "golang.org/x/sys/unix"

// alignedBuffer is memory at a page's start, as direct I/O wants it.
func alignedBuffer(size int) (buf []byte, free func(), err error) {
	buf, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE)
	if err != nil {
		return nil, nil, err
	}
	return buf, func() { _ = unix.Munmap(buf) }, nil
}
