package qemu

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

func TestDataExtents(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	want := []extent{{1 << 20, 1<<20 + 4096}, {8 << 20, 9 << 20}}
	for _, x := range want {
		if _, err := f.WriteAt(make([]byte, x.end-x.start), x.start); err != nil { // not synced
			t.Fatal(err)
		}
	}
	if got, err := dataExtents(f, 64<<20); err != nil || !slices.Equal(got, want) {
		t.Errorf("extents = %v, %v; want %v", got, err, want)
	}
	want = []extent{want[0], {8 << 20, 8<<20 + 512}}
	if got, err := dataExtents(f, 8<<20+512); err != nil || !slices.Equal(got, want) {
		t.Errorf("extents of a part = %v, %v; want %v", got, err, want)
	}
	if got, err := dataExtents(f, 1<<20); err != nil || len(got) != 0 {
		t.Errorf("extents of a hole = %v, %v", got, err)
	}
}

// TestExtentMap has QEMU's own tools judge the map, and read it: a qcow2 file
// whose bitmap says what an NBD server is to call dirty.
func TestExtentMap(t *testing.T) {
	img, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Skip("qemu-utils is not installed")
	}
	for _, size := range []int64{1 << 20, 64<<20 + 512, 3 << 40, 62 << 40} {
		path := filepath.Join(t.TempDir(), "map.qcow2")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeExtentMap(f, size, []extent{{0, 1}, {size - 512, size}}); err != nil {
			t.Fatal(err)
		}
		f.Close()
		out, err := exec.CommandContext(t.Context(), img, "info", "--output=json", path).CombinedOutput()
		if err != nil {
			t.Fatalf("%d bytes: %v\n%s", size, err, out)
		}
		var info struct {
			Size     int64 `json:"virtual-size"`
			Specific struct {
				Data struct {
					Bitmaps []struct {
						Name        string
						Granularity int64
						Flags       []string
					}
				} `json:"data"`
			} `json:"format-specific"`
		}
		if err := json.Unmarshal(out, &info); err != nil {
			t.Fatal(err)
		}
		b := info.Specific.Data.Bitmaps
		if info.Size != size || len(b) != 1 || b[0].Name != mapName || b[0].Granularity != 1<<grainBits(size) || len(b[0].Flags) != 0 {
			t.Errorf("%d bytes: %+v", size, info)
		}
	}
	if b := grainBits(1 << 40); 1<<b != copyGrain {
		t.Errorf("a bit of 1 TiB stands for %d bytes, want %d", 1<<b, copyGrain)
	}
}
