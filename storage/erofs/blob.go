package erofs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// A Blob is a Sink that places contents in a file, each from a block of its
// own on, without writing the blocks that are all zeros. The keys are offsets.
type Blob struct {
	f    *os.File
	end  int64
	free []extent
	buf  []byte
}

type extent struct{ off, size int64 }

// NewBlob places contents in f from block 1 on; block 0 stays for the
// superblock.
func NewBlob(f *os.File) *Blob {
	return &Blob{f: f, end: blockSize, buf: make([]byte, 64*blockSize)}
}

// End is the offset behind all contents, a multiple of the block size.
func (b *Blob) End() int64 { return b.end }

// Put implements Sink.
func (b *Blob) Put(ctx context.Context, r io.Reader, size int64) (int64, error) {
	start := b.end
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		chunk := b.buf[:min(int64(len(b.buf)), size-off)]
		if _, err := io.ReadFull(r, chunk); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		if err := b.write(chunk, start+off); err != nil {
			return 0, err
		}
		off += int64(len(chunk))
	}
	b.end = start + align(size, blockSize)
	return start, nil
}

var zeroBlock [blockSize]byte

// write leaves zero blocks as holes; neighbours that hold data go in one call.
func (b *Blob) write(chunk []byte, off int64) error {
	for len(chunk) > 0 {
		n := 0
		for n < len(chunk) && !isZero(chunk[n:min(n+blockSize, len(chunk))]) {
			n = min(n+blockSize, len(chunk))
		}
		if n > 0 {
			if _, err := b.f.WriteAt(chunk[:n], off); err != nil {
				return err
			}
		} else {
			n = min(blockSize, len(chunk))
		}
		chunk, off = chunk[n:], off+int64(n)
	}
	return nil
}

func isZero(block []byte) bool { return bytes.Equal(block, zeroBlock[:len(block)]) }

// Free implements Sink: the space is given back by Punch.
func (b *Blob) Free(off, size int64) {
	b.free = append(b.free, extent{off, align(size, blockSize)})
}

// Punch gives the space of freed contents back to the host's file system,
// where that can.
func (b *Blob) Punch() error {
	for _, e := range b.free {
		err := unix.Fallocate(int(b.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.off, e.size)
		if err == unix.EOPNOTSUPP {
			return nil
		}
		if err != nil {
			return fmt.Errorf("punch hole: %w", err)
		}
	}
	b.free = nil
	return nil
}
