package image

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	goerofs "github.com/erofs/go-erofs"
)

const sector = 512

// descriptor is the VMDK descriptor of a disk: its extents, one behind the
// other, by paths relative to the descriptor. They are RW, since QEMU passes
// over the others: it is by the device that the disk is read-only, and the files
// are nobody's to write. No empty line is before an extent: QEMU 7.2 reads that
// extent twice.
func (s *Store) descriptor(id string, rec diskRecord) string {
	var b strings.Builder
	b.WriteString("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n# Extent description\n")
	for _, e := range s.extents(id, rec) {
		rel, err := filepath.Rel(s.diskDir(), e.path)
		if err != nil {
			rel = e.path
		}
		fmt.Fprintf(&b, "RW %d FLAT \"%s\" 0\n", e.bytes/sector, rel)
	}
	b.WriteString("\nddb.virtualHWVersion = \"4\"\nddb.adapterType = \"lsilogic\"\n")
	return b.String()
}

func (s *Store) writeDescriptor(id string, rec diskRecord) error {
	f, err := s.tempFile(s.diskDir())
	if err != nil {
		return err
	}
	defer f.discard()
	if _, err := f.WriteString(s.descriptor(id, rec)); err != nil {
		return err
	}
	if err := f.finish(); err != nil {
		return err
	}
	return os.Rename(f.Name(), s.diskPath(id))
}

type extent struct {
	path  string
	bytes int64
}

// extents are the files of a disk in their order. A layer without contents has
// none.
func (s *Store) extents(id string, rec diskRecord) []extent {
	list := []extent{{s.metaPath(id), rec.Meta}}
	for _, l := range rec.Layers {
		if l.Data > 0 {
			list = append(list, extent{s.layerPath(l.DiffID, dataSuffix), l.Data})
		}
	}
	return list
}

// OpenTree shows the files of an image whose disk somebody holds.
func (s *Store) OpenTree(imageID string) (fs.FS, io.Closer, error) {
	rec, err := s.diskRecord(imageID)
	if err != nil {
		return nil, nil, err
	}
	d := &openDisk{}
	for _, e := range s.extents(imageID, rec) {
		f, err := os.Open(e.path)
		if err != nil {
			d.Close()
			return nil, nil, err
		}
		d.files, d.ends = append(d.files, f), append(d.ends, d.size()+e.bytes)
	}
	tree, err := goerofs.Open(d)
	if err != nil {
		d.Close()
		return nil, nil, fmt.Errorf("disk of image %s: %w: %w", imageID, err, errdefs.ErrDataLoss)
	}
	return tree, d, nil
}

// An openDisk reads files one behind the other.
type openDisk struct {
	files []*os.File
	ends  []int64
}

func (d *openDisk) size() int64 {
	if len(d.ends) == 0 {
		return 0
	}
	return d.ends[len(d.ends)-1]
}

func (d *openDisk) ReadAt(p []byte, off int64) (n int, err error) {
	start := int64(0)
	for i, end := range d.ends {
		for n < len(p) && off < end {
			part := p[n:min(int64(len(p)), int64(n)+end-off)]
			m, err := d.files[i].ReadAt(part, off-start)
			n, off = n+m, off+int64(m)
			if m < len(part) {
				return n, err
			}
		}
		start = end
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *openDisk) Close() error {
	for _, f := range d.files {
		f.Close()
	}
	return nil
}
