package podinit

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestModprobe(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "bridge")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"01-bridge.ko", "00-stp.ko"} {
		if err := os.WriteFile(filepath.Join(dir, f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args []string
		code int
		load []string
	}{
		{[]string{modprobeFile, "-q", "--", "bridge"}, 0, []string{"00-stp.ko", "01-bridge.ko"}},
		{[]string{modprobeFile, "-q", "--", "rtnl-link-bridge"}, 0, []string{"00-stp.ko", "01-bridge.ko"}},
		{[]string{modprobeFile, "-q", "--", "nosuch"}, 1, nil},
		{[]string{modprobeFile, "-q", "--", "../" + filepath.Base(root) + "/bridge"}, 1, nil},
		{[]string{modprobeFile, "-q", "--", ""}, 1, nil},
		{[]string{modprobeFile}, 2, nil},
	} {
		var got []string
		code := modprobe(root, c.args, func(files []string) {
			for _, f := range files {
				got = append(got, filepath.Base(f))
			}
		})
		if code != c.code || !slices.Equal(got, c.load) {
			t.Errorf("%q: code %d, loaded %q; want %d, %q", c.args, code, got, c.code, c.load)
		}
	}
}
