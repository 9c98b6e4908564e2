package erofs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
)

// A Layer is one layer of an image as a registry has it: a tar stream,
// gzipped, with zstd, or plain (its first bytes tell).
type Layer struct {
	// Name is for messages, such as the digest of the compressed layer.
	Name string
	// DiffID is the digest that the uncompressed stream must have; empty: any.
	DiffID digest.Digest
	Open   func(ctx context.Context) (io.ReadCloser, error)
}

// zstdWindow bounds a decoder's memory; it is what zstd --long=27, the largest
// that decoders accept by default, needs.
const zstdWindow = 128 << 20

// uncompressed returns a reader of a layer's tar stream.
func uncompressed(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 256<<10)
	head, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 8}):
		zr, err := gzip.NewReader(br)
		if err != nil {
			return nil, fmt.Errorf("gzip: %w: %w", err, errdefs.ErrDataLoss)
		}
		return &decoder{name: "gzip", Reader: zr, close: zr.Close}, nil
	case bytes.Equal(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		zr, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w: %w", err, errdefs.ErrDataLoss)
		}
		return &decoder{name: "zstd", Reader: zr, close: func() error { zr.Close(); return nil }}, nil
	}
	return io.NopCloser(br), nil
}

// A decoder gives decompression errors their class.
type decoder struct {
	io.Reader
	name  string
	close func() error
}

func (d *decoder) Read(p []byte) (int, error) {
	n, err := d.Reader.Read(p)
	if err != nil && err != io.EOF && !isReadFault(err) {
		err = fmt.Errorf("%s: %w: %w", d.name, err, errdefs.ErrDataLoss)
	}
	return n, err
}

func (d *decoder) Close() error { return d.close() }

// A readFault is an error of the place where the layer is kept, not of the
// layer.
type readFault struct{ err error }

func (e *readFault) Error() string { return e.err.Error() }
func (e *readFault) Unwrap() error { return e.err }

func isReadFault(err error) bool {
	var fault *readFault
	return errors.As(err, &fault)
}

type sourceReader struct {
	ctx context.Context
	r   io.Reader
}

func (s *sourceReader) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		return 0, &readFault{err}
	}
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		err = &readFault{err}
	}
	return n, err
}

// A meter digests the uncompressed stream and ends it where the image's limit
// is passed: compressed zeros grow by a thousand.
type meter struct {
	r    io.Reader
	hash hash.Hash
	left *int64
	max  int64
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.hash.Write(p[:n])
	if *m.left -= int64(n); *m.left < 0 {
		return n, fmt.Errorf("the image unpacks to more than %d MiB: %w", m.max>>20, errdefs.ErrOutOfRange)
	}
	return n, err
}

// ApplyLayers merges layers into the tree, the lowest first, and checks what
// they unpack to. Errors name the layer and have the classes of Apply.
func (t *Tree) ApplyLayers(ctx context.Context, layers []Layer) error {
	if len(layers) > t.limits.Layers {
		return fmt.Errorf("%d layers: an image may have %d: %w", len(layers), t.limits.Layers, errdefs.ErrOutOfRange)
	}
	left := t.limits.Bytes
	for i, layer := range layers {
		if err := t.applyLayer(ctx, layer, &left); err != nil {
			return fmt.Errorf("layer %d of %d (%s): %w", i+1, len(layers), layer.Name, err)
		}
	}
	return nil
}

func (t *Tree) applyLayer(ctx context.Context, layer Layer, left *int64) error {
	src, err := layer.Open(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	plain, err := uncompressed(&sourceReader{ctx: ctx, r: src})
	if err != nil {
		return err
	}
	defer plain.Close()
	m := &meter{r: plain, hash: digest.SHA256.Hash(), left: left, max: t.limits.Bytes}
	if err := t.Apply(ctx, m); err != nil {
		return err
	}
	// What is behind the end of the tar counts for the digest.
	if _, err := io.Copy(io.Discard, m); err != nil {
		return err
	}
	got := digest.NewDigest(digest.SHA256, m.hash)
	if layer.DiffID != "" && got != layer.DiffID {
		return fmt.Errorf("unpacks to %s, and the image's config says %s: %w", got, layer.DiffID, errdefs.ErrDataLoss)
	}
	return nil
}
