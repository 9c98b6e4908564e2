package guestimage

import (
	"bytes"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// A Compression of the initramfs.
type Compression string

// Compressions that kernels with CONFIG_RD_LZ4 and CONFIG_RD_ZSTD undo.
const (
	Uncompressed Compression = "none"
	LZ4          Compression = "lz4"
	Zstd         Compression = "zstd"
)

// Measured under emulation with a 9.6 MB archive, QEMU started to /init reached,
// medians of 3: none 1.66 s, lz4 1.55 s, zstd 1.70 s, all within the noise of
// 0.2 s. Without compression the guest needs no second copy while unpacking, and
// the host keeps one copy in its page cache for all.
const defaultCompression = Uncompressed

func compress(archive []byte, c Compression) ([]byte, error) {
	var b bytes.Buffer
	switch c {
	case Uncompressed:
		return archive, nil
	case LZ4:
		w := lz4.NewWriter(&b)
		// The kernel knows only the legacy frame.
		if err := w.Apply(lz4.LegacyOption(true), lz4.CompressionLevelOption(lz4.Level9)); err != nil {
			return nil, err
		}
		if _, err := w.Write(archive); err != nil {
			return nil, err
		}
		if err := w.Close(); err != nil {
			return nil, err
		}
		return b.Bytes(), nil
	case Zstd:
		w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8<<20))
		if err != nil {
			return nil, err
		}
		defer func() { _ = w.Close() }()
		return w.EncodeAll(archive, nil), nil
	}
	return nil, fmt.Errorf("guest image: unknown compression %q: %w", c, errdefs.ErrInvalidArgument)
}
