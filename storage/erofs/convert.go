package erofs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// A Converted is what became of a layer: a data blob and an index of it.
type Converted struct {
	DiffID   digest.Digest // of the uncompressed layer
	Unpacked int64         // bytes of the uncompressed layer
	Data     int64         // bytes of the blob, a multiple of 4096
	Index    int64         // bytes of the index
	// IndexDigest is of the index, and so, by the checksums in it, of the blob.
	IndexDigest digest.Digest
	Entries     int
}

// Convert reads a layer as a registry has it, once and in order, so that it
// may still be on its way here, and writes its contents into data and what it
// says of them into index. Memory does not grow with the layer, but for 8
// bytes a MiB. Limits hold for this layer; what it unpacks to is taken off
// budget. Errors have the classes of Tree.Apply.
func Convert(ctx context.Context, layer io.Reader, data io.WriterAt, index io.Writer, limits Limits, budget *Budget) (Converted, error) {
	iw, err := newIndexWriter(index)
	if err != nil {
		return Converted{}, err
	}
	c := &converter{blob: newBlob(data), index: iw, limits: limits.withDefaults()}
	id, unpacked, err := unpack(ctx, layer, budget, func(r io.Reader) error {
		return eachEntry(ctx, r, func(hdr *tar.Header, body io.Reader) error { return c.entry(ctx, hdr, body) })
	})
	if err == nil {
		err = c.blob.flush()
	}
	if err == nil {
		err = c.index.end(c.blob.sums)
	}
	if err != nil {
		return Converted{}, err
	}
	return Converted{
		DiffID: id, Unpacked: unpacked, Data: c.blob.size(), Index: c.index.len, IndexDigest: c.index.sum.Digest(), Entries: c.entries,
	}, nil
}

type converter struct {
	blob    *blob
	index   *indexWriter
	limits  Limits
	entries int
	meta    int64
}

// entry keeps one entry, in the form in which Tree.entry will see it.
func (c *converter) entry(ctx context.Context, hdr *tar.Header, body io.Reader) error {
	if c.entries++; c.entries > c.limits.Entries {
		return tooManyFiles(c.limits)
	}
	name, err := cleanName(hdr.Name)
	if err != nil {
		return err
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader || isAufsMeta(name) || name == "" && hdr.Typeflag != tar.TypeDir {
		return nil
	}
	e := *hdr
	e.Size, e.Linkname = 0, ""
	// "./" would be cut off a name; "" is the root.
	e.Name = name
	if err := c.attributes(&e); err != nil {
		return err
	}
	_, base := splitPath(name)
	var offset int64
	switch hdr.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		if strings.HasPrefix(base, whiteoutPrefix) {
			break // what is in it is nobody's business
		}
		if hdr.Size < 0 || hdr.Size > c.limits.Bytes {
			return tooLarge(c.limits.Bytes)
		}
		if e.Size = hdr.Size; e.Size > 0 {
			offset, err = putContents(ctx, c.blob.put, body, e.Size)
		}
	case tar.TypeLink, tar.TypeSymlink:
		if len(hdr.Linkname) > maxPath {
			err = fmt.Errorf("a link with a target of %d bytes", len(hdr.Linkname))
		}
		e.Linkname = hdr.Linkname
	case tar.TypeDir, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		err = unknownType(hdr)
	}
	if err != nil {
		return err
	}
	if c.meta += int64(nodeCost + len(base) + len(e.Linkname)); c.meta > c.limits.Metadata {
		return tooManyNames(c.limits)
	}
	return c.index.entry(&e, offset)
}

func unknownType(hdr *tar.Header) error {
	return fmt.Errorf("a tar entry of unknown type %q", hdr.Typeflag)
}

// attributes leaves in hdr the extended attributes that some file could have.
// Of the others it leaves the name space, for which Tree counts them.
func (c *converter) attributes(hdr *tar.Header) error {
	if len(hdr.PAXRecords) == 0 {
		return nil
	}
	records, kept := hdr.PAXRecords, map[string]string{}
	hdr.PAXRecords = map[string]string{}
	for key, value := range records {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok {
			continue
		}
		if !canHold(name, value) {
			space, _, _ := strings.Cut(name, ".")
			hdr.PAXRecords[paxXattr+fmt.Sprintf("%.32s.", space)] = ""
			continue
		}
		hdr.PAXRecords[key], kept[name] = value, value
		c.meta += int64(len(name) + len(value))
	}
	if size := xattrSize(kept); size > c.limits.ExtendedAttributes {
		return tooManyAttributes(size, c.limits)
	}
	return nil
}

func tooManyAttributes(size int, limits Limits) error {
	return fmt.Errorf("%d bytes of extended attributes: a file may have %d: %w", size, limits.ExtendedAttributes, errdefs.ErrOutOfRange)
}

// IsLayerFault tells whether Convert or Merge failed for what a layer is,
// not for the place that it was read from or written to.
func IsLayerFault(err error) bool {
	var sink *sinkError
	return !errors.As(err, &sink) && !isReadFault(err) && (errdefs.IsDataLoss(err) || errdefs.IsOutOfRange(err))
}
