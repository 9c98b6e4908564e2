package image

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/openatoll/atoll/internal/heappeak"
	"github.com/openatoll/atoll/storage/erofs"
)

// A forger is a registry that serves whatever documents a test makes up.
type forger struct {
	t      testing.TB
	host   string
	mu     sync.RWMutex // of docs and tags
	docs   map[digest.Digest]doc
	tags   map[string]digest.Digest
	asked  atomic.Int32 // requests for what no digest here names
	bodies map[digest.Digest]http.HandlerFunc
}

type doc struct {
	mediaType string
	body      []byte
}

func newForger(t testing.TB) *forger {
	f := &forger{t: t, docs: map[digest.Digest]doc{}, tags: map[string]digest.Digest{}, bodies: map[digest.Digest]http.HandlerFunc{}}
	srv := httptest.NewServer(f)
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	f.host = strings.TrimPrefix(srv.URL, "http://")
	return f
}

func (f *forger) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/v2/" {
		return
	}
	last := req.URL.Path[strings.LastIndexByte(req.URL.Path, '/')+1:]
	d := digest.Digest(last)
	f.mu.RLock()
	if tag, ok := f.tags[last]; ok {
		d = tag
	}
	got, ok := f.docs[d]
	f.mu.RUnlock()
	if !ok {
		f.asked.Add(1)
		w.WriteHeader(http.StatusNotFound)
		return
	}
	if own := f.bodies[d]; own != nil && req.Method == http.MethodGet {
		own(w, req)
		return
	}
	w.Header().Set("Content-Type", got.mediaType)
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Content-Length", fmt.Sprint(len(got.body)))
	if req.Method == http.MethodGet {
		_, _ = w.Write(got.body)
	}
}

// put keeps a document and describes it.
func (f *forger) put(mediaType string, body []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(body), Size: int64(len(body))}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.docs[d.Digest] = doc{mediaType, body}
	return d
}

func (f *forger) putJSON(mediaType string, v any) ocispec.Descriptor {
	body, err := json.Marshal(v)
	if err != nil {
		f.t.Fatal(err)
	}
	return f.put(mediaType, body)
}

// layer keeps a layer under a compression.
func (f *forger) layer(plain []byte, compress func([]byte) []byte) (ocispec.Descriptor, digest.Digest) {
	body := plain
	if compress != nil {
		body = compress(plain)
	}
	return f.put(ocispec.MediaTypeImageLayerGzip, body), digest.FromBytes(plain)
}

// image publishes an image of layers as tag; change may spoil its documents.
func (f *forger) image(tag string, layers []ocispec.Descriptor, ids []digest.Digest, change func(*ocispec.Manifest, *ocispec.Image)) string {
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: ids}}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: layers}
	m.SchemaVersion = 2
	if change != nil {
		change(&m, &config)
	}
	if m.Config.Digest == "" {
		m.Config = f.putJSON(ocispec.MediaTypeImageConfig, config)
	}
	f.tags[tag] = f.putJSON(ocispec.MediaTypeImageManifest, m).Digest
	return f.host + "/hostile:" + tag
}

