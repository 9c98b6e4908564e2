package local

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage/storagetest"
)

func TestEphemeral(t *testing.T) {
	dir := t.TempDir()
	e, err := NewEphemeral(dir)
	if err != nil {
		t.Fatal(err)
	}
	storagetest.Ephemeral(t, e)
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestNewEphemeralErasesHalfMadeDisks(t *testing.T) {
	dir := t.TempDir()
	half := filepath.Join(dir, tempPrefix+"x-123")
	if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewEphemeral(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(half); !os.IsNotExist(err) {
		t.Errorf("a half made disk is still there: %v", err)
	}
}

// A host disk that is full: a small tmpfs in its place.
func TestEphemeralOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=9m"); err != nil {
		t.Skipf("mounting needs root: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	e, err := NewEphemeral(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = e.Create(t.Context(), "pod", 1<<30)
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "free space") {
		t.Errorf("Create = %v, want ErrResourceExhausted that names %s and the cure", err, dir)
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
}

func BenchmarkCreate(b *testing.B) {
	e, err := NewEphemeral(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := e.Create(b.Context(), "pod", 10<<30); err != nil {
			b.Fatal(err)
		}
		if err := e.Remove(b.Context(), "pod"); err != nil {
			b.Fatal(err)
		}
	}
}
