package erofs

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	goerofs "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage/treesum"
)

var (
	seeds = flag.Uint64("seeds", 60, "random layer stacks to try")
	first = flag.Uint64("first", 0, "the first `seed`")
)

// TestMergeAsContainerd merges random layers both here and with containerd's
// archive.Apply into a directory: entry by entry the same, or an error of both.
func TestMergeAsContainerd(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("owners and device nodes need root")
	}
	failed := 0
	for seed := *first; seed < *first+*seeds; seed++ {
		g := newGenerator(seed)
		stack := g.stack(t)
		want, wantErr := applied(t, stack)
		if wantErr != nil && strings.Contains(wantErr.Error(), "UtimesNanoAt") {
			continue // it set the time of a directory whose path leads elsewhere by then
		}
		got, err := Manifest(t.Context(), bytesLayers(stack), Limits{})
		if (err != nil) != (wantErr != nil) {
			t.Fatalf("-first %d: error %v, containerd's: %v\n%s", seed, err, wantErr, list(stack))
		}
		if err != nil {
			failed++
			continue
		}
		forgetAccidents(want, got)
		if diffs := treesum.Diff(want, got, 10); len(diffs) > 0 {
			t.Fatalf("-first %d: not what containerd makes:\n%s\n%s", seed, strings.Join(diffs, "\n"), list(stack))
		}
	}
	t.Logf("%d stacks the same, %d refused by both", *seeds-uint64(failed), failed)
	if *seeds >= 60 && failed > int(*seeds)/2 {
		t.Errorf("%d of %d stacks are refused: the generator tests too little", failed, *seeds)
	}
}

// applied makes a directory of the layers with containerd.
func applied(t *testing.T, stack [][]byte) ([]treesum.Entry, error) {
	dir, err := os.MkdirTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, data := range stack {
		if _, err := archive.Apply(t.Context(), dir, bytes.NewReader(data)); err != nil {
			return nil, err
		}
	}
	entries, err := treesum.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries, nil
}

// forgetAccidents drops the times that a directory has because something was
// made or removed in it just now, and all of the root's.
func forgetAccidents(want, got []treesum.Entry) {
	recent := fmt.Sprint(time.Now().Add(-time.Hour).Unix())
	now := map[string]bool{}
	for i := range want {
		if e := &want[i]; e.Path == "/" || e.Type == "dir" && len(e.Mtime) >= 10 && e.Mtime > recent {
			now[e.Path] = true
			e.Mtime = ""
		}
	}
	for i := range got {
		if now[got[i].Path] {
			got[i].Mtime = ""
		}
	}
}

// TestImageHoldsTree writes random trees as EROFS and reads them back with
// go-erofs, and some with the kernel.
func TestImageHoldsTree(t *testing.T) {
	dir := t.TempDir()
	mounts := 0
	for seed := *first; seed < *first+*seeds; seed++ {
		stack := newGenerator(seed).stack(t)
		want, err := Manifest(t.Context(), bytesLayers(stack), Limits{})
		if err != nil {
			continue
		}
		path := filepath.Join(dir, "image")
		if _, err := Build(t.Context(), path, bytesLayers(stack), Limits{}); err != nil {
			t.Fatalf("-first %d: %v", seed, err)
		}
		if diffs := treesum.Diff(want, readBack(t, path), 10); len(diffs) > 0 {
			t.Fatalf("-first %d: go-erofs reads something else:\n%s\n%s", seed, strings.Join(diffs, "\n"), list(stack))
		}
		if mounts < 20 && canMount() {
			mounts++
			if diffs := treesum.Diff(want, mounted(t, path), 10); len(diffs) > 0 {
				t.Fatalf("-first %d: the kernel reads something else:\n%s\n%s", seed, strings.Join(diffs, "\n"), list(stack))
			}
		}
	}
}

func canMount() bool {
	kinds, err := os.ReadFile("/proc/filesystems")
	return err == nil && bytes.Contains(kinds, []byte("\terofs\n")) && os.Getuid() == 0
}

func mounted(t testing.TB, image string) []treesum.Entry {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", image, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	entries, err := treesum.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// readBack describes an image with go-erofs's reader.
func readBack(t *testing.T, image string) []treesum.Entry {
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return readTree(t, f)
}

func readTree(t *testing.T, r io.ReaderAt) []treesum.Entry {
	fsys, err := goerofs.Open(r)
	if err != nil {
		t.Fatal(err)
	}
	var entries []treesum.Entry
	inodes := map[string]int64{}
	err = fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*goerofs.Stat)
		e := treesum.Entry{
			Path: "/" + strings.TrimPrefix(path, "."), UID: st.UID, GID: st.GID,
			Mtime: treesum.FormatMtime(int64(st.Mtime), st.MtimeNs), Nlink: uint64(st.Nlink),
		}
		if path != "." {
			e.Path = "/" + path
		}
		perm := uint32(st.Mode.Perm())
		for bit, mode := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
			if st.Mode&bit != 0 {
				perm |= mode
			}
		}
		e.Mode = fmt.Sprintf("%04o", perm)
		inodes[e.Path] = st.Ino
		switch {
		case st.Mode.IsDir():
			e.Type, e.Nlink = "dir", 0
		case st.Mode&fs.ModeSymlink != 0:
			e.Type = "symlink"
			e.Target, err = fs.ReadLink(fsys, path)
		case st.Mode&fs.ModeCharDevice != 0, st.Mode&fs.ModeDevice != 0:
			e.Type = "block"
			if st.Mode&fs.ModeCharDevice != 0 {
				e.Type = "char"
			}
			major, minor := decodeDev(st.Rdev)
			e.Device = fmt.Sprintf("%d:%d", major, minor)
		case st.Mode&fs.ModeNamedPipe != 0:
			e.Type = "fifo"
		default:
			e.Type, e.Size = "file", st.Size
			var data []byte
			data, err = fs.ReadFile(fsys, path)
			sum := sha256.Sum256(data)
			e.SHA256 = hex.EncodeToString(sum[:])
		}
		for name, value := range st.Xattrs {
			if e.Xattrs == nil {
				e.Xattrs = map[string][]byte{}
			}
			e.Xattrs[name] = []byte(value)
		}
		entries = append(entries, e)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	treesum.Sort(entries)
	seen := map[int64]int{}
	for i := range entries {
		if entries[i].Type == "dir" || entries[i].Nlink < 2 {
			continue
		}
		if j, ok := seen[inodes[entries[i].Path]]; ok {
			entries[i].Same, entries[j].Same = entries[j].Path, entries[j].Path
		} else {
			seen[inodes[entries[i].Path]] = i
		}
	}
	return entries
}
