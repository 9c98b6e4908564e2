package mkfs

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// TestFormat puts the extents onto a disk and has the file system's own tool
// check it.
func TestFormat(t *testing.T) {
	m, err := New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		fsType string
		size   int64
		noise  bool
		limit  int64 // bytes sent
	}{
		{"ext4", 16 << 20, false, 1 << 20},
		{"ext4", 1<<30 + 1<<20, false, 2 << 20},
		{"ext4", 20 << 30, false, 8 << 20},
		{"ext4", 32 << 20, true, 8 << 20},
		{"xfs", 300 << 20, false, 4 << 20},
		{"xfs", 10<<30 + 3<<20, false, 4 << 20},
		{"xfs", 1 << 40, false, 4 << 20},
		{"xfs", 300 << 20, true, 16 << 20},
	} {
		t.Run(fmt.Sprintf("%s of %d MiB, noise %t", tt.fsType, tt.size>>20, tt.noise), func(t *testing.T) {
			if _, err := exec.LookPath("mkfs." + tt.fsType); err != nil {
				t.Skipf("mkfs.%s is not installed", tt.fsType)
			}
			disk, err := os.Create(filepath.Join(t.TempDir(), "disk"))
			if err != nil {
				t.Fatal(err)
			}
			defer disk.Close()
			if err := disk.Truncate(tt.size); err != nil {
				t.Fatal(err)
			}
			if tt.noise {
				if _, err := io.CopyN(io.NewOffsetWriter(disk, 1<<20), rand.Reader, tt.size-1<<20); err != nil {
					t.Fatal(err)
				}
			}
			sent := int64(0)
			err = m.Format(t.Context(), tt.fsType, tt.size, tt.noise, func(at, length int64, data []byte) error {
				if data == nil {
					data = make([]byte, length)
				} else {
					sent += length
				}
				if len(data) != int(length) {
					return fmt.Errorf("%d bytes, %d said", len(data), length)
				}
				_, err := disk.WriteAt(data, at)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if sent > tt.limit {
				t.Errorf("%d bytes were sent, want %d at most", sent, tt.limit)
			}
			t.Logf("%d KiB sent", sent>>10)
			check := exec.CommandContext(t.Context(), "e2fsck", "-fn", disk.Name())
			if tt.fsType == "xfs" {
				check = exec.CommandContext(t.Context(), "xfs_repair", "-nf", disk.Name())
			}
			if out, err := check.CombinedOutput(); err != nil {
				t.Errorf("%v: %v\n%s", check.Args, err, out)
			}
		})
	}
}

func TestFormatRefused(t *testing.T) {
	m, err := New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	never := func(int64, int64, []byte) error { t.Error("something was written"); return nil }
	for _, tt := range []struct {
		fsType string
		size   int64
	}{{"ext4", 8 << 20}, {"xfs", 200 << 20}, {"btrfs", 1 << 30}, {"", 1 << 30}} {
		if err := m.Format(t.Context(), tt.fsType, tt.size, false, never); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s of %d bytes: %v", tt.fsType, tt.size, err)
		}
	}
	m.tools["ext4"] = "mkfs.of-nobody"
	if err := m.Format(t.Context(), "ext4", 1<<30, false, never); !errdefs.IsNotImplemented(err) {
		t.Errorf("without the tool: %v", err)
	}
}

// TestLeftovers leaves a file as a killed process does, and an error of write.
func TestLeftovers(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "fs-123"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := New(dir)
	if err != nil {
		t.Fatal(err)
	}
	gone := errors.New("gone")
	if err := m.Format(t.Context(), "ext4", 64<<20, false, func(int64, int64, []byte) error { return gone }); !errors.Is(err, gone) {
		t.Errorf("write's error became %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestEachRun(t *testing.T) {
	b := make([]byte, 5*blockSize+100)
	b[blockSize], b[3*blockSize-1], b[len(b)-1] = 1, 2, 3
	var got bytes.Buffer
	err := eachRun(b, 1000, make([]byte, blockSize), false, func(at, length int64, data []byte) error {
		fmt.Fprintf(&got, "%d+%d ", at, length)
		return nil
	})
	if want := "5096+8192 21480+100 "; err != nil || got.String() != want {
		t.Errorf("%q, %v; want %q", got.String(), err, want)
	}
}
