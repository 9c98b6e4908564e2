package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	digest "github.com/opencontainers/go-digest"
)

// Images that share layers: each layer is fetched, converted and kept once, and
// goes with the last image that has it.
func TestLayersAreShared(t *testing.T) {
	c := &counter{gets: map[string]int{}}
	host := serve(t, c.wrap)
	base, middle := layer(t, file{"base", incompressible(100_000)}), layer(t, file{"middle", incompressible(50_000)})
	images := map[string]v1.Image{
		"a": build(t, base, layer(t, file{"own", "a"})),
		"b": build(t, base, middle, layer(t, file{"own", "b"})),
		"c": build(t, middle, base),
	}
	s := newStore(t, Config{})
	ids := map[string]string{}
	for _, name := range []string{"a", "b", "c"} {
		push(t, host+"/"+name+":1", images[name])
		img, err := s.Pull(t.Context(), host+"/"+name+":1", nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = img.ID
		if got := readImage(t, s, img.ID, "base")["base"]; got != incompressible(100_000) {
			t.Errorf("image %s holds something else", name)
		}
	}
	for digest, n := range c.since() {
		if n != 1 {
			t.Errorf("%s was fetched %d times", digest, n)
		}
	}
	blobs := func() int { l, _ := filepath.Glob(s.layerDir() + "/*" + dataSuffix); return len(l) }
	if n := blobs(); n != 4 {
		t.Errorf("%d blobs, want 4", n)
	}
	for i, step := range []struct {
		do   func() error
		want int
	}{
		{func() error { _, err := s.Disk(t.Context(), ids["b"], "pod"); return err }, 4},
		{func() error { return s.Remove(t.Context(), ids["a"]) }, 3},
		{func() error { return s.Remove(t.Context(), ids["b"]) }, 3}, // a pod has it
		{func() error { return s.Remove(t.Context(), ids["c"]) }, 3},
		{func() error { return s.Release(t.Context(), "pod") }, 0},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if n := blobs(); n != step.want {
			t.Errorf("after step %d there are %d blobs, want %d", i, n, step.want)
		}
	}
	nothingLeft(t, s)
}

// gate lets requests for a blob begin and wait until it is opened.
func gate(d string) (wrap func(http.Handler) http.Handler, reached <-chan struct{}, open func()) {
	at, opened := make(chan struct{}, 100), make(chan struct{})
	wrap = func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodGet && path.Base(req.URL.Path) == d {
				at <- struct{}{}
				<-opened
			}
			next.ServeHTTP(w, req)
		})
	}
	return wrap, at, sync.OnceFunc(func() { close(opened) })
}

// Two pulls of different images that both want a layer: the second waits for
// the first, and takes over when the first is given up.
func TestPullsJoinAtALayer(t *testing.T) {
	shared := layer(t, file{"shared", incompressible(100_000)})
	d, _ := shared.Digest()
	for _, giveUp := range []bool{false, true} {
		t.Run(fmt.Sprint("given up ", giveUp), func(t *testing.T) {
			wrap, reached, open := gate(d.String())
			c := &counter{gets: map[string]int{}}
			host := serve(t, func(next http.Handler) http.Handler { return c.wrap(wrap(next)) })
			defer open()
			push(t, host+"/a:1", build(t, shared, layer(t, file{"own", "a"})))
			push(t, host+"/b:1", build(t, shared, layer(t, file{"own", "b"})))
			s := newStore(t, Config{Timeouts: Timeouts{Connect: time.Minute, Header: time.Minute, Stall: time.Minute}})
			c.since()
			first, cancel := context.WithCancel(t.Context())
			defer cancel()
			var wg sync.WaitGroup
			wg.Go(func() {
				_, err := s.Pull(first, host+"/a:1", nil, nil)
				if giveUp != errors.Is(err, context.Canceled) || !giveUp && err != nil {
					t.Errorf("the first pull = %v", err)
				}
			})
			<-reached
			wg.Go(func() {
				if _, err := s.Pull(t.Context(), host+"/b:1", nil, nil); err != nil {
					t.Errorf("the second pull = %v", err)
				}
			})
			for s.pinsOf(shared) < 2 {
				time.Sleep(5 * time.Millisecond)
			}
			if giveUp {
				cancel()
				<-reached // the second asks for itself
			}
			open()
			wg.Wait()
			want := 1
			if giveUp {
				want = 2
			}
			if got := c.since()[d.String()]; got != want {
				t.Errorf("the layer was asked for %d times, want %d", got, want)
			}
		})
	}
}

// pinsOf is how many pulls are under way that have the layer.
func (s *Store) pinsOf(l v1.Layer) int {
	id, _ := l.DiffID()
	s.collecting.Lock()
	defer s.collecting.Unlock()
	return s.pins[digest.Digest(id.String())]
}

