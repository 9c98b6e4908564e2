package erofs

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage/treesum"
)

// headers makes a layer of tar headers as they are, with bodies of zeros.
func headers(t testing.TB, list ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range list {
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func fileHeader(name string, size int64) tar.Header {
	return tar.Header{Name: name, Mode: 0o644, Size: size}
}

// paxed is a file with one PAX record as it is, which Go's writer would refuse.
func paxed(record string) []byte {
	var body string
	for n := 0; ; n++ {
		if body = fmt.Sprintf("%d %s\n", n, record); len(body) == n {
			break
		}
	}
	head := func(typ byte, name string, size int) []byte {
		h := make([]byte, 512)
		copy(h, name)
		copy(h[100:], "0000644\x000000000\x000000000\x00")
		copy(h[124:], fmt.Sprintf("%011o\x0000000000000\x00", size))
		copy(h[148:], "        ")
		h[156] = typ
		copy(h[257:], "ustar\x0000")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		return h
	}
	pad := make([]byte, (512-len(body)%512)%512)
	return bytes.Join([][]byte{head('x', "pax", len(body)), []byte(body), pad, head('0', "file", 0), make([]byte, 1024)}, nil)
}

// TestHostileEntries applies layers that attack whoever unpacks them: each is
// refused with the layer's name, or lands inside the image and nowhere else.
func TestHostileEntries(t *testing.T) {
	const mode = 0o644
	link := func(name, target string) tar.Header {
		return tar.Header{Name: name, Linkname: target, Typeflag: tar.TypeSymlink, Mode: 0o777}
	}
	reg := func(name string) tar.Header { return tar.Header{Name: name, Mode: mode, Size: 3} }
	for name, c := range map[string]struct {
		layers [][]byte
		want   string // the paths, or
		says   string // what the refusal says
	}{
		"write through an absolute symlink":      {layers: [][]byte{headers(t, link("e", "/etc")), headers(t, reg("e/atoll-x"))}, want: "e etc/ etc/atoll-x"},
		"write through a symlink that climbs":    {layers: [][]byte{headers(t, link("e", "../../../../tmp"), reg("e/atoll-x"))}, want: "e tmp/ tmp/atoll-x"},
		"a file in place of a symlink":           {layers: [][]byte{headers(t, link("passwd", "/etc/passwd"), reg("passwd"))}, want: "passwd"},
		"hard link through a symlink":            {layers: [][]byte{headers(t, link("e", "/"), tar.Header{Name: "h", Linkname: "e/etc/passwd", Typeflag: tar.TypeLink})}, says: "not in the image"},
		"hard link out, absolute":                {layers: [][]byte{headers(t, tar.Header{Name: "h", Linkname: "/etc/passwd", Typeflag: tar.TypeLink})}, says: "not in the image"},
		"hard link across layers, then replaced": {layers: [][]byte{headers(t, reg("a")), headers(t, tar.Header{Name: "b", Linkname: "a", Typeflag: tar.TypeLink}), headers(t, reg("a"), tar.Header{Name: ".wh.b"})}, want: "a"},
		"hard link to itself":                    {layers: [][]byte{headers(t, tar.Header{Name: "a", Linkname: "a", Typeflag: tar.TypeLink})}, says: "not in the image"},
		"whiteout of the root's parent":          {layers: [][]byte{headers(t, reg("a")), headers(t, tar.Header{Name: ".wh..."})}, says: "whiteout"},
		"whiteout through a symlink":             {layers: [][]byte{headers(t, reg("d/a"), link("l", "/d")), headers(t, tar.Header{Name: "l/.wh.a"})}, want: "d/ l"},
		"whiteout with a body":                   {layers: [][]byte{headers(t, reg("a")), headers(t, reg(".wh.a"), reg("b"))}, want: "b"},
		"opaque marker that is a directory":      {layers: [][]byte{headers(t, reg("d/a")), headers(t, tar.Header{Name: "d/.wh..wh..opq/", Typeflag: tar.TypeDir}, reg("d/b"))}, want: "d/ d/b"},
		"a whiteout of a whiteout":               {layers: [][]byte{headers(t, reg("a")), headers(t, tar.Header{Name: ".wh..wh.a"})}, want: "a"},
		"device nodes and setuid": {layers: [][]byte{headers(t,
			tar.Header{Name: "sda", Typeflag: tar.TypeBlock, Devmajor: 8}, tar.Header{Name: "mem", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 1},
			tar.Header{Name: "root", Mode: 0o6755}, tar.Header{Name: "fifo", Typeflag: tar.TypeFifo})}, want: "fifo mem root sda"},
		"the same name thrice":      {layers: [][]byte{headers(t, reg("a"), tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o755}, reg("a"))}, want: "a"},
		"a file below a file":       {layers: [][]byte{headers(t, reg("a")), headers(t, reg("a/b"))}, says: "not a directory"},
		"a name of 64 KiB":          {layers: [][]byte{headers(t, reg(strings.Repeat("n", 64<<10)))}, says: "65536 bytes"},
		"a path of 64 KiB":          {layers: [][]byte{headers(t, reg(strings.Repeat("d/", 32<<10)+"x"))}, says: "65537 bytes"},
		"a link target of 64 KiB":   {layers: [][]byte{headers(t, link("l", strings.Repeat("t", 64<<10)))}, says: "65536 bytes"},
		"a name that is not UTF-8":  {layers: [][]byte{headers(t, tar.Header{Name: "\xff\xfe", Mode: mode, Format: tar.FormatGNU})}, want: `"/\xff\xfe"`}, // as the list quotes it
		"a PAX size that is none":   {layers: [][]byte{paxed("size=none")}, says: "broken tar stream"},
		"a negative PAX size":       {layers: [][]byte{paxed("size=-1")}, says: "broken tar stream"},
		"a PAX size of 8 EiB":       {layers: [][]byte{paxed("size=9223372036854775807")}, says: "unpacks to more than"},
		"a PAX size that overflows": {layers: [][]byte{paxed("size=99999999999999999999999999")}, says: "broken tar stream"},
		"a PAX time that is none":   {layers: [][]byte{paxed("mtime=NaN")}, says: "broken tar stream"},
		"a PAX time of year 1e12":   {layers: [][]byte{paxed("mtime=31556952000000000000")}, says: "broken tar stream"},
		"a PAX path that climbs":    {layers: [][]byte{paxed("path=../../x")}, says: "leaves the image's root"},
		"a PAX path with a NUL":     {layers: [][]byte{paxed("path=a\x00b")}, says: "broken tar stream"},
		"a sparse file of 1 EiB":    {layers: [][]byte{sparseTar(t, 1<<60)}, says: "unpacks to more than"},
		"xattrs beyond the limit":   {layers: [][]byte{headers(t, tar.Header{Name: "x", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.x": strings.Repeat("v", 60<<10), "SCHILY.xattr.user.y": strings.Repeat("v", 60<<10)}})}, says: "extended attributes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			var layers []Layer
			for i, l := range c.layers {
				layers = append(layers, bytesLayer(fmt.Sprint("layer-", i), l))
			}
			_, err := Build(t.Context(), filepath.Join(dir, "image"), layers, Limits{Bytes: 1 << 30})
			runtime.ReadMemStats(&after)
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 64<<20 {
				t.Errorf("%d MiB were allocated", grown>>20)
			}
			if left, _ := os.ReadDir(dir); len(left) > 1 || err != nil && len(left) > 0 {
				t.Errorf("in the directory: %v", left)
			}
			for _, path := range []string{"/etc/atoll-x", "/tmp/atoll-x"} {
				if _, err := os.Lstat(path); err == nil {
					t.Errorf("%s was made", path)
				}
			}
			if c.says != "" {
				if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "layer-") || !errdefs.IsDataLoss(err) && !errdefs.IsOutOfRange(err) {
					t.Errorf("error %.500v; want one that names the layer and says %q", err, c.says)
				}
				return
			}
			got, perr := paths(t, c.layers...)
			if err != nil || perr != nil || got != c.want {
				t.Errorf("got %q, %v; want %q", got, err, c.want)
			}
		})
	}
}

// FuzzApply merges any two layers, under small limits, and reads what came of
// it with go-erofs: the list of it must be what Manifest says. All of it is in
// memory, or the file system would set the pace.
func FuzzApply(f *testing.F) {
	f.Add(tarOf(f, "a", "d/", "d/b", "l->d", "h=a"), tarOf(f, ".wh.a", "d/.wh..wh..opq", "l/x", "../x"))
	f.Add(paxed("size=12"), paxed("SCHILY.xattr.user.a=b"))
	f.Add(sparseTar(f, 1<<20), gzipped(f, tarOf(f, "a")))
	f.Add(zstded(f, tarOf(f, "a")), damaged(gzipped(f, tarOf(f, "abc"))))
	f.Add(tarOf(f, "a", "d/"), tarOf(f, "a/", "a/x", "d", ".wh.", "d/.wh..."))
	f.Add(headers(f, tar.Header{Name: "b", Typeflag: tar.TypeBlock, Devmajor: 8, Mode: 0o6777}), tarOf(f, "l->../..", "l/.wh.x", "l/y"))
	limits := Limits{Bytes: 1 << 20, Entries: 500, Metadata: 256 << 10}
	f.Fuzz(func(t *testing.T, lower, upper []byte) {
		layers := bytesLayers([][]byte{lower, upper})
		image, err := buildInMemory(t.Context(), layers, limits)
		if err != nil {
			if !errdefs.IsDataLoss(err) && !errdefs.IsOutOfRange(err) {
				t.Errorf("no class: %v", err)
			}
			return
		}
		want, err := Manifest(t.Context(), layers, limits)
		if err != nil {
			t.Fatalf("an image without a list: %v", err)
		}
		for _, e := range want {
			if strings.Contains("/"+e.Path+"/", "/../") {
				t.Errorf("the image has %q", e.Path)
			}
		}
		if diffs := treesum.Diff(want, readTree(t, bytes.NewReader(image)), 10); len(diffs) > 0 {
			t.Errorf("go-erofs reads something else:\n%s", strings.Join(diffs, "\n"))
		}
	})
}

// buildInMemory converts and merges layers.
func buildInMemory(ctx context.Context, layers []Layer, limits Limits) ([]byte, error) {
	var data memory
	var indexed []Indexed
	budget := limits.NewBudget()
	end := int64(0)
	for _, l := range layers {
		r, err := l.Open(ctx)
		if err != nil {
			return nil, err
		}
		var index bytes.Buffer
		c, err := Convert(ctx, r, &shifted{&data, end}, &index, limits, budget)
		if err != nil {
			return nil, err
		}
		end += c.Data
		indexed = append(indexed, Indexed{Name: l.Name, DiffID: c.DiffID, Data: c.Data, Open: func() (io.ReadCloser, error) {
			return io.NopCloser(&index), nil
		}})
	}
	var meta bytes.Buffer
	if _, err := Merge(ctx, &meta, indexed, limits); err != nil {
		return nil, err
	}
	data.grow(end)
	return append(meta.Bytes(), data.b...), nil
}

type memory struct{ b []byte }

func (m *memory) grow(size int64) {
	if more := size - int64(len(m.b)); more > 0 {
		m.b = append(m.b, make([]byte, more)...)
	}
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.grow(off + int64(len(p)))
	return copy(m.b[off:], p), nil
}
