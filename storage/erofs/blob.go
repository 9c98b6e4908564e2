package erofs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"

	"github.com/cespare/xxhash/v2"
	"github.com/containerd/errdefs"
)

// ChunkSize is what one checksum of a data blob covers, in bytes; the last
// chunk may be shorter.
const ChunkSize = 1 << 20

// A blob collects the contents of a layer's files in a file, each from a block
// of its own on. What it writes are whole chunks, without the blocks that are
// all zeros, and it keeps a checksum of each chunk.
type blob struct {
	w      io.WriterAt
	end    int64 // of what is written
	buf    []byte
	filled int
	sums   []uint64
}

func newBlob(w io.WriterAt) *blob { return &blob{w: w, buf: make([]byte, ChunkSize)} }

// size is where the next content begins, a multiple of the block size.
func (b *blob) size() int64 { return b.end + int64(b.filled) }

// put appends size bytes of r and returns where they are.
func (b *blob) put(ctx context.Context, r io.Reader, size int64) (int64, error) {
	start := b.size()
	for left := size; left > 0; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		part := b.buf[b.filled:min(int64(len(b.buf)), int64(b.filled)+left)]
		n, err := io.ReadFull(r, part)
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return 0, err
		}
		left -= int64(n)
		if err := b.advance(n); err != nil {
			return 0, err
		}
	}
	tail := int(align(size, blockSize) - size) // never beyond the buffer, which ends with a block
	clear(b.buf[b.filled : b.filled+tail])
	return start, b.advance(tail)
}

func (b *blob) advance(n int) error {
	if b.filled += n; b.filled == len(b.buf) {
		return b.flush()
	}
	return nil
}

// flush writes the chunk at hand.
func (b *blob) flush() error {
	if b.filled == 0 {
		return nil
	}
	chunk := b.buf[:b.filled]
	b.sums = append(b.sums, xxhash.Sum64(chunk))
	if err := b.write(chunk); err != nil {
		return &sinkError{err}
	}
	b.end, b.filled = b.end+int64(len(chunk)), 0
	return nil
}

var zeroBlock [blockSize]byte

// write leaves zero blocks as holes; neighbours that hold data go in one call.
func (b *blob) write(chunk []byte) error {
	for off := 0; off < len(chunk); {
		n := 0
		for off+n < len(chunk) && !bytes.Equal(chunk[off+n:off+n+blockSize], zeroBlock[:]) {
			n += blockSize
		}
		if n == 0 {
			off += blockSize
			continue
		}
		if _, err := b.w.WriteAt(chunk[off:off+n], b.end+int64(off)); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// A BlobFile is an open blob.
type BlobFile interface {
	io.ReaderAt
	Name() string
	Stat() (os.FileInfo, error)
}

// CheckData compares a blob of size bytes with the checksums of its chunks. It
// reads a chunk at a time, into memory that is aligned, so that f may be open
// for direct I/O. It returns ErrDataLoss, with the place, if they differ or
// something cannot be read.
func CheckData(ctx context.Context, f BlobFile, size int64, sums []uint64) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != size || int64(len(sums)) != (size+ChunkSize-1)/ChunkSize {
		return fmt.Errorf("%s has %d bytes, not %d: %w", f.Name(), st.Size(), size, errdefs.ErrDataLoss)
	}
	buf, free, err := alignedBuffer(ChunkSize)
	if err != nil {
		return err
	}
	defer free()
	for i, want := range sums {
		if err := ctx.Err(); err != nil {
			return err
		}
		off := int64(i) * ChunkSize
		chunk := buf[:min(ChunkSize, size-off)]
		if _, err := f.ReadAt(chunk, off); err != nil && err != io.EOF {
			return fmt.Errorf("%s cannot be read at %d: %w: %w", f.Name(), off, err, errdefs.ErrDataLoss)
		}
		if xxhash.Sum64(chunk) != want {
			return fmt.Errorf("%s is damaged between %d and %d: %w", f.Name(), off, off+int64(len(chunk)), errdefs.ErrDataLoss)
		}
	}
	return nil
}
