package agentapi

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// MaxExtent is the most data that one extent carries, in bytes.
const MaxExtent = 1 << 20

// An Extent is a part of a disk that FORMAT writes: Data, or if that is nil,
// Length zeroes.
type Extent struct {
	Offset, Length int64
	Data           []byte
}

// extentHeader is offset, length and whether data follows.
const extentHeader = 8 + 8 + 1

// WriteExtent writes one extent in FORMAT's form: offset and length as
// big-endian uint64, 1 and the data or 0.
func WriteExtent(w io.Writer, e Extent) error {
	b := make([]byte, 0, extentHeader+len(e.Data))
	if e.Data != nil {
		e.Length = int64(len(e.Data))
	}
	b = binary.BigEndian.AppendUint64(b, uint64(e.Offset))
	b = binary.BigEndian.AppendUint64(b, uint64(e.Length))
	if e.Data == nil {
		b = append(b, 0)
	} else {
		b = append(append(b, 1), e.Data...)
	}
	_, err := w.Write(b)
	return err
}

// ReadExtent reads one extent into buf, which has room for MaxExtent; io.EOF
// behind the last one. ErrInvalidArgument for what WriteExtent does not write,
// or what lies outside of a disk of size bytes.
func ReadExtent(r io.Reader, buf []byte, size int64) (Extent, error) {
	var h [extentHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Extent{}, err
	}
	e := Extent{Offset: int64(binary.BigEndian.Uint64(h[:])), Length: int64(binary.BigEndian.Uint64(h[8:]))}
	if e.Offset < 0 || e.Length < 0 || e.Offset > size || e.Length > size-e.Offset || h[16] > 1 || h[16] == 1 && e.Length > MaxExtent {
		return Extent{}, fmt.Errorf("extent of %d bytes at %d of a disk of %d: %w", e.Length, e.Offset, size, errdefs.ErrInvalidArgument)
	}
	if h[16] == 0 {
		return e, nil
	}
	e.Data = buf[:e.Length]
	if _, err := io.ReadFull(r, e.Data); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Extent{}, err
	}
	return e, nil
}