func tarred(t *testing.T, name string, body []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(body))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(body); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// zeros compresses a layer whose one file has that many MiB of zeros, without
// ever having it in memory.
func zeros(t *testing.T, mib int, to func(io.Writer) io.WriteCloser) []byte {
	t.Helper()
	var b bytes.Buffer
	zw := to(&b)
	tw := tar.NewWriter(zw)
	if err := tw.WriteHeader(&tar.Header{Name: "zeros", Mode: 0o644, Size: int64(mib) << 20}); err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<20)
	for range mib {
		if _, err := tw.Write(block); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []io.Closer{tw, zw} {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func toGzip(w io.Writer) io.WriteCloser {
	zw, _ := gzip.NewWriterLevel(w, gzip.BestSpeed)
	return zw
}

func toZstd(w io.Writer) io.WriteCloser {
	zw, _ := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	return zw
}

// TestForgedImages pulls images that no tool would make. Each is refused with
// a sentence that names it, within bounds of memory, and leaves nothing.
func TestForgedImages(t *testing.T) {
	plain := tarred(t, "a", []byte("content"))
	const pull = "push the image again"
	gz := func(b []byte) []byte {
		var out bytes.Buffer
		zw := toGzip(&out)
		_, _ = zw.Write(b)
		_ = zw.Close()
		return out.Bytes()
	}
	for what, c := range map[string]struct {
		make  func(f *forger) string
		class func(error) bool
		says  string
	}{
		"10,000 layers": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			var ls []ocispec.Descriptor
			var ids []digest.Digest
			for range 10_000 {
				ls, ids = append(ls, l), append(ids, id)
			}
			return f.image("x", ls, ids, nil)
		}, errdefs.IsFailedPrecondition, "it has 10000 layers"},
		"a config with 10 MB of environment": {func(f *forger) string {
			return f.image("x", nil, nil, func(_ *ocispec.Manifest, i *ocispec.Image) {
				i.Config.Env = []string{"A=" + strings.Repeat("x", 10<<20)}
			})
		}, errdefs.IsFailedPrecondition, "may have"},
		"a manifest of 10 MB": {func(f *forger) string {
			return f.image("x", nil, nil, func(m *ocispec.Manifest, _ *ocispec.Image) {
				m.Annotations = map[string]string{"a": strings.Repeat("x", 10<<20)}
			})
		}, errdefs.IsFailedPrecondition, "may have"},
		"a gzip bomb": {func(f *forger) string {
			l := f.put(ocispec.MediaTypeImageLayerGzip, zeros(t, 512, toGzip))
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{digest.FromString("x")}, nil)
		}, errdefs.IsFailedPrecondition, "unpacks to more than 64 MiB"},
		"a zstd bomb": {func(f *forger) string {
			l := f.put(ocispec.MediaTypeImageLayerZstd, zeros(t, 512, toZstd))
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{digest.FromString("x")}, nil)
		}, errdefs.IsFailedPrecondition, "unpacks to more than 64 MiB"},
		"indexes within indexes": {func(f *forger) string {
			f.image("x", nil, nil, nil)
			inner := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: f.tags["x"], Size: int64(len(f.docs[f.tags["x"]].body))}
			for range 10 {
				index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{inner}}
				index.SchemaVersion = 2
				inner = f.putJSON(ocispec.MediaTypeImageIndex, index)
			}
			f.tags["x"] = inner.Digest
			return f.host + "/hostile:x"
		}, errdefs.IsDataLoss, "indexes within indexes"},
		"an index that names itself": {func(f *forger) string {
			index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
			index.SchemaVersion = 2
			first := f.putJSON(ocispec.MediaTypeImageIndex, index)
			index.Manifests = []ocispec.Descriptor{first}
			body, _ := json.Marshal(index)
			f.docs[first.Digest] = doc{ocispec.MediaTypeImageIndex, body} // not what it is called by
			f.tags["x"] = first.Digest
			return f.host + "/hostile:x"
		}, errdefs.IsDataLoss, pull},
		"an unknown kind of layer": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			l.MediaType = "application/vnd.evil.layer"
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsFailedPrecondition, "only tar layers"},
		"an artifact": {func(f *forger) string {
			return f.image("x", nil, nil, func(m *ocispec.Manifest, _ *ocispec.Image) {
				m.Config = f.put("application/vnd.evil.config", []byte("{}"))
			})
		}, errdefs.IsDataLoss, "artifact"},
		"a layer that says it is larger": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			l.Size += 100
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsDataLoss, "digest or size"},
		"a layer that says it is smaller": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			l.Size -= 10
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsDataLoss, "digest or size"},
		"a layer of 1 EiB": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			l.Size = 1 << 60
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsResourceExhausted, "free space"},
		"two layers whose sizes overflow": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			m, id2 := f.layer(tarred(t, "b", nil), gz)
			l.Size, m.Size = 1<<62, 1<<62
			return f.image("x", []ocispec.Descriptor{l, m}, []digest.Digest{id, id2}, nil)
		}, errdefs.IsResourceExhausted, "free space"},
		"a layer without an end": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			f.bodies[l.Digest] = endless
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsDataLoss, "digest or size"},
		"a layer of a negative size": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			l.Size = -1
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsDataLoss, pull},
		"a digest that is a path": {func(f *forger) string {
			l, id := f.layer(plain, gz)
			l.Digest = "sha256:../../../../etc/passwd"
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsDataLoss, pull},
		"another layer than its diff ID": {func(f *forger) string {
			l, _ := f.layer(plain, gz)
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{digest.FromString("other")}, nil)
		}, errdefs.IsDataLoss, "layer 1 of 1"},
		"a file that climbs out": {func(f *forger) string {
			l, id := f.layer(tarred(t, "../../../../tmp/atoll-hostile", []byte("x")), gz)
			return f.image("x", []ocispec.Descriptor{l}, []digest.Digest{id}, nil)
		}, errdefs.IsDataLoss, "leaves the image's root"},
	} {
		t.Run(what, func(t *testing.T) {
			f := newForger(t)
			ref := c.make(f)
			outside := t.TempDir()
			s := newStore(t, Config{Root: filepath.Join(outside, "images"), Limits: erofs.Limits{Bytes: 64 << 20}, Timeouts: Timeouts{Connect: 5 * time.Second, Header: 20 * time.Second, Stall: 20 * time.Second}})
			var err error
			peak := heappeak.Of(func() { _, err = s.Pull(t.Context(), ref, nil, nil) })
			if err == nil || !c.class(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), ref) || len(err.Error()) > 2000 {
				t.Errorf("Pull = %.2000v; want another class or that it names %s and says %q", err, ref, c.says)
			}
			if peak > 96<<20 {
				t.Errorf("the heap grew by %d MiB", peak>>20)
			}
			t.Logf("heap at most %d MiB above its start; %.300v", peak>>20, err)
			nothingLeft(t, s)
			if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
				t.Errorf("outside the store: %v, %v", entries, err)
			}
			if _, err := os.Lstat("/tmp/atoll-hostile"); err == nil {
				t.Error("a file was made outside")
			}
		})
	}
}

