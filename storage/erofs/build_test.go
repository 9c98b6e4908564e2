package erofs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/containerd/errdefs"
)

// A built image is its metadata and blobs, one behind the other in a file, as
// a disk shows them to a VM.
type built struct {
	Image
	layers []Converted
	index  [][]byte
}

// Build converts and merges layers as the image store does, into one file.
// Failing, it leaves nothing.
func Build(ctx context.Context, path string, layers []Layer, limits Limits) (_ built, err error) {
	var b built
	f, err := os.Create(path)
	if err != nil {
		return b, err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(path)
		}
	}()
	if err := limits.checkLayers(len(layers)); err != nil {
		return b, err
	}
	data, err := os.CreateTemp("", "blobs-")
	if err != nil {
		return b, err
	}
	defer os.Remove(data.Name())
	defer data.Close()
	budget := limits.NewBudget()
	var indexed []Indexed
	var end int64
	for i, l := range layers {
		r, err := l.Open(ctx)
		if err != nil {
			return b, err
		}
		var index bytes.Buffer
		c, err := Convert(ctx, r, &shifted{data, end}, &index, limits, budget)
		if err == nil && l.DiffID != "" && c.DiffID != l.DiffID {
			err = wrongDiffID(c.DiffID, l.DiffID)
		}
		if err != nil {
			return b, layerError(i, len(layers), l.Name, err)
		}
		end += c.Data
		b.layers, b.index = append(b.layers, c), append(b.index, index.Bytes())
		indexed = append(indexed, Indexed{Name: l.Name, DiffID: c.DiffID, Data: c.Data, Open: func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(index.Bytes())), nil
		}})
	}
	if b.Image, err = Merge(ctx, f, indexed, limits); err != nil {
		return b, err
	}
	if err := f.Truncate(b.Meta + end); err != nil {
		return b, err
	}
	return b, copyData(f, data, b.Meta, end)
}

