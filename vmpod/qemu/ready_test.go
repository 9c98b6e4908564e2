package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

var _ vmpod.Checker = (*Driver)(nil)

func TestReady(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{}
	for _, name := range []string{"qemu", "vmlinux", "initrd"} {
		files[name] = filepath.Join(dir, name)
		if err := os.WriteFile(files[name], []byte("x"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d := &Driver{accel: AcceleratorTCG, cfg: Config{Binary: files["qemu"], Guest: Guest{Kernel: files["vmlinux"], Initrd: files["initrd"]}}}
	if err := d.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, says := range map[string]string{"qemu": "QEMU cannot be run", "vmlinux": "the guest's kernel", "initrd": "the guest's initramfs"} {
		if err := os.Rename(files[name], files[name]+".away"); err != nil {
			t.Fatal(err)
		}
		if err := d.Ready(t.Context()); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), files[name]) {
			t.Errorf("without %s: %v", name, err)
		}
		if err := os.Rename(files[name]+".away", files[name]); err != nil {
			t.Fatal(err)
		}
	}
}
