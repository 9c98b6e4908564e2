package erofs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// Version changes when Build would write something else for the same layers;
// disks of other versions are converted again.
const Version = 1

// An Image is a file that Build made.
type Image struct {
	Bytes  int64         // its size
	Digest digest.Digest // of the whole file, holes being zeros
	// Dropped counts extended attributes left out, by name space.
	Dropped map[string]int
}

// Build makes path the EROFS image of layers, the lowest first: it writes a
// temporary file beside it, makes that durable and renames it, so path is
// whole or not there. The bytes depend on the layers alone. Failing, it leaves
// nothing; errors have the classes of Tree.Apply, others are the file
// system's.
func Build(ctx context.Context, path string, layers []Layer, limits Limits) (Image, error) {
	f, err := os.CreateTemp(filepath.Dir(path), TempPrefix+"*")
	if err != nil {
		return Image{}, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	img, err := build(ctx, f, layers, limits)
	if err != nil {
		return Image{}, err
	}
	if err := f.Sync(); err != nil {
		return Image{}, err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return Image{}, err
	}
	return img, syncDir(filepath.Dir(path))
}

// TempPrefix starts the names of Build's temporary files, which a process that
// died may have left.
const TempPrefix = ".converting-"

func build(ctx context.Context, f *os.File, layers []Layer, limits Limits) (Image, error) {
	blob := NewBlob(f)
	tree := NewTree(blob, limits)
	if err := tree.ApplyLayers(ctx, layers); err != nil {
		return Image{}, err
	}
	if err := blob.Punch(); err != nil {
		return Image{}, err
	}
	size, err := tree.WriteImage(f, blob.End(), layersUUID(layers))
	if err != nil {
		return Image{}, err
	}
	if err := f.Truncate(size); err != nil {
		return Image{}, err
	}
	sum, err := fileDigest(ctx, f)
	if err != nil {
		return Image{}, err
	}
	return Image{Bytes: size, Digest: sum, Dropped: tree.Dropped()}, nil
}

// layersUUID derives the file system's UUID (a version 8 one) from the layers.
func layersUUID(layers []Layer) (uuid [16]byte) {
	h := sha256.New()
	for _, l := range layers {
		fmt.Fprintf(h, "%s %s\n", l.Name, l.DiffID)
	}
	copy(uuid[:], h.Sum(nil))
	uuid[6] = uuid[6]&0x0f | 0x80
	uuid[8] = uuid[8]&0x3f | 0x80
	return uuid
}

func fileDigest(ctx context.Context, f *os.File) (digest.Digest, error) {
	h := sha256.New()
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		n, err := f.ReadAt(buf, off)
		h.Write(buf[:n])
		off += int64(n)
		if err == io.EOF {
			return digest.NewDigest(digest.SHA256, h), nil
		}
		if err != nil {
			return "", err
		}
	}
}

// Check looks whether path still is the image that Build described: always
// its size and its superblock, and with full every byte. It returns
// ErrDataLoss when it is not, ErrNotFound when nothing is there.
func Check(ctx context.Context, path string, want Image, full bool) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("image disk %s is gone: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != want.Bytes {
		return fmt.Errorf("image disk %s has %d bytes, not %d: %w", path, fi.Size(), want.Bytes, errdefs.ErrDataLoss)
	}
	head := make([]byte, blockSize)
	if _, err := f.ReadAt(head, 0); err != nil {
		return fmt.Errorf("image disk %s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	sb := head[superOffset:]
	le := binary.LittleEndian
	if le.Uint32(sb) != superMagic || le.Uint32(sb[4:]) != superChecksum(sb) || int64(le.Uint32(sb[36:]))<<blockBits != want.Bytes {
		return fmt.Errorf("image disk %s has a damaged superblock: %w", path, errdefs.ErrDataLoss)
	}
	if !full {
		return nil
	}
	sum, err := fileDigest(ctx, f)
	if err != nil {
		return err
	}
	if sum != want.Digest {
		return fmt.Errorf("image disk %s is %s, and was made as %s: %w", path, sum, want.Digest, errdefs.ErrDataLoss)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