// What a foreign layer's URLs name is not for this node to ask.
func TestForeignLayersAreNotFollowed(t *testing.T) {
	var reached atomic.Int32
	thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	defer thief.Close()
	f := newForger(t)
	body := tarred(t, "a", []byte("x"))
	l := ocispec.Descriptor{
		MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: digest.FromBytes(body), Size: int64(len(body)),
		URLs: []string{thief.URL + "/layer", "file:///etc/shadow"},
	}
	ref := f.image("x", []ocispec.Descriptor{l}, []digest.Digest{digest.FromBytes(body)}, nil)
	s := newStore(t, Config{})
	if _, err := s.Pull(t.Context(), ref, nil, nil); err == nil {
		t.Error("an image whose layer no registry has was pulled")
	}
	if reached.Load() > 0 {
		t.Error("the URL was asked")
	}
	nothingLeft(t, s)
}

// FuzzDocuments has a registry serve any bytes as manifest, index and config.
// One store and one registry serve all inputs, in memory as far as that goes:
// otherwise setting them up sets the pace.
func FuzzDocuments(f *testing.F) {
	manifest := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"$config","size":$size},"layers":[]}`
	config := `{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`
	f.Add(uint8(0), []byte(manifest), []byte(config))
	f.Add(uint8(0), []byte(manifest), []byte(`{"os":1}`))
	f.Add(uint8(0), []byte(`{"layers":[{"digest":"sha256:","size":-9223372036854775808}]}`), []byte(config))
	f.Add(uint8(1), []byte(`{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"$config","size":$size,"platform":{"os":"linux","architecture":"amd64"}}]}`), []byte(manifest))
	f.Add(uint8(2), []byte(`[]`), []byte(`null`))
	f.Add(uint8(0), []byte(strings.Replace(manifest, "[]", `[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"$config","size":$size}]`, 1)), []byte(config))
	types := []string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json", "text/html", ""}
	fg := newForger(f)
	root, err := os.MkdirTemp("/dev/shm", "atoll-fuzz-")
	if err != nil {
		root = f.TempDir()
	}
	f.Cleanup(func() { os.RemoveAll(root) })
	s, err := Open(f.Context(), Config{Root: root, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	s.bolt.NoSync = true
	f.Cleanup(func() { s.Close() })
	f.Fuzz(func(t *testing.T, typ uint8, top, inner []byte) {
		fg.mu.Lock()
		clear(fg.docs)
		fg.mu.Unlock()
		in := fg.put(ocispec.MediaTypeImageConfig, inner)
		body := strings.NewReplacer("$config", in.Digest.String(), "$size", fmt.Sprint(in.Size)).Replace(string(top))
		x := fg.put(types[int(typ)%len(types)], []byte(body)).Digest
		fg.mu.Lock()
		fg.tags["x"] = x
		fg.mu.Unlock()
		img, err := s.Pull(t.Context(), fg.host+"/fuzz:x", nil, nil)
		if err != nil {
			if !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) && !errdefs.IsUnavailable(err) && !errdefs.IsResourceExhausted(err) {
				t.Errorf("no class: %v", err)
			}
			nothingLeft(t, s)
			return
		}
		if _, err := s.Disk(t.Context(), img.ID, "pod"); err != nil {
			t.Errorf("an image that was pulled has no disk: %v", err)
		}
		if err := errors.Join(s.Remove(t.Context(), img.ID), s.Release(t.Context(), "pod")); err != nil {
			t.Error(err)
		}
		nothingLeft(t, s)
	})
}
