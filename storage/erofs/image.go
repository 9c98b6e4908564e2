package erofs

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	digest "github.com/opencontainers/go-digest"
)

// Version changes when Convert or Merge would write something else for the
// same layers; what other versions made is made again.
const Version = 2

// An Indexed is a layer that Convert has converted.
type Indexed struct {
	Name   string // for messages
	DiffID digest.Digest
	Data   int64 // bytes of its blob
	Open   func() (io.ReadCloser, error)
}

// An Image is what Merge made.
type Image struct {
	Meta   int64         // bytes of the metadata
	Data   int64         // bytes of all blobs
	Digest digest.Digest // of the metadata
	// Dropped counts extended attributes left out, by name space.
	Dropped map[string]int
}

// Merge writes the metadata of the image of layers, the lowest first. Metadata
// and, behind it, the layers' blobs in the same order are one EROFS image. The
// bytes depend on the layers alone. Memory grows with the number of files of
// all layers (about 400 bytes each). Errors have the classes of Tree.Apply.
func Merge(ctx context.Context, w io.Writer, layers []Indexed, limits Limits) (Image, error) {
	tree := newTree(nil, limits)
	if err := tree.limits.checkLayers(len(layers)); err != nil {
		return Image{}, err
	}
	var data int64
	for i, layer := range layers {
		if err := tree.mergeLayer(ctx, layer, data); err != nil {
			return Image{}, layerError(i, len(layers), layer.Name, err)
		}
		data += layer.Data
	}
	sum := digest.SHA256.Digester()
	meta, err := tree.write(io.MultiWriter(w, sum.Hash()), data, layersUUID(layers))
	if err != nil {
		return Image{}, err
	}
	return Image{Meta: meta, Data: data, Digest: sum.Digest(), Dropped: tree.dropped}, nil
}

func (t *Tree) mergeLayer(ctx context.Context, layer Indexed, base int64) error {
	r, err := layer.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	return t.applyIndex(ctx, r, base)
}

// layersUUID derives the file system's UUID (a version 8 one) from the layers.
func layersUUID(layers []Indexed) (uuid [16]byte) {
	h := sha256.New()
	for _, l := range layers {
		fmt.Fprintf(h, "%s\n", l.DiffID)
	}
	copy(uuid[:], h.Sum(nil))
	uuid[6] = uuid[6]&0x0f | 0x80
	uuid[8] = uuid[8]&0x3f | 0x80
	return uuid
}
