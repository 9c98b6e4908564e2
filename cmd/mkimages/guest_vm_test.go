package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/u-root/u-root/pkg/cpio"

	"github.com/openatoll/atoll/storage/treesum"
)

// TestDemoImageInGuest boots the distribution's own kernel, the default of pod
// VMs, with the disk of the tree image: what that kernel sees, directly and as
// the lower layer of an overlay, must be what was expected.
func TestDemoImageInGuest(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a VM")
	}
	kernel, modules := findKernel(t)
	out := filepath.Join(t.TempDir(), "images")
	if err := run(out, "", false); err != nil {
		t.Fatal(err)
	}
	store := openStore(t, serveSeeds(t, out))
	img, err := store.Pull(t.Context(), "atoll.local/tree", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	disk, err := store.Disk(t.Context(), img.ID, "test")
	if err != nil {
		t.Fatal(err)
	}
	in, err := gather(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	want := readExpected(t, filepath.Join(out, "expected", "tree.jsonl"))
	direct, overlay := bootWith(t, kernel, initramfs(t, in, modules), disk.Path)
	same(t, "the guest's mount", want, direct)
	overlay[0] = want[0] // an overlay's root has the attributes of the upper directory
	same(t, "the guest's overlay", want, overlay)
}

// findKernel returns the distribution's kernel and the modules it needs here,
// in an order that they can be loaded in.
func findKernel(t *testing.T) (string, []string) {
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("no QEMU")
	}
	kernels, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(kernels) == 0 {
		t.Skip("no cloud kernel of the distribution (linux-image-cloud-amd64)")
	}
	kernel := kernels[len(kernels)-1]
	root := "/lib/modules/" + strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	deps, err := os.ReadFile(filepath.Join(root, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	for _, name := range []string{"virtio_pci", "virtio_blk", "crc32c_generic", "erofs", "overlay"} {
		for line := range strings.Lines(string(deps)) {
			module, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
			if filepath.Base(module) != name+".ko" {
				continue
			}
			list := strings.Fields(needs)
			slices.Reverse(list) // modules.dep has the deepest last
			for _, m := range append(list, module) {
				if path := filepath.Join(root, m); !slices.Contains(order, path) {
					order = append(order, path)
				}
			}
		}
	}
	return kernel, order
}

const initScript = `#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
for m in $($bb cat /modules); do $bb insmod /$m || echo "insmod $m failed"; done
$bb mount -t erofs -o ro /dev/vda /mnt || echo mount failed
/treesum /mnt > /dev/vdb
$bb mount -t tmpfs tmp /tmp && $bb mkdir /tmp/upper /tmp/work /tmp/merged
$bb mount -t overlay -o lowerdir=/mnt,upperdir=/tmp/upper,workdir=/tmp/work overlay /tmp/merged || echo overlay failed
/treesum /tmp/merged > /dev/vdc
$bb sync
$bb poweroff -f
`

func initramfs(t *testing.T, in *inputs, modules []string) string {
	records := []cpio.Record{
		cpio.Directory("bin", 0o755), cpio.Directory("dev", 0o755), cpio.Directory("mnt", 0o755), cpio.Directory("tmp", 0o755),
		cpio.CharDev("dev/console", 0o600, 5, 1),
		cpio.StaticFile("bin/busybox", string(in.busybox), 0o755),
		cpio.StaticFile("treesum", string(in.treesum), 0o755),
		cpio.StaticFile("init", initScript, 0o755),
	}
	var names []string
	for _, m := range modules {
		data, err := os.ReadFile(m)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, filepath.Base(m))
		records = append(records, cpio.StaticFile(filepath.Base(m), string(data), 0o644))
	}
	records = append(records, cpio.StaticFile("modules", strings.Join(names, "\n")+"\n", 0o644))
	path := filepath.Join(t.TempDir(), "initramfs")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := cpio.Newc.Writer(f)
	if err := cpio.WriteRecords(w, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	return path
}

// bootWith runs one VM and returns what it wrote to its two other disks.
func bootWith(t *testing.T, kernel, initrd, disk string) (direct, overlay []treesum.Entry) {
	dir := t.TempDir()
	args := []string{"-nodefaults", "-no-user-config", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nographic", "-no-reboot",
		"-kernel", kernel, "-initrd", initrd, "-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1",
		"-drive", "if=none,id=d0,format=vmdk,readonly=on,file=" + disk, "-device", "virtio-blk-pci,drive=d0"}
	var outputs []string
	for i, name := range []string{"direct", "overlay"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, make([]byte, 4<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		outputs = append(outputs, path)
		args = append(args, "-drive", fmt.Sprintf("if=none,id=d%d,format=raw,file=%s", i+1, path), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i+1))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	console, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, console)
	}
	var lists [2][]treesum.Entry
	for i, path := range outputs {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		lists[i], err = treesum.Read(bytes.NewReader(bytes.TrimRight(data, "\x00")))
		if err != nil || len(lists[i]) == 0 {
			t.Fatalf("the guest wrote %d entries, %v; its console:\n%s", len(lists[i]), err, console)
		}
	}
	return lists[0], lists[1]
}
