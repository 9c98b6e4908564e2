package image

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
)

// fakeVerity remembers what files were when they were sealed, by inode; it
// keeps nobody from changing them.
type fakeVerity struct {
	mu    sync.Mutex
	seals map[uint64]digest.Digest
	files []*os.File // open, so that no other gets the inode
	fail  error
}

func newFakeVerity(t *testing.T) *fakeVerity {
	v := &fakeVerity{seals: map[uint64]digest.Digest{}}
	t.Cleanup(func() {
		for _, f := range v.files {
			f.Close()
		}
	})
	return v
}

func inodeOf(path string) uint64 {
	var st unix.Stat_t
	_ = unix.Stat(path, &st)
	return st.Ino
}

func (v *fakeVerity) seal(path string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fail != nil {
		return fmt.Errorf("seal: %w", v.fail)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	v.files = append(v.files, f)
	data, err := io.ReadAll(f)
	if err != nil {
		return err
	}
	v.seals[inodeOf(path)] = digest.FromBytes(data)
	return nil
}

func (v *fakeVerity) measure(path string) (digest.Digest, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if seal, ok := v.seals[inodeOf(path)]; ok {
		return seal, nil
	}
	return "", fmt.Errorf("%s: %w", path, unix.ENODATA)
}

// reboot makes the store believe that the host was booted since it looked.
func reboot(t *testing.T, s *Store, image string, layers ...digest.Digest) {
	t.Helper()
	for _, id := range layers {
		if err := s.changeLayer(id, func(r *layerRecord) { r.Good.Boot = "another" }); err != nil {
			t.Fatal(err)
		}
	}
	editRecord(t, s, image, func(r *diskRecord) { r.Good.Boot = "another" })
}

// replace puts another file with one byte changed at path.
func replace(t *testing.T, path string, off int) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[off] ^= 1
	if err := os.WriteFile(path+".new", data, 0o444); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// A file that has its seal is not read after a boot; one that has another, or
// none, is.
func TestSealedFilesAreNotRead(t *testing.T) {
	image, low, high := twoLayers(t, "sealed")
	ref := serveImage(t, nil, image)
	verity := newFakeVerity(t)
	s := newStore(t, Config{sealer: verity})
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	users := 0
	disk := func(what string) {
		t.Helper()
		users++
		if _, err := s.Disk(t.Context(), img.ID, fmt.Sprintf("pod_%d", users)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if err := s.checkBoot(t, img.ID, low, high); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	data, index, meta := s.layerPath(high, dataSuffix), s.layerPath(high, indexSuffix), s.metaPath(img.ID)
	disk("pulled")
	// Only who reads could see this.
	for _, path := range []string{data, index, meta} {
		flip(t, path, 30)
	}
	reboot(t, s, img.ID, low, high)
	disk("sealed")
	if n := s.Counts(); n.DamagedLayers+n.DamagedMetadata != 0 {
		t.Errorf("%+v: sealed files were read", n)
	}
	if err := s.recheck(t.Context(), "pod_1"); err != nil {
		t.Error(err)
	}
	if n := s.Counts(); n.DamagedLayers != 1 || n.DamagedMetadata != 1 {
		t.Errorf("%+v: a check does not read what is sealed", n)
	}
	disk("mended")
	for n, path := range []string{data, index} {
		replace(t, path, 30)
		reboot(t, s, img.ID, low, high)
		disk(path)
		if got := s.Counts().DamagedLayers; got != int64(n)+2 {
			t.Errorf("%d: another %s passed for the sealed one", got, path)
		}
	}
	replace(t, meta, 30)
	reboot(t, s, img.ID, low, high)
	disk(meta)
	if n := s.Counts(); n.DamagedMetadata != 2 {
		t.Errorf("%+v: other metadata passed for the sealed one", n)
	}
}

// Where a file cannot be sealed it is read, as where there are no seals.
func TestUnsealedFilesAreRead(t *testing.T) {
	image, low, high := twoLayers(t, "unsealed")
	ref := serveImage(t, nil, image)
	for what, prepare := range map[string]func(v *fakeVerity) (after func()){
		"never": func(v *fakeVerity) func() { v.fail = unix.EOPNOTSUPP; return func() {} },
		"later": func(v *fakeVerity) func() { return func() { v.fail = unix.ENOSPC } },
	} {
		verity := newFakeVerity(t)
		after := prepare(verity)
		s := newStore(t, Config{sealer: verity})
		after()
		img, err := s.Pull(t.Context(), ref, nil, nil)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		flip(t, s.layerPath(high, dataSuffix), 2000)
		reboot(t, s, img.ID, low, high)
		if err := s.checkLayer(t.Context(), high); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v, want ErrDataLoss", what, err)
		}
		if (s.sealer == nil) != (what == "never") {
			t.Errorf("%s: the store's sealer is %v", what, s.sealer)
		}
	}
}

// verityInGuest runs on a kernel and an ext4 that have fs-verity: dir is on
// device. What flips on the disk itself, under the file system, is found.
func verityInGuest(t *testing.T, dir, device string) {
	image, low, high := twoLayers(t, "verity")
	ref := serveImage(t, nil, image)
	slow := Timeouts{Connect: patience, Header: patience, Stall: patience}
	s := newStore(t, Config{Root: dir, Timeouts: slow})
	if s.sealer == nil {
		t.Fatal("the store found no fs-verity")
	}
	var l listener
	s.Damages(l.hear)
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	disk := func(user string) {
		t.Helper()
		if _, err := s.Disk(t.Context(), img.ID, user); err != nil {
			t.Error(err)
		}
	}
	data, index, meta := s.layerPath(high, dataSuffix), s.layerPath(high, indexSuffix), s.metaPath(img.ID)
	rec, err := s.layerRecord(high)
	if err != nil || rec.DataSeal == "" || rec.IndexSeal == "" {
		t.Fatalf("%+v, %v: want seals", rec, err)
	}
	for _, path := range []string{data, index, meta} {
		if _, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
			t.Errorf("%s can be written", path)
		}
	}
	disk("old_0")

	dropCaches(t)
	reboot(t, s, img.ID, low, high)
	before := bytesRead(t, device)
	disk("booted_0")
	first := bytesRead(t, device) - before
	if err := s.recheck(t.Context(), "old_0"); err != nil {
		t.Error(err)
	}
	all := bytesRead(t, device) - before - first
	t.Logf("read from the disk: %d bytes at the first use after a boot, %d by a check", first, all)
	if first > 1<<20 || all < rec.Data {
		t.Errorf("the first use after a boot read %d bytes of %d, a check %d", first, rec.Data, all)
	}
	l.want(t, "nothing is wrong")

	holds := []storage.Hold{{User: "booted_0", Image: ref}, {User: "old_0", Image: ref}}
	for _, tc := range []struct {
		what, path string
		block      int64 // of the file
		damage     storage.Damage
	}{
		{"data", data, 600, storage.Damage{Layer: high.String(), Mended: true, Holds: holds}},
		{"its hashes", data, (rec.Data + 65535) / 65536 * 16, storage.Damage{Layer: high.String(), Mended: true, Holds: holds}},
		{"index", index, 0, storage.Damage{Layer: high.String(), Mended: true, Holds: holds}},
		{"metadata", meta, 0, storage.Damage{Mended: true, Holds: holds}},
	} {
		flipOnDisk(t, device, tc.path, tc.block)
		if _, err := os.ReadFile(tc.path); err == nil || !strings.Contains(err.Error(), "input/output error") {
			t.Errorf("%s: reading = %v, want EIO", tc.what, err)
		}
		s.Recheck("old_0")
		waitUntil(t, func() bool { return !s.checking("old_0") })
		l.want(t, tc.what, tc.damage)
		disk("old_0")
		if _, err := os.ReadFile(tc.path); err != nil {
			t.Errorf("%s, mended: %v", tc.what, err)
		}
	}
	flipOnDisk(t, device, data, 10)
	reboot(t, s, img.ID, low, high)
	disk("later_0") // it is sealed: not read
	l.want(t, "nobody has read it")
	now, err := s.layerRecord(high)
	if err != nil || now.DataSeal != rec.DataSeal || now.IndexSeal != rec.IndexSeal {
		t.Errorf("%+v, %v: want the seals of before", now, err)
	}
	if err := s.scrubLayers(t.Context(), func(digest.Digest, layerRecord) bool { return true }); err != nil {
		t.Error(err)
	}
	if got := l.take(); len(got) != 1 || got[0].Layer != high.String() || len(got[0].Holds) != 3 {
		t.Errorf("the weekly check told %+v", got)
	}
}
