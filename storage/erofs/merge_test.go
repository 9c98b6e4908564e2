package erofs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// tarOf makes a layer of lines like "dir/", "file", "link=target",
// "symlink->target".
func tarOf(t testing.TB, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, name := range names {
		hdr := &tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeReg}
		if name, target, ok := strings.Cut(name, "->"); ok {
			hdr.Name, hdr.Linkname, hdr.Typeflag = name, target, tar.TypeSymlink
		} else if name, target, ok := strings.Cut(name, "="); ok {
			hdr.Name, hdr.Linkname, hdr.Typeflag = name, target, tar.TypeLink
		} else if strings.HasSuffix(name, "/") {
			hdr.Typeflag = tar.TypeDir
		} else if !strings.Contains(name, ".wh.") {
			hdr.Size = int64(len(name))
		}
		if err := tw.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if hdr.Size > 0 {
			if _, err := io.WriteString(tw, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func paths(t testing.TB, layers ...[]byte) (string, error) {
	t.Helper()
	entries, err := Manifest(t.Context(), bytesLayers(layers), Limits{})
	var list []string
	for _, e := range entries[min(1, len(entries)):] {
		p := strings.TrimPrefix(e.Path, "/")
		if e.Type == "dir" {
			p += "/"
		}
		list = append(list, p)
	}
	return strings.Join(list, " "), err
}

func TestMerge(t *testing.T) {
	for name, c := range map[string]struct {
		layers [][]string
		want   string
	}{
		"whiteout":                                {[][]string{{"a", "d/", "d/x"}, {".wh.d"}}, "a"},
		"whiteout before its own layer's":         {[][]string{{"a"}, {".wh.a", "a"}}, "a"},
		"whiteout after its own layer's":          {[][]string{{"d/", "d/old"}, {"d/", "d/new", ".wh.d"}}, "d/ d/new"},
		"whiteout of nothing":                     {[][]string{{"a"}, {"d/.wh.x"}}, "a d/"},
		"opaque":                                  {[][]string{{"d/", "d/old", "d/.old"}, {"d/", "d/.wh..wh..opq", "d/new"}}, "d/ d/new"},
		"opaque after":                            {[][]string{{"d/", "d/old"}, {"d/", "d/new", "d/.dot", "d/.wh..wh..opq"}}, "d/ d/.dot d/new"},
		"opaque keeps parents that are not named": {[][]string{{"d/s/old"}, {"d/s/new", "d/.wh..wh..opq"}}, "d/ d/s/ d/s/new"},
		"opaque hides the layers below only":      {[][]string{{"d/one"}, {"d/.wh..wh..opq", "d/two"}, {"d/three"}}, "d/ d/three d/two"},
		"opaque root":                             {[][]string{{"a", "b"}, {".wh..wh..opq", "c"}}, "c"},
		"file becomes directory":                  {[][]string{{"a"}, {"a/", "a/x"}}, "a/ a/x"},
		"directory becomes file":                  {[][]string{{"a/", "a/x"}, {"a"}}, "a"},
		"directory merges":                        {[][]string{{"a/", "a/x"}, {"a/", "a/y"}}, "a/ a/x a/y"},
		"symlink on the way":                      {[][]string{{"usr/lib/", "lib->usr/lib"}, {"lib/x"}}, "lib usr/ usr/lib/ usr/lib/x"},
		"symlink replaced by directory":           {[][]string{{"usr/lib/", "lib->usr/lib"}, {"lib/", "lib/x"}}, "lib/ lib/x usr/ usr/lib/"},
		"symlink out of the root":                 {[][]string{{"out->../../../etc"}, {"out/x"}}, "etc/ etc/x out"},
		"absolute names":                          {[][]string{{"/a", "./b", "//c", "d/../e"}}, "a b c e"},
		"hard link across layers":                 {[][]string{{"a"}, {"b=a"}, {".wh.a"}}, "b"},
		"AUFS's own files":                        {[][]string{{".wh..wh.plnk/", ".wh..wh.plnk/123.4", ".wh..wh.aufs", "a"}}, "a"},
		"no entries":                              {[][]string{{}}, ""},
		"no layers":                               {nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range c.layers {
				layers = append(layers, tarOf(t, l...))
			}
			got, err := paths(t, layers...)
			if err != nil || got != c.want {
				t.Errorf("got %q, %v; want %q", got, err, c.want)
			}
		})
	}
}

func TestMergeRefuses(t *testing.T) {
	bad := tarOf(t, "a", "b")
	bad[600] ^= 1  // in the first body: the DiffID's business
	bad[1024] ^= 1 // in the second header
	for name, c := range map[string]struct {
		layer []byte
		class func(error) bool
		says  string
	}{
		"a name that climbs out": {tarOf(t, "../x"), errdefs.IsDataLoss, "leaves the image's root"},
		"and in the middle":      {tarOf(t, "a/../../x"), errdefs.IsDataLoss, "leaves the image's root"},
		"a hard link that does":  {tarOf(t, "x=../../etc/passwd"), errdefs.IsDataLoss, "leaves the image's root"},
		"a hard link to nothing": {tarOf(t, "x=y"), errdefs.IsDataLoss, "not in the image"},
		"a hard link to a dir":   {tarOf(t, "d/", "x=d"), errdefs.IsDataLoss, "is a directory"},
		"a file on the way":      {tarOf(t, "a", "a/b"), errdefs.IsDataLoss, "is not a directory"},
		"a symlink loop":         {tarOf(t, "a->b", "b->a", "a/x"), errdefs.IsDataLoss, "too many symlinks"},
		"a symlink bomb":         {tarOf(t, "a->"+strings.Repeat("a/", 2000), "a/x"), errdefs.IsDataLoss, "symlinks"},
		"a long name":            {tarOf(t, strings.Repeat("n", 256)), errdefs.IsDataLoss, "256 bytes"},
		"a long path":            {tarOf(t, strings.Repeat("n/", 2100)), errdefs.IsDataLoss, "4200 bytes"},
		"whiteout of .":          {tarOf(t, "d/.wh.."), errdefs.IsDataLoss, "whiteout"},
		"whiteout of nothing":    {tarOf(t, "d/.wh."), errdefs.IsDataLoss, "whiteout"},
		"whiteout of ..":         {tarOf(t, "d/.wh..."), errdefs.IsDataLoss, "whiteout"},
		"a damaged header":       {bad, errdefs.IsDataLoss, "broken tar stream"},
		"no tar":                 {bytes.Repeat([]byte("nonsense"), 200), errdefs.IsDataLoss, "broken tar stream"},
		"a tar that ends early":  {tarOf(t, "abc")[:513], errdefs.IsDataLoss, "unexpected EOF"},
		"a gzip that ends early": {gzipped(t, tarOf(t, "abc"))[:40], errdefs.IsDataLoss, "unexpected EOF"},
		"a damaged gzip":         {damaged(gzipped(t, tarOf(t, "abc"))), errdefs.IsDataLoss, "gzip"},
		"a damaged zstd":         {damaged(zstded(t, tarOf(t, "abc"))), errdefs.IsDataLoss, "zstd"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Build(t.Context(), filepath.Join(t.TempDir(), "image"), []Layer{bytesLayer("the-layer", c.layer)}, Limits{})
			if err == nil || !c.class(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "the-layer") {
				t.Errorf("error %v; want one that names the layer and says %q", err, c.says)
			}
		})
	}
}

func gzipped(t testing.TB, data []byte) []byte {
	var b bytes.Buffer
	zw := gzip.NewWriter(&b)
	if _, err := zw.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func zstded(t testing.TB, data []byte) []byte {
	zw, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return zw.EncodeAll(data, nil)
}

func damaged(data []byte) []byte {
	data = slices.Clone(data)
	data[len(data)/2] ^= 0x55
	data[len(data)/2+1] ^= 0xaa
	return data
}

func TestCompressions(t *testing.T) {
	plain := tarOf(t, "a", "d/", "d/b")
	for name, data := range map[string][]byte{"none": plain, "gzip": gzipped(t, plain), "zstd": zstded(t, plain), "two gzips": append(gzipped(t, plain[:700]), gzipped(t, plain[700:])...)} {
		layer := bytesLayer(name, data)
		layer.DiffID = digest.FromBytes(plain)
		if entries, err := Manifest(t.Context(), []Layer{layer}, Limits{}); err != nil || len(entries) != 4 {
			t.Errorf("%s: %d entries, %v", name, len(entries), err)
		}
		layer.DiffID = digest.FromString("something else")
		if _, err := Manifest(t.Context(), []Layer{layer}, Limits{}); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), string(layer.DiffID)) {
			t.Errorf("%s with a wrong DiffID: %v", name, err)
		}
	}
}

