package podinit

import (
	"os"
	"path/filepath"
	"testing"
)

func TestDropSchedulers(t *testing.T) {
	dir := t.TempDir()
	want := map[string]string{"vda": "none", "vdb": "[none] mq-deadline", "vdc": "[mq-deadline]", "sda": "[mq-deadline] none"}
	for disk, offers := range map[string]string{"vda": "[mq-deadline] none\n", "vdb": want["vdb"], "vdc": want["vdc"], "sda": want["sda"], "vdd": ""} {
		queue := filepath.Join(dir, disk, "queue")
		if err := os.MkdirAll(queue, 0o755); err != nil {
			t.Fatal(err)
		}
		if offers == "" {
			continue // a device without a scheduler has no such file
		}
		if err := os.WriteFile(filepath.Join(queue, "scheduler"), []byte(offers), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dropSchedulers(dir)
	for disk, w := range want {
		if b, err := os.ReadFile(filepath.Join(dir, disk, "queue", "scheduler")); err != nil || string(b) != w {
			t.Errorf("%s: %q, %v; want %q", disk, b, err, w)
		}
	}
}
