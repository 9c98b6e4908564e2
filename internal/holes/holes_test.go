package holes

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestData(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	parts := [][2]int64{{1 << 20, 1<<20 + 4096}, {8 << 20, 9 << 20}}
	for _, x := range parts {
		if _, err := f.WriteAt(make([]byte, x[1]-x[0]), x[0]); err != nil { // not synced
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		size int64
		want [][2]int64
	}{
		{64 << 20, parts}, {8<<20 + 512, [][2]int64{parts[0], {8 << 20, 8<<20 + 512}}}, {1 << 20, nil}, {0, nil},
	} {
		var got [][2]int64
		err := Data(f, tc.size, func(start, end int64) error {
			got = append(got, [2]int64{start, end})
			return nil
		})
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("of %d bytes: %v, %v; want %v", tc.size, got, err, tc.want)
		}
	}
	stop := errors.New("stop")
	if err := Data(f, 64<<20, func(int64, int64) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("%v, want what the function says", err)
	}
}
