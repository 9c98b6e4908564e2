package image

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	digest "github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/openatoll/atoll/storage"
)

// editRecord changes what the database says of an image's disk.
func editRecord(t *testing.T, s *Store, id string, edit func(*diskRecord)) {
	t.Helper()
	var rec diskRecord
	err := s.bolt.View(func(tx *bolt.Tx) error { return json.Unmarshal(tx.Bucket(bucketDisks).Get([]byte(id)), &rec) })
	if err != nil {
		t.Fatal(err)
	}
	edit(&rec)
	if err := s.recordDisk(id, rec); err != nil {
		t.Fatal(err)
	}
}

// flip turns one bit of a file round, as a dying disk might; its times stay.
func flip(t *testing.T, path string, off int64) {
	t.Helper()
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, before.ModTime(), before.ModTime()); err != nil {
		t.Fatal(err)
	}
}

// A counter counts the requests for content by digest.
type counter struct {
	mu   sync.Mutex
	gets map[string]int
}

func (c *counter) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/blobs/") {
			c.mu.Lock()
			c.gets[path.Base(req.URL.Path)]++
			c.mu.Unlock()
		}
		next.ServeHTTP(w, req)
	})
}

// since returns what was asked for since the last call.
func (c *counter) since() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() { c.gets = map[string]int{} }()
	return c.gets
}

// twoLayers is an image whose files are "low" and "high".
func twoLayers(t *testing.T, tag string) (img v1.Image, low, high digest.Digest) {
	t.Helper()
	img = build(t, layer(t, file{"low", tag + strings.Repeat("low ", 3000)}), layer(t, file{"high", tag + strings.Repeat("high ", 600_000)}))
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]digest.Digest, 2)
	for i, l := range layers {
		id, err := l.DiffID()
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = digest.Digest(id.String())
	}
	return img, ids[0], ids[1]
}

// A bit that flips anywhere in what a disk consists of is found before the next
// pod gets the disk. What is made here is made again, a layer is fetched again,
// that one alone; who has the old files keeps them.
func TestFlippedBits(t *testing.T) {
	c := &counter{gets: map[string]int{}}
	host := serve(t, c.wrap)
	ref := host + "/hello:v1"
	image, low, high := twoLayers(t, "")
	push(t, ref, image)
	var log bytes.Buffer
	s := newStore(t, Config{})
	s.log = slog.New(slog.NewTextHandler(io.MultiWriter(&log, testWriter{t}), nil))
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	highBlob := manifestOf(t, image).Layers[1].Digest.String()
	if _, err := s.Disk(t.Context(), img.ID, "pod-that-runs/0"); err != nil {
		t.Fatal(err)
	}
	lowData, highData, highIndex := s.layerPath(low, dataSuffix), s.layerPath(high, dataSuffix), s.layerPath(high, indexSuffix)
	reboot := func() {
		for _, id := range []digest.Digest{low, high} {
			if err := s.changeLayer(id, func(r *layerRecord) { r.Good.Boot = "another" }); err != nil {
				t.Fatal(err)
			}
		}
		editRecord(t, s, img.ID, func(r *diskRecord) { r.Good.Boot = "another" })
	}
	meta, disk := s.metaPath(img.ID), s.diskPath(img.ID)
	for _, c2 := range []struct {
		what   string
		damage func()
		damned string // the file; a guest that has it open keeps it
		fetch  string // the one blob that is fetched
	}{
		{"nothing", func() {}, "", ""},
		{"blob, first byte", func() { flip(t, highData, 0) }, highData, highBlob},
		{"blob, second chunk", func() { flip(t, highData, 2_000_000) }, highData, highBlob},
		{"blob cut", func() { os.Truncate(highData, 4096) }, highData, highBlob},
		{"blob gone", func() { os.Remove(highData) }, "", highBlob},
		{"index", func() { flip(t, highIndex, 30); reboot() }, highIndex, highBlob},
		{"index gone", func() { os.Remove(highIndex); reboot() }, "", highBlob},
		{"index, once it is read again", func() { flip(t, highIndex, 30); os.Remove(meta) }, highIndex, highBlob},
		{"metadata, superblock", func() { flip(t, meta, 1040) }, meta, ""},
		{"metadata, inode", func() { flip(t, meta, 4200) }, meta, ""},
		{"metadata cut", func() { os.Truncate(meta, 4096) }, meta, ""},
		{"metadata gone", func() { os.Remove(meta) }, "", ""},
		{"descriptor", func() { flip(t, disk, 150) }, disk, ""},
		{"descriptor gone", func() { os.Remove(disk) }, "", ""},
		{"host booted, nothing wrong", reboot, "", ""},
		{"other version", func() { editRecord(t, s, img.ID, func(r *diskRecord) { r.Version-- }) }, "", ""},
	} {
		t.Run(c2.what, func(t *testing.T) {
			c.since()
			log.Reset()
			c2.damage()
			var running *os.File
			if c2.damned != "" {
				if running, err = os.Open(c2.damned); err != nil {
					t.Fatal(err)
				}
				defer running.Close()
			}
			before := s.Converted()
			if _, err := s.Disk(t.Context(), img.ID, "pod-that-is-new/0"); err != nil {
				t.Fatalf("Disk = %v", err)
			}
			got := c.since()
			if want := map[string]int{c2.fetch: 1}; c2.fetch == "" && len(got) > 0 || c2.fetch != "" && (len(got) != 1 || got[c2.fetch] != want[c2.fetch]) {
				t.Errorf("fetched %v, want %q once", got, c2.fetch)
			}
			if tree := readImage(t, s, img.ID, "low", "high"); tree["low"] != strings.Repeat("low ", 3000) || tree["high"] != strings.Repeat("high ", 600_000) {
				t.Error("the disk does not hold what the image has")
			}
			if c2.damned != "" {
				now, err := os.Stat(c2.damned)
				old, err2 := running.Stat()
				if err != nil || err2 != nil || os.SameFile(now, old) {
					t.Errorf("the file was mended in place, under a guest that reads it: %v, %v", err, err2)
				}
			}
			if c2.fetch != "" {
				for _, want := range []string{"level=ERROR", "layer=" + string(high), img.ID, "pod-that-runs/0"} {
					if !strings.Contains(log.String(), want) {
						t.Errorf("the log does not say %q: %s", want, log.String())
					}
				}
			}
			if strings.Contains(c2.what, "nothing") && s.Converted() != before {
				t.Errorf("%d bytes were converted", s.Converted()-before)
			}
			if got, err := s.Disk(t.Context(), img.ID, "third/0"); err != nil || s.checkBoot(t, img.ID, low, high) != nil {
				t.Errorf("the next Disk = %v, %v, %v", got, err, s.checkBoot(t, img.ID, low, high))
			}
		})
	}
	if fi, err := os.Stat(lowData); err != nil || fi.Mode().Perm() != 0o444 {
		t.Errorf("a blob: %v, %v; want it read-only for all", fi, err)
	}
}

