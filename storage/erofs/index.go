package erofs

import (
	"archive/tar"
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// An index is what a layer says, in the order in which it says it, without the
// contents: of each tar entry what an EROFS file system can hold, and where in
// the layer's blob its contents are. Behind the entries, which end with an
// empty one, come the checksums of the blob's chunks, 8 bytes each.
//
//	index := magic { length entry } 0 { sum }
//	entry := type mode uid gid mtime nanoseconds major minor size offset name target n { key value }
//
// Numbers are varints as in encoding/binary, strings have their length before
// them. An index is read only after its digest was compared.
const indexMagic = "atoll-layer-1\n"

// maxIndexEntry bounds an entry: name and target of a path each, attributes of
// the largest size, and numbers.
const maxIndexEntry = 2*maxPath + 80<<10 + 200

// An entry is one of an index.
type entry struct {
	hdr    tar.Header // without Size for what has no contents
	offset int64
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendEntry encodes what of hdr counts.
func appendEntry(b []byte, hdr *tar.Header, offset int64) []byte {
	mtime := hdr.ModTime
	b = append(b, hdr.Typeflag)
	for _, n := range []int64{hdr.Mode, int64(hdr.Uid), int64(hdr.Gid), mtime.Unix(), int64(mtime.Nanosecond()), hdr.Devmajor, hdr.Devminor, hdr.Size, offset} {
		b = binary.AppendVarint(b, n)
	}
	b = appendString(appendString(b, hdr.Name), hdr.Linkname)
	var keys []string
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, paxXattr) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	b = binary.AppendUvarint(b, uint64(len(keys)))
	for _, key := range keys {
		b = appendString(appendString(b, strings.TrimPrefix(key, paxXattr)), hdr.PAXRecords[key])
	}
	return b
}

// A fieldReader takes an entry apart; bad says that it is not one.
type fieldReader struct {
	b   []byte
	bad bool
}

func (r *fieldReader) number() int64 {
	n, size := binary.Varint(r.b)
	if size <= 0 {
		r.bad = true
		return 0
	}
	r.b = r.b[size:]
	return n
}

func (r *fieldReader) count() uint64 {
	n, size := binary.Uvarint(r.b)
	if size <= 0 || n > uint64(len(r.b)) {
		r.bad = true
		return 0
	}
	r.b = r.b[size:]
	return n
}

func (r *fieldReader) string() string {
	n := r.count()
	if r.bad || n > uint64(len(r.b)) {
		r.bad = true
		return ""
	}
	s := string(r.b[:n])
	r.b = r.b[n:]
	return s
}

var errIndex = fmt.Errorf("this is no index of a layer: %w", errdefs.ErrDataLoss)

func parseEntry(b []byte) (entry, error) {
	if len(b) == 0 {
		return entry{}, errIndex
	}
	r := &fieldReader{b: b[1:]}
	e := entry{hdr: tar.Header{Typeflag: b[0]}}
	h := &e.hdr
	h.Mode, h.Uid, h.Gid = r.number(), int(r.number()), int(r.number())
	sec, nsec := r.number(), r.number()
	h.ModTime = time.Unix(sec, nsec)
	h.Devmajor, h.Devminor, h.Size, e.offset = r.number(), r.number(), r.number(), r.number()
	h.Name, h.Linkname = r.string(), r.string()
	for n := r.count(); n > 0 && !r.bad; n-- {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		key := r.string()
		h.PAXRecords[paxXattr+key] = r.string()
	}
	if r.bad || len(r.b) > 0 || e.offset < 0 || h.Size < 0 {
		return entry{}, errIndex
	}
	return e, nil
}

// An indexWriter writes an index.
type indexWriter struct {
	w   *bufio.Writer
	len int64
	buf []byte
	// sum digests what is written.
	sum digest.Digester
}

func newIndexWriter(w io.Writer) (*indexWriter, error) {
	sum := digest.SHA256.Digester()
	i := &indexWriter{w: bufio.NewWriterSize(io.MultiWriter(w, sum.Hash()), 64<<10), sum: sum}
	return i, i.write([]byte(indexMagic))
}

func (i *indexWriter) write(b []byte) error {
	n, err := i.w.Write(b)
	i.len += int64(n)
	if err != nil {
		return &sinkError{err}
	}
	return nil
}

func (i *indexWriter) entry(hdr *tar.Header, offset int64) error {
	i.buf = appendEntry(i.buf[:0], hdr, offset)
	var head [binary.MaxVarintLen64]byte
	if err := i.write(binary.AppendUvarint(head[:0], uint64(len(i.buf)))); err != nil {
		return err
	}
	return i.write(i.buf)
}

// end writes the checksums and all that is still held back.
func (i *indexWriter) end(sums []uint64) error {
	if err := i.write([]byte{0}); err != nil {
		return err
	}
	for _, sum := range sums {
		if err := i.write(binary.LittleEndian.AppendUint64(nil, sum)); err != nil {
			return err
		}
	}
	if err := i.w.Flush(); err != nil {
		return &sinkError{err}
	}
	return nil
}

// An indexReader reads an index.
type indexReader struct {
	r   *bufio.Reader
	buf []byte
}

func newIndexReader(r io.Reader) (*indexReader, error) {
	i := &indexReader{r: bufio.NewReaderSize(r, 64<<10)}
	magic := make([]byte, len(indexMagic))
	if _, err := io.ReadFull(i.r, magic); err != nil || string(magic) != indexMagic {
		return nil, errIndex
	}
	return i, nil
}

// next returns the next entry, or io.EOF behind the last.
func (i *indexReader) next() (entry, error) {
	n, err := binary.ReadUvarint(i.r)
	switch {
	case err != nil:
		return entry{}, errors.Join(errIndex, err)
	case n == 0:
		return entry{}, io.EOF
	case n > maxIndexEntry:
		return entry{}, errIndex
	}
	i.buf = slices.Grow(i.buf[:0], int(n))[:n]
	if _, err := io.ReadFull(i.r, i.buf); err != nil {
		return entry{}, errors.Join(errIndex, err)
	}
	return parseEntry(i.buf)
}

// Sums returns the checksums at the end of an index of that many bytes, of a
// blob of size bytes.
func Sums(index io.ReaderAt, bytes, size int64) ([]uint64, error) {
	n := (size + ChunkSize - 1) / ChunkSize
	if bytes < n*8+int64(len(indexMagic))+1 {
		return nil, errIndex
	}
	tail := make([]byte, n*8)
	if _, err := index.ReadAt(tail, bytes-n*8); err != nil && err != io.EOF {
		return nil, err
	}
	sums := make([]uint64, n)
	for k := range sums {
		sums[k] = binary.LittleEndian.Uint64(tail[k*8:])
	}
	return sums, nil
}
