package erofs

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// Limits bound what an image may cost, so that a hostile one ends in an error
// and not in a full disk. Zero values mean the defaults.
type Limits struct {
	// Layers of an image; default 1000 (Docker builds at most 127).
	Layers int
	// Bytes of all files of all layers, and apart from that of all
	// uncompressed layers; default 64 GiB.
	Bytes int64
	// Entries of all layers; default 4 million.
	Entries int
	// Metadata is the memory, about, that names and attributes of all layers
	// may take while an image is converted; default 512 MiB (more than a
	// million files).
	Metadata int64
	// ExtendedAttributes bounds the bytes of extended attributes of a file;
	// default and maximum 64 KiB, which is what Linux lists at most.
	ExtendedAttributes int
}

func (l Limits) withDefaults() Limits {
	if l.Layers <= 0 {
		l.Layers = 1000
	}
	if l.Bytes <= 0 {
		l.Bytes = 64 << 30
	}
	if l.Entries <= 0 {
		l.Entries = 4 << 20
	}
	if l.Metadata <= 0 {
		l.Metadata = 512 << 20
	}
	if l.ExtendedAttributes <= 0 || l.ExtendedAttributes > 64<<10 {
		l.ExtendedAttributes = 64 << 10
	}
	return l
}

func (l Limits) checkLayers(n int) error {
	if n > l.MaxLayers() {
		return fmt.Errorf("%d layers: an image may have %d: %w", n, l.MaxLayers(), errdefs.ErrOutOfRange)
	}
	return nil
}

// MaxLayers is how many layers an image may have.
func (l Limits) MaxLayers() int { return l.withDefaults().Layers }
