package qemu

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

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