// An image that goes while another that shares a layer is being pulled takes
// that layer not with it.
func TestRemoveDuringAPullThatShares(t *testing.T) {
	shared, own := layer(t, file{"shared", incompressible(100_000)}), layer(t, file{"own", incompressible(1000)})
	d, _ := own.Digest()
	wrap, reached, open := gate(d.String())
	c := &counter{gets: map[string]int{}}
	host := serve(t, func(next http.Handler) http.Handler { return c.wrap(wrap(next)) })
	defer open()
	push(t, host+"/a:1", build(t, shared))
	push(t, host+"/b:1", build(t, shared, own))
	s := newStore(t, Config{Timeouts: Timeouts{Connect: time.Minute, Header: time.Minute, Stall: time.Minute}})
	a, err := s.Pull(t.Context(), host+"/a:1", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c.since()
	pulled := make(chan error, 1)
	go func() { _, err := s.Pull(t.Context(), host+"/b:1", nil, nil); pulled <- err }()
	<-reached
	if err := s.Remove(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	open()
	if err := <-pulled; err != nil {
		t.Fatal(err)
	}
	sharedDigest, _ := shared.Digest()
	if n := c.since()[sharedDigest.String()]; n != 0 {
		t.Errorf("the shared layer was fetched %d times more", n)
	}
	b, err := s.Get(t.Context(), host+"/b:1")
	if err != nil {
		t.Fatal(err)
	}
	if got := readImage(t, s, b.ID, "shared")["shared"]; got != incompressible(100_000) {
		t.Error("the shared layer holds something else")
	}
}

// One disk, however many layers: as QEMU reads it, byte for byte what the parts
// are, and with the files of all layers.
func TestManyLayers(t *testing.T) {
	const n = 140
	var layers []v1.Layer
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("file-%d", i))
		layers = append(layers, layer(t, file{names[i], strings.Repeat(fmt.Sprint(i, " "), 500+10*i)}, file{"last", fmt.Sprint(i)}))
	}
	host := serve(t, nil)
	push(t, host+"/many:1", build(t, layers...))
	s := newStore(t, Config{MaxConcurrentDownloads: 8, Timeouts: Timeouts{Connect: time.Minute, Header: time.Minute, Stall: time.Minute}})
	img, err := s.Pull(t.Context(), host+"/many:1", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := s.Disk(t.Context(), img.ID, "pod")
	if err != nil {
		t.Fatal(err)
	}
	files := readImage(t, s, img.ID, append(names, "last")...)
	for i, name := range names {
		if files[name] != strings.Repeat(fmt.Sprint(i, " "), 500+10*i) {
			t.Errorf("%s holds something else", name)
		}
	}
	if files["last"] != fmt.Sprint(n-1) {
		t.Errorf("last is of layer %s", files["last"])
	}
	qemuImg, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("needs qemu-img")
	}
	raw := filepath.Join(t.TempDir(), "raw")
	if out, err := exec.Command(qemuImg, "convert", "-f", "vmdk", "-O", "raw", disk.Path, raw).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	rec, err := s.diskRecord(img.ID)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	var want []byte
	for _, e := range s.extents(img.ID, rec) {
		part, err := os.ReadFile(e.path)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, part...)
	}
	if int64(len(want)) != disk.Bytes || !bytes.Equal(got, want) {
		t.Errorf("QEMU reads %d bytes, which are not the %d of the parts", len(got), len(want))
	}
}

// All kinds of layers that there are, and those that cannot be had.
func TestKindsOfLayers(t *testing.T) {
	plain := tarred(t, "a", []byte("content"))
	id := digest.FromBytes(plain)
	var gz, zst bytes.Buffer
	for _, c := range []struct {
		b  *bytes.Buffer
		to func(io.Writer) io.WriteCloser
	}{{&gz, toGzip}, {&zst, toZstd}} {
		w := c.to(c.b)
		_, _ = w.Write(plain)
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// eStargz is gzip of several members, with a table of contents in the last.
	estargz := slices.Concat(gzipOf(t, plain[:600]), gzipOf(t, plain[600:]))
	for _, c := range []struct {
		kind    types.MediaType
		body    []byte
		refused bool
	}{
		{types.OCILayer, gz.Bytes(), false},
		{types.OCILayerZStd, zst.Bytes(), false},
		{types.OCIUncompressedLayer, plain, false},
		{types.DockerLayer, gz.Bytes(), false},
		{types.DockerUncompressedLayer, plain, false},
		{"application/vnd.docker.image.rootfs.diff.tar.zstd", zst.Bytes(), false},
		{types.OCILayer, estargz, false},
		{types.OCILayer, plain, false}, // it says what it is by its first bytes
		{types.DockerForeignLayer, gz.Bytes(), true},
		{types.OCIRestrictedLayer, gz.Bytes(), true},
		{types.OCIUncompressedRestrictedLayer, plain, true},
		{"application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", zst.Bytes(), true},
		{"application/vnd.oci.image.layer.v1.tar+encrypted", plain, true},
	} {
		t.Run(string(c.kind), func(t *testing.T) {
			host := serve(t, nil)
			l := &kindLayer{Layer: static.NewLayer(c.body, c.kind), id: v1.Hash{Algorithm: "sha256", Hex: id.Encoded()}}
			img, err := mutate.Append(build(t), mutate.Addendum{Layer: l, MediaType: c.kind})
			if err != nil {
				t.Fatal(err)
			}
			push(t, host+"/kind:1", img)
			s := newStore(t, Config{})
			got, err := s.Pull(t.Context(), host+"/kind:1", nil, nil)
			if c.refused {
				if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), string(c.kind)) {
					t.Errorf("Pull = %v, want ErrFailedPrecondition that says why", err)
				}
				nothingLeft(t, s)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if text := readImage(t, s, got.ID, "a")["a"]; text != "content" {
				t.Errorf("the file holds %q", text)
			}
		})
	}
}

type kindLayer struct {
	v1.Layer
	id v1.Hash
}

func (l *kindLayer) DiffID() (v1.Hash, error) { return l.id, nil }

func gzipOf(t *testing.T, data []byte) []byte {
	var b bytes.Buffer
	w := toGzip(&b)
	_, _ = w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
