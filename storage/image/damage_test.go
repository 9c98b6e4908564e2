package image

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
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

// overwrite puts a byte into the middle of a file, as a dying disk might.
func overwrite(t *testing.T, path string, off int64) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("#"), off); err != nil {
		t.Fatal(err)
	}
}

func TestDamagedDisksAreMadeAgain(t *testing.T) {
	host := serve(t, nil)
	ref := host + "/hello:v1"
	push(t, ref, build(t, layer(t, file{"hello", strings.Repeat("one ", 3000)})))
	s := newStore(t, Config{})
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	path := s.diskPath(img.ID)
	for what, damage := range map[string]func(){
		"gone":          func() { os.Remove(path) },
		"cut":           func() { os.Truncate(path, 4096) },
		"superblock":    func() { overwrite(t, path, 1040) },
		"other version": func() { overwrite(t, path, 5000); editRecord(t, s, img.ID, func(r *diskRecord) { r.Version-- }) },
		"after a reboot": func() {
			overwrite(t, path, 5000)
			editRecord(t, s, img.ID, func(r *diskRecord) { r.BootID = "another" })
		},
	} {
		damage()
		disk, err := s.Disk(t.Context(), img.ID, "pod")
		if err != nil {
			t.Errorf("%s: Disk = %v", what, err)
			continue
		}
		if got := readDisk(t, disk.Path, "hello"); strings.Contains(got, "#") {
			t.Errorf("%s: the disk still has the damage", what)
		}
	}
	// Right, and made before the last boot: checked once, not made again.
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	editRecord(t, s, img.ID, func(r *diskRecord) { r.BootID = "another" })
	if _, err := s.Disk(t.Context(), img.ID, "pod"); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(path); err != nil || !os.SameFile(before, after) {
		t.Errorf("a good disk was made again: %v", err)
	}
	editRecord(t, s, img.ID, func(r *diskRecord) {
		if r.BootID != s.bootID {
			t.Errorf("the check is not remembered: boot %s", r.BootID)
		}
	})
}

func TestDamagedBlobsAreFetchedAgain(t *testing.T) {
	host := serve(t, nil)
	ref := host + "/hello:v1"
	push(t, ref, build(t, layer(t, file{"hello", incompressible(20000)})))
	s := newStore(t, Config{})
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(s.root, "content/blobs/sha256/*"))
	if err != nil || len(blobs) != 3 {
		t.Fatalf("blobs %v, %v", blobs, err)
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
	// Bits that flipped, which only unpacking finds.
	var layerBlob string
	for _, blob := range blobs {
		if fi, err := os.Stat(blob); err == nil && fi.Size() > 10000 {
			layerBlob = blob
		}
	}
	overwrite(t, layerBlob, 9000)
	os.Remove(s.diskPath(img.ID))
	if _, err := s.Disk(t.Context(), img.ID, "pod"); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "pull it again") {
		t.Errorf("Disk = %v, want ErrDataLoss with the cure", err)
	}
	if _, err := s.Pull(t.Context(), ref, nil, nil); err != nil {
		t.Errorf("Pull = %v", err)
	}
	if _, err := s.Disk(t.Context(), img.ID, "pod"); err != nil {
		t.Errorf("Disk after Pull = %v", err)
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
