package qemu

import (
	"os"
	"path/filepath"
	"testing"
)

// All groups above a VM's weigh what the host has, in both versions, but for an
// idle pool; the mount's own does not.
func TestWeigh(t *testing.T) {
	for _, test := range []struct {
		h           hierarchy
		idle        bool
		file, value string
		pool        string
	}{
		{hierarchy{controllers: []string{"cpu", "cpuacct"}}, false, "cpu.shares", "4096", "4096"},
		{hierarchy{controllers: []string{"cpu", "memory"}, unified: true}, false, "cpu.weight", "400", "400"},
		{hierarchy{controllers: []string{"memory"}}, false, "cpu.shares", "was", "was"},
		{hierarchy{controllers: []string{"cpu", "cpuacct"}}, true, "cpu.shares", "4096", "2"},
		{hierarchy{controllers: []string{"cpu", "memory"}, unified: true}, true, "cpu.weight", "400", "1"},
	} {
		test.h.root = t.TempDir()
		rel := "atoll/0123abcd/burstable/vm_0"
		for dir := rel; ; dir = filepath.Dir(dir) {
			path := filepath.Join(test.h.root, dir)
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(path, test.file), []byte("was"), 0o644); err != nil {
				t.Fatal(err)
			}
			if dir == "." {
				break
			}
		}
		if err := test.h.weigh(rel, 4, test.idle); err != nil {
			t.Fatal(err)
		}
		for dir, want := range map[string]string{".": "was", "atoll": test.value, "atoll/0123abcd": test.value, "atoll/0123abcd/burstable": test.pool, rel: "was"} {
			b, err := os.ReadFile(filepath.Join(test.h.root, dir, test.file))
			if got := string(b); err != nil || len(got) < len(want) || got[:len(want)] != want {
				t.Errorf("%+v: %s of %s is %q (%v), want %s", test.h, test.file, dir, got, err, want)
			}
		}
	}
}