// Bombs end in an error before they cost much.
func TestLimits(t *testing.T) {
	zeros := &bytes.Buffer{}
	tw := tar.NewWriter(zeros)
	if err := tw.WriteHeader(&tar.Header{Name: "zeros", Size: 64 << 20, Mode: 0o644}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(make([]byte, 64<<20)); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	many := make([]string, 2000)
	for i := range many {
		many[i] = fmt.Sprint("d/", i)
	}
	layers := make([]Layer, 10000)
	for i := range layers {
		layers[i] = bytesLayer(fmt.Sprint(i), tarOf(t, "a"))
	}
	trailing := append(tarOf(t, "a"), make([]byte, 8<<20)...)
	for name, c := range map[string]struct {
		layers []Layer
		limits Limits
		says   string
	}{
		"large file":     {[]Layer{bytesLayer("x", gzipped(t, zeros.Bytes()))}, Limits{Bytes: 32 << 20}, "unpacks to more than 32 MiB"},
		"sum of layers":  {[]Layer{bytesLayer("x", zeros.Bytes()), bytesLayer("y", zeros.Bytes())}, Limits{Bytes: 100 << 20}, "unpacks to more than 100 MiB"},
		"behind the end": {[]Layer{bytesLayer("x", gzipped(t, trailing))}, Limits{Bytes: 4 << 20}, "unpacks to more than 4 MiB"},
		"files":          {[]Layer{bytesLayer("x", tarOf(t, many...))}, Limits{Entries: 1000}, "more than 1000 files"},
		"names":          {[]Layer{bytesLayer("x", tarOf(t, many...))}, Limits{Metadata: 100 << 10}, "names and attributes"},
		"10,000 layers":  {layers, Limits{}, "10000 layers: an image may have 1000"},
		"sparse, 1 EiB":  {[]Layer{bytesLayer("x", sparseTar(t, 1<<60))}, Limits{}, "unpacks to more than 65536 MiB"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := Build(t.Context(), filepath.Join(dir, "image"), c.layers, c.limits)
			if !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v; want ErrOutOfRange that says %q", err, c.says)
			}
			if left, _ := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	if _, err := Build(t.Context(), filepath.Join(t.TempDir(), "image"), layers, Limits{Layers: 10000}); err != nil {
		t.Errorf("10,000 layers, allowed: %v", err)
	}
}

// sparseTar is one file of that many zeros, in PAX format 1.0 by hand: Go
// writes none.
func sparseTar(t testing.TB, size int64) []byte {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	sparseMap := make([]byte, 512)
	copy(sparseMap, "0\n")
	err := tw.WriteHeader(&tar.Header{Name: "GNUSparseFile.0/sparse", Mode: 0o644, Size: 512, Format: tar.FormatPAX, PAXRecords: map[string]string{
		"ATOLL.sparse.major": "1", "ATOLL.sparse.minor": "0", "ATOLL.sparse.name": "sparse", "ATOLL.sparse.realsize": fmt.Sprintf("%019d", size),
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(sparseMap); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	// Go's writer refuses GNU.sparse records; "ATOLL" is two bytes longer than
	// "GNU", which the records' lengths must follow.
	return renameRecords(b.Bytes())
}

func renameRecords(data []byte) []byte {
	size := int64(0)
	fmt.Sscanf(string(data[124:135]), "%o", &size)
	body := string(data[512 : 512+size])
	var out strings.Builder
	for line := range strings.Lines(body) {
		_, kv, _ := strings.Cut(line, " ")
		kv = strings.Replace(kv, "ATOLL.", "GNU.", 1)
		n := len(kv) + 3
		out.WriteString(fmt.Sprintf("%d %s", n, kv))
	}
	hdr := slices.Clone(data[:512])
	copy(hdr[124:136], fmt.Sprintf("%011o\x00", out.Len()))
	copy(hdr[148:156], "        ")
	sum := 0
	for _, c := range hdr {
		sum += int(c)
	}
	copy(hdr[148:156], fmt.Sprintf("%06o\x00 ", sum))
	block := make([]byte, 512)
	copy(block, out.String())
	return slices.Concat(hdr, block, data[1024:])
}

func TestBuildEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	if _, err := Build(ctx, filepath.Join(dir, "image"), []Layer{bytesLayer("x", tarOf(t, "a"))}, Limits{}); !errdefs.IsCanceled(err) {
		t.Errorf("Build = %v, want the context's error", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Zeros take no room on the host.
func TestImageIsSparse(t *testing.T) {
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, data := range [][]byte{bytes.Repeat([]byte("x"), 4<<20), make([]byte, 4<<20)} {
		if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("same%c", data[0]+'a'), Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	c, err := Convert(t.Context(), &b, data, io.Discard, Limits{}, Limits{}.NewBudget())
	if err != nil || c.Data != 8<<20 {
		t.Fatal(c, err)
	}
	if used := blocks(t, data.Name()) * 512; used > 5<<20 {
		t.Errorf("the blob takes %d bytes on the host for 4 MiB of contents", used)
	}
}

func blocks(t testing.TB, path string) int64 {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}