// checkBoot wants everything remembered as right since this boot.
func (s *Store) checkBoot(t *testing.T, image string, layers ...digest.Digest) error {
	for _, id := range layers {
		rec, err := s.layerRecord(id)
		if err != nil || rec.Good.Boot != s.bootID {
			return notRight("layer", err)
		}
	}
	rec, err := s.diskRecord(image)
	if err != nil || rec.Good.Boot != s.bootID {
		return notRight("image", err)
	}
	return nil
}

func notRight(what string, err error) error {
	return &fs.PathError{Op: "not known as right", Path: what, Err: err}
}

func manifestOf(t *testing.T, img v1.Image) *v1.Manifest {
	t.Helper()
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// readImage reads files of an image through its disk.
func readImage(t *testing.T, s *Store, id string, names ...string) map[string]string {
	t.Helper()
	tree, closer, err := s.OpenTree(id)
	if err != nil {
		t.Fatal(err)
	}
	defer closer.Close()
	out := map[string]string{}
	for _, name := range names {
		data, err := fs.ReadFile(tree, name)
		if err != nil {
			t.Fatal(err)
		}
		out[name] = string(data)
	}
	return out
}

// A damaged layer of a registry that wants credentials, which only a pull has:
// no pod gets the disk, the image counts as not here, and a pull brings the
// layer back, alone.
func TestDamageOfAPrivateImage(t *testing.T) {
	c := &counter{gets: map[string]int{}}
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret"))
	image, _, high := twoLayers(t, "private")
	ref := serveImage(t, func(next http.Handler) http.Handler {
		return c.wrap(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Header.Get("Authorization") != basic {
				w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			next.ServeHTTP(w, req)
		}))
	}, image)
	auth := &storage.Auth{Username: "ann", Password: "secret"}
	s := newStore(t, Config{})
	img, err := s.Pull(t.Context(), ref, auth, nil)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, s.layerPath(high, dataSuffix), 12345)
	for range 2 {
		_, err = s.Disk(t.Context(), img.ID, "pod/0")
		if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "pull it again") || !strings.Contains(err.Error(), string(high)) {
			t.Errorf("Disk = %v, want ErrDataLoss with the layer and the cure", err)
		}
	}
	if _, err := s.Get(t.Context(), ref); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("Get = %v, want ErrNotFound that says why", err)
	}
	c.since()
	if _, err := s.Pull(t.Context(), ref, auth, nil); err != nil {
		t.Fatal(err)
	}
	if got := c.since(); got[manifestOf(t, image).Layers[1].Digest.String()] == 0 || len(got) != 1 {
		t.Errorf("the pull fetched %v, want the layer alone", got)
	}
	if _, err := s.Disk(t.Context(), img.ID, "pod/0"); err != nil {
		t.Errorf("Disk after the pull = %v", err)
	}
}

