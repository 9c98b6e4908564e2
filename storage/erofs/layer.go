package erofs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync/atomic"

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

// A Budget is what the layers of an image may unpack to together; layers that
// are converted side by side share one.
type Budget struct {
	left atomic.Int64
	max  int64
}

// NewBudget returns the budget of an image.
func (l Limits) NewBudget() *Budget {
	b := &Budget{max: l.withDefaults().Bytes}
	b.left.Store(b.max)
	return b
}

// Take takes bytes off; it returns ErrOutOfRange when there are not so many.
func (b *Budget) Take(bytes int64) error {
	if b.left.Add(-bytes) < 0 {
		return tooLarge(b.max)
	}
	return nil
}

// A meter digests the uncompressed stream and ends it where the image's budget
// is used up: compressed zeros grow by a thousand.
type meter struct {
	r      io.Reader
	hash   hash.Hash
	bytes  int64
	budget *Budget
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.hash.Write(p[:n])
	m.bytes += int64(n)
	if err := m.budget.Take(int64(n)); err != nil {
		return n, err
	}
	return n, err
}

// unpack calls do with a layer's tar stream and returns the digest and the
// size of all of it.
func unpack(ctx context.Context, r io.Reader, budget *Budget, do func(io.Reader) error) (digest.Digest, int64, error) {
	plain, err := uncompressed(&sourceReader{ctx: ctx, r: r})
	if err != nil {
		return "", 0, err
	}
	defer plain.Close()
	m := &meter{r: plain, hash: digest.SHA256.Hash(), budget: budget}
	if err := do(m); err != nil {
		return "", 0, err
	}
	// What is behind the end of the tar counts for the digest.
	if _, err := io.Copy(io.Discard, m); err != nil {
		return "", 0, err
	}
	return digest.NewDigest(digest.SHA256, m.hash), m.bytes, nil
}

func wrongDiffID(got, want digest.Digest) error {
	return fmt.Errorf("unpacks to %s, and the image's config says %s: %w", got, want, errdefs.ErrDataLoss)
}

// applyLayers merges layers into the tree, the lowest first, and checks what
// they unpack to. Errors name the layer and have the classes of Apply.
func (t *Tree) applyLayers(ctx context.Context, layers []Layer) error {
	if err := t.limits.checkLayers(len(layers)); err != nil {
		return err
	}
	budget := t.limits.NewBudget()
	for i, layer := range layers {
		if err := t.applyLayer(ctx, layer, budget); err != nil {
			return layerError(i, len(layers), layer.Name, err)
		}
	}
	return nil
}

func layerError(i, n int, name string, err error) error {
	return fmt.Errorf("layer %d of %d (%s): %w", i+1, n, name, err)
}

func (t *Tree) applyLayer(ctx context.Context, layer Layer, budget *Budget) error {
	src, err := layer.Open(ctx)
	if err != nil {
		return err
	}
	defer src.Close()
	got, _, err := unpack(ctx, src, budget, func(r io.Reader) error { return t.Apply(ctx, r) })
	if err == nil && layer.DiffID != "" && got != layer.DiffID {
		err = wrongDiffID(got, layer.DiffID)
	}
	return err
}
