package local

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage/storagetest"
)

func TestEphemeral(t *testing.T) {
	dir := t.TempDir()
	e, err := NewEphemeral(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	storagetest.Ephemeral(t, e)
	if left, _ := os.ReadDir(dir); len(left) != 1 || left[0].Name() != mastersDir {
		t.Errorf("left behind: %v", left)
	}
}

func TestNewEphemeralErasesHalfMadeDisks(t *testing.T) {
	dir := t.TempDir()
	half := filepath.Join(dir, tempPrefix+"x-123")
	if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewEphemeral(Config{Dir: dir}); err != nil {
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
	e, err := NewEphemeral(Config{Dir: dir})
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

// BenchmarkCreate compares a disk copied from a master with one that mkfs
// makes, the master's own way; cpu-µs counts child processes.
func BenchmarkCreate(b *testing.B) {
	e, err := NewEphemeral(Config{Dir: b.TempDir(), Quota: true})
	if err != nil {
		b.Fatal(err)
	}
	dir, err := e.masters.dir()
	if err != nil {
		b.Fatal(err)
	}
	for name, make := range map[string]func() error{
		"copy": func() error {
			if _, err := e.Create(b.Context(), "pod", 10<<30); err != nil {
				return err
			}
			return e.Remove(b.Context(), "pod")
		},
		"mkfs": func() error {
			path, err := e.masters.make(b.Context(), dir, 10<<30)
			if err != nil {
				return err
			}
			return os.Remove(path)
		},
	} {
		b.Run(name, func(b *testing.B) {
			before := cpu(b)
			for b.Loop() {
				if err := make(); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
		})
	}
}

// cpu is what this process and its children have taken.
func cpu(b *testing.B) (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var r unix.Rusage
		if err := unix.Getrusage(who, &r); err != nil {
			b.Fatal(err)
		}
		sum += time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	return sum
}
