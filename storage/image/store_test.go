package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	goerofs "github.com/erofs/go-erofs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"io/fs"

	"github.com/openatoll/atoll/storage/storagetest"
)

// newStore opens a store with short timeouts.
func newStore(t *testing.T, cfg Config) *Store {
	t.Helper()
	if cfg.Root == "" {
		cfg.Root = t.TempDir()
	}
	if cfg.Timeouts == (Timeouts{}) {
		cfg.Timeouts = Timeouts{Connect: time.Second, Header: time.Second, Stall: time.Second}
	}
	cfg.Logger = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	<-s.scrubbed // it would find what a test damages
	return s
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) { w.t.Logf("%s", p); return len(p), nil }

// serve runs a registry on loopback and returns its host:port. wrap may put
// something between.
func serve(t *testing.T, wrap func(http.Handler) http.Handler) string {
	t.Helper()
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	if wrap != nil {
		h = wrap(h)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return strings.TrimPrefix(srv.URL, "http://")
}

type file struct{ name, body string }

func layer(t *testing.T, files ...file) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, f := range files {
		hdr := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.body)), ModTime: time.Unix(1e9, 0)}
		if strings.HasSuffix(f.name, "/") {
			hdr.Typeflag = tar.TypeDir
		}
		if err := tw.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// build makes an image for linux/amd64.
func build(t *testing.T, layers ...v1.Layer) v1.Image {
	t.Helper()
	return buildFor(t, v1.Platform{OS: "linux", Architecture: "amd64"}, layers...)
}

func buildFor(t *testing.T, p v1.Platform, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Variant = p.OS, p.Architecture, p.Variant
	cf.Config.Cmd = []string{"/hello"}
	img, err = mutate.ConfigFile(img, cf)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t *testing.T, ref string, img v1.Image) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img); err != nil {
		t.Fatal(err)
	}
}

// readDisk reads a file as a VM would that is given the disk at path: by what
// the descriptor says.
func readDisk(t *testing.T, path, name string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	d := &openDisk{}
	defer d.Close()
	for line := range strings.Lines(string(text)) {
		var sectors int64
		var file string
		if n, _ := fmt.Sscanf(line, "RW %d FLAT %q 0", &sectors, &file); n != 2 {
			continue
		}
		f, err := os.Open(filepath.Join(filepath.Dir(path), file))
		if err != nil {
			t.Fatal(err)
		}
		if fi, err := f.Stat(); err != nil || fi.Size() != sectors*512 {
			t.Errorf("extent %q of %d bytes, %v", line, fi.Size(), err)
		}
		d.files, d.ends = append(d.files, f), append(d.ends, d.size()+sectors*512)
	}
	fsys, err := goerofs.Open(d)
	if err != nil {
		t.Fatal(err)
	}
	data, err := fs.ReadFile(fsys, name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestImages(t *testing.T) {
	host := serve(t, nil)
	ref := host + "/team/hello:v1"
	push(t, ref, build(t, layer(t, file{"hello", "one"}), layer(t, file{"etc/", ""}, file{"etc/x", "two"})))
	storagetest.Images(t, newStore(t, Config{}), storagetest.ImagesFixture{
		Ref:     ref,
		Missing: host + "/team/none:v1",
		Check: func(t *testing.T, path string) {
			if got := readDisk(t, path, "hello") + readDisk(t, path, "etc/x"); got != "onetwo" {
				t.Errorf("the disk holds %q", got)
			}
		},
	})
}

func TestStoreOutlivesRestart(t *testing.T) {
	host := serve(t, nil)
	ref := host + "/hello:v1"
	push(t, ref, build(t, layer(t, file{"hello", "one"})))
	root := t.TempDir()
	s := newStore(t, Config{Root: root})
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := s.Disk(t.Context(), img.ID, "pod")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// What a dead process may have left.
	for _, name := range []string{"disks/.converting-1", "disks/0123.erofs", "disks/0123.vmdk", "layers/.converting-2", "layers/0123.data", "layers/0123.index"} {
		if err := os.WriteFile(filepath.Join(s.root, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = newStore(t, Config{Root: root})
	again, err := s.Get(t.Context(), ref)
	if err != nil || again.ID != img.ID || !slices.Equal(again.Tags, img.Tags) {
		t.Fatalf("Get = %+v, %v; want %+v", again, err, img)
	}
	if err := s.Remove(t.Context(), img.ID); err != nil {
		t.Fatal(err)
	}
	if got := readDisk(t, disk.Path, "hello"); got != "one" {
		t.Errorf("a disk in use holds %q after Remove and restart", got)
	}
	if err := s.Release(t.Context(), "pod"); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s)
}
