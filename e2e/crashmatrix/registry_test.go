package crashmatrix

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// An imageFixture is an image that the registry serves, and the blobs and
// layers that a node has of it (hex digests).
type imageFixture struct {
	ref      string
	manifest string
	blobs    []string
	layers   []string // by what they unpack to
}

// A testRegistry serves images on loopback.
type testRegistry struct {
	host   string
	images []imageFixture
}

func serveRegistry(t *testing.T) *testRegistry {
	t.Helper()
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	return &testRegistry{host: strings.TrimPrefix(srv.URL, "http://")}
}

// push makes an image of two layers, busybox and a file, that shares none of
// them with another name's.
func (r *testRegistry) push(t *testing.T, repository string) imageFixture {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	program, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"bin/busybox": program, "etc/name": []byte(repository)}
	img, err := mutate.AppendLayers(empty.Image, tarLayer(t, files), tarLayer(t, map[string][]byte{"etc/second": []byte(repository)}))
	if err != nil {
		t.Fatal(err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Config = "linux", "amd64", v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/bin"}}
	if img, err = mutate.ConfigFile(img, file); err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(fmt.Sprintf("%s/%s:1", r.host, repository), name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	f := imageFixture{ref: ref.String()}
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	f.manifest = digest.Hex
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	f.blobs = []string{digest.Hex, m.Config.Digest.Hex}
	if file, err = img.ConfigFile(); err != nil {
		t.Fatal(err)
	}
	for _, id := range file.RootFS.DiffIDs {
		f.layers = append(f.layers, id.Hex)
	}
	r.images = append(r.images, f)
	return f
}

var applets = []string{"sh", "sleep", "echo", "true", "cat", "date", "dd", "wc"}

// tarLayer makes a layer of files, with the directories and links that
// busybox needs if it is among them.
func tarLayer(t *testing.T, files map[string][]byte) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, body []byte) {
		h.Size = int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"bin/", "etc/", "tmp/", "proc/", "sys/", "dev/"} {
		add(tar.Header{Name: d, Typeflag: tar.TypeDir, Mode: 0o755}, nil)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) { // each run the same image
		add(tar.Header{Name: name, Mode: 0o755}, files[name])
	}
	if files["bin/busybox"] != nil {
		for _, a := range applets {
			add(tar.Header{Name: "bin/" + a, Typeflag: tar.TypeSymlink, Linkname: "busybox"}, nil)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	return layer
}