// copyData copies what is not a hole.
func copyData(to, from *os.File, base, size int64) error {
	buf := make([]byte, ChunkSize)
	for off := int64(0); off < size; off += ChunkSize {
		n, err := from.ReadAt(buf, off)
		if err != nil && err != io.EOF {
			return err
		}
		for i := 0; i < n; i += blockSize {
			if block := buf[i:min(n, i+blockSize)]; !bytes.Equal(block, zeroBlock[:len(block)]) {
				if _, err := to.WriteAt(block, base+off+int64(i)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

type shifted struct {
	w   io.WriterAt
	off int64
}

func (s *shifted) WriteAt(p []byte, off int64) (int, error) { return s.w.WriteAt(p, s.off+off) }

// The same layers make the same bytes, and every byte of a blob and an index
// is under a checksum.
func TestEveryByteIsChecked(t *testing.T) {
	layer := tarOf(t, "a", "d/", "d/b", "l->a", "h=a")
	big := headersWith(t, 3<<20+5)
	for _, tar := range [][]byte{layer, big} {
		data, err := os.CreateTemp(t.TempDir(), "")
		if err != nil {
			t.Fatal(err)
		}
		var index bytes.Buffer
		c, err := Convert(t.Context(), bytes.NewReader(tar), data, &index, Limits{}, Limits{}.NewBudget())
		if err != nil {
			t.Fatal(err)
		}
		if err := data.Truncate(c.Data); err != nil {
			t.Fatal(err)
		}
		if c.IndexDigest.Algorithm().FromBytes(index.Bytes()) != c.IndexDigest || int64(index.Len()) != c.Index {
			t.Error("the index has another digest or size than Convert says")
		}
		sums, err := Sums(bytes.NewReader(index.Bytes()), int64(index.Len()), c.Data)
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckData(t.Context(), data, c.Data, sums); err != nil {
			t.Errorf("CheckData of what Convert wrote = %v", err)
		}
		for _, off := range []int64{0, 1, 4095, c.Data / 2, c.Data - 1} {
			var was [1]byte
			if _, err := data.ReadAt(was[:], off); err != nil {
				t.Fatal(err)
			}
			for bit := range 8 {
				if _, err := data.WriteAt([]byte{was[0] ^ 1<<bit}, off); err != nil {
					t.Fatal(err)
				}
				if err := CheckData(t.Context(), data, c.Data, sums); !errdefs.IsDataLoss(err) {
					t.Errorf("with bit %d of byte %d flipped CheckData = %v, want ErrDataLoss", bit, off, err)
				}
			}
			if _, err := data.WriteAt(was[:], off); err != nil {
				t.Fatal(err)
			}
		}
		for _, size := range []int64{c.Data - 1, c.Data + 4096, 0} {
			if err := data.Truncate(size); err != nil {
				t.Fatal(err)
			}
			if err := CheckData(t.Context(), data, c.Data, sums); !errdefs.IsDataLoss(err) {
				t.Errorf("with %d bytes of %d CheckData = %v, want ErrDataLoss", size, c.Data, err)
			}
		}
		data.Close()
	}
}

// headersWith is a layer of one file that is no zeros, of that size.
func headersWith(t *testing.T, size int) []byte {
	data := headers(t, fileHeader("big", int64(size)))
	for i := 512; i < 512+size; i++ {
		data[i] = byte(i%251) + 1
	}
	return data
}

// What is not an index is refused, whatever it is.
func TestBrokenIndex(t *testing.T) {
	var index bytes.Buffer
	if _, err := Convert(t.Context(), bytes.NewReader(tarOf(t, "a", "d/", "d/b", "l->a")), discardAt{}, &index, Limits{}, Limits{}.NewBudget()); err != nil {
		t.Fatal(err)
	}
	merge := func(b []byte) error {
		_, err := Merge(t.Context(), io.Discard, []Indexed{{Name: "x", Data: 8192, Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}}, Limits{})
		return err
	}
	if err := merge(index.Bytes()); err != nil {
		t.Fatal(err)
	}
	for n := range index.Len() - 8 { // the sums are not Merge's
		if err := merge(index.Bytes()[:n]); n < index.Len()-9 && !errdefs.IsDataLoss(err) {
			t.Errorf("the first %d bytes: %v, want ErrDataLoss", n, err)
		}
	}
	if _, err := Sums(bytes.NewReader(nil), 0, 1<<40); !errdefs.IsDataLoss(err) {
		t.Errorf("Sums of nothing = %v", err)
	}
	boom := errors.New("boom")
	_, err := Merge(t.Context(), io.Discard, []Indexed{{Name: "x", Open: func() (io.ReadCloser, error) { return nil, boom }}}, Limits{})
	if !errors.Is(err, boom) || IsLayerFault(err) {
		t.Errorf("Merge of what cannot be opened = %v", err)
	}
}

type discardAt struct{}

func (discardAt) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// A full disk is not the layer's fault.
func TestWriteErrors(t *testing.T) {
	full := fmt.Errorf("no room: %w", errdefs.ErrDataLoss) // of a class that a layer's fault has
	tar := headersWith(t, 2<<20)
	for what, c := range map[string]struct {
		data  io.WriterAt
		index io.Writer
	}{
		"data":  {failing{full}, io.Discard},
		"index": {discardAt{}, failing{full}},
	} {
		_, err := Convert(t.Context(), bytes.NewReader(tar), c.data, c.index, Limits{}, Limits{}.NewBudget())
		if !errors.Is(err, full) || IsLayerFault(err) {
			t.Errorf("%s: Convert = %v; IsLayerFault %v", what, err, IsLayerFault(err))
		}
	}
}

type failing struct{ err error }

func (f failing) WriteAt([]byte, int64) (int, error) { return 0, f.err }
func (f failing) Write([]byte) (int, error)          { return 0, f.err }