// The scrub finds what nobody asked for, and mends it.
func TestScrub(t *testing.T) {
	host := serve(t, nil)
	image, low, high := twoLayers(t, "scrub")
	push(t, host+"/hello:v1", image)
	s := newStore(t, Config{ScrubEvery: 50 * time.Millisecond})
	img, err := s.Pull(t.Context(), host+"/hello:v1", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	inode := func(id digest.Digest) uint64 {
		now, err := s.sight(s.layerPath(id, dataSuffix))
		if err != nil {
			t.Fatal(err)
		}
		return now.Inode
	}
	before, other := inode(high), inode(low)
	flip(t, s.layerPath(high, dataSuffix), 2_500_000)
	for deadline := time.Now().Add(time.Minute); inode(high) == before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the damage was not found")
		}
	}
	if inode(low) != other {
		t.Error("a layer that was right was replaced")
	}
	if _, err := s.Disk(t.Context(), img.ID, "pod/0"); err != nil {
		t.Error(err)
	}
}

// Documents of the image, which are containerd's content.
func TestDamagedDocumentsAreFetchedAgain(t *testing.T) {
	host := serve(t, nil)
	ref := host + "/hello:v1"
	push(t, ref, build(t, layer(t, file{"hello", incompressible(20000)})))
	s := newStore(t, Config{})
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(s.root, "content/blobs/sha256/*"))
	if err != nil || len(blobs) != 2 {
		t.Fatalf("blobs %v, %v; want manifest and config", blobs, err)
	}
	for what, damage := range map[string]func(path string){
		"gone": func(path string) { os.Remove(path) },
		"cut":  func(path string) { os.Truncate(path, 10) },
	} {
		for _, blob := range blobs {
			damage(blob)
			s.details = map[string]*detail{}
			os.Remove(s.diskPath(img.ID))
			if _, err := s.Disk(t.Context(), img.ID, "pod"); err != nil && !errdefs.IsDataLoss(err) {
				t.Errorf("%s: Disk = %v, want ErrDataLoss", what, err)
			}
			if _, err := s.Pull(t.Context(), ref, nil, nil); err != nil {
				t.Errorf("%s: Pull = %v", what, err)
			}
			if _, err := s.Disk(t.Context(), img.ID, "pod"); err != nil {
				t.Errorf("%s: Disk after Pull = %v", what, err)
			}
		}
	}
}

func TestOneProcessOnly(t *testing.T) {
	s := newStore(t, Config{})
	if _, err := Open(t.Context(), Config{Root: s.root}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), s.root) {
		t.Errorf("a second Open = %v, want ErrUnavailable that names %s", err, s.root)
	}
}
func TestReferences(t *testing.T) {
	const sum = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for in, want := range map[string]string{
		"busybox":                   "docker.io/library/busybox:latest",
		"ann/app:v1":                "docker.io/ann/app:v1",
		"atoll.local/web":           "atoll.local/web:latest",
		"localhost:5000/x":          "localhost:5000/x:latest",
		"registry:5000/a/b/c:tag":   "registry:5000/a/b/c:tag",
		"quay.io/x@" + sum:          "quay.io/x@" + sum,
		"quay.io/x:tag@" + sum:      "quay.io/x@" + sum,
		"index.docker.io/library/x": "docker.io/library/x:latest",
	} {
		if got, err := parseRef(in); err != nil || got.String() != want {
			t.Errorf("parseRef(%q) = %s, %v; want %s", in, got, err, want)
		}
	}
	ids := []string{"sha256:abc123", "sha256:abd456"}
	if id, err := matchID(ids, "abc"); err != nil || id != ids[0] {
		t.Errorf("matchID = %q, %v", id, err)
	}
	if _, err := matchID([]string{"sha256:abc123", "sha256:abc456"}, "abc"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("an ambiguous ID: %v", err)
	}
}

func TestPinned(t *testing.T) {
	host := serve(t, nil)
	push(t, host+"/a:1", build(t, layer(t, file{"a", "1"})))
	push(t, host+"/b:1", build(t, layer(t, file{"b", "1"})))
	s := newStore(t, Config{Pinned: []string{host + "/a:1"}})
	for name, want := range map[string]bool{"/a:1": true, "/b:1": false} {
		img, err := s.Pull(t.Context(), host+name, nil, nil)
		if err != nil || img.Pinned != want {
			t.Errorf("%s: pinned %v, %v; want %v", name, img.Pinned, err, want)
		}
	}
}

// A tag that moves on leaves the old image under its digest.
func TestTagMoves(t *testing.T) {
	host := serve(t, nil)
	ref := host + "/app:latest"
	s := newStore(t, Config{})
	var ids []string
	for _, body := range []string{"one", "two"} {
		push(t, ref, build(t, layer(t, file{"a", body})))
		img, err := s.Pull(t.Context(), ref, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, img.ID)
	}
	old, err := s.Get(t.Context(), ids[0])
	if err != nil || len(old.Tags) != 0 || len(old.Digests) != 1 {
		t.Errorf("the old image = %+v, %v", old, err)
	}
	if now, err := s.Get(t.Context(), ref); err != nil || now.ID != ids[1] {
		t.Errorf("the tag = %s, %v; want %s", now.ID, err, ids[1])
	}
}
