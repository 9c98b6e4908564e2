package image

import (
	"context"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

// patience is a limit for a guest under emulation on a busy host.
const patience = time.Minute

const verityInit = `#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev && $bb mount -t proc proc /proc && $bb mount -t sysfs sys /sys && $bb mount -t tmpfs tmp /tmp
for m in $($bb cat /modules); do $bb insmod /$m; done
$bb ifconfig lo 127.0.0.1 up
$bb mount -t ext4 /dev/vda /mnt && $bb mkdir /mnt/store && ATOLL_VERITY_DIR=/mnt/store PATH=/bin /test -test.run '^TestFsVerity$' -test.v && echo GUEST PASSED
$bb poweroff -f
`

// TestFsVerity runs itself in a guest whose kernel and disk have fs-verity.
func TestFsVerity(t *testing.T) {
	if dir := os.Getenv("ATOLL_VERITY_DIR"); dir != "" {
		verityInGuest(t, dir, "vda")
		return
	}
	if testing.Short() {
		t.Skip("boots a VM")
	}
	for _, program := range []string{"qemu-system-x86_64", "mkfs.ext4", "go"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(err)
		}
	}
	kernel, modules := debianKernel(t)
	dir := t.TempDir()
	disk, binary, initrd := filepath.Join(dir, "disk"), filepath.Join(dir, "test"), filepath.Join(dir, "initrd")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-trimpath", "-ldflags=-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	run(t, build)
	run(t, exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-b", "4096", "-O", "verity", disk, "128M"))
	writeInitrd(t, initrd, binary, modules)
	ctx, cancel := context.WithTimeout(t.Context(), 5*patience)
	defer cancel()
	console := run(t, exec.CommandContext(ctx, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "512",
		"-nographic", "-no-reboot", "-kernel", kernel, "-initrd", initrd, "-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1",
		"-drive", "if=none,id=d0,format=raw,cache=unsafe,file="+disk, "-device", "virtio-blk-pci,drive=d0"))
	if !strings.Contains(console, "GUEST PASSED") {
		t.Errorf("in the guest:\n%s", console)
	} else {
		t.Logf("in the guest:\n%s", console)
	}
}

func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// debianKernel returns the distribution's kernel for guests and the modules of
// its disk, in the order in which they are to be loaded.
func debianKernel(t *testing.T) (kernel string, modules []string) {
	t.Helper()
	kernels, _ := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if len(kernels) == 0 {
		t.Skip("no cloud kernel of the distribution (linux-image-cloud-amd64)")
	}
	kernel = kernels[len(kernels)-1]
	root := "/lib/modules/" + strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	deps, err := os.ReadFile(filepath.Join(root, "modules.dep"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"virtio_pci", "virtio_blk"} {
		for line := range strings.Lines(string(deps)) {
			module, needs, _ := strings.Cut(strings.TrimSpace(line), ":")
			if filepath.Base(module) != name+".ko" {
				continue
			}
			list := strings.Fields(needs)
			slices.Reverse(list) // modules.dep has the deepest last
			for _, m := range append(list, module) {
				if path := filepath.Join(root, m); !slices.Contains(modules, path) {
					modules = append(modules, path)
				}
			}
		}
	}
	return kernel, modules
}

func writeInitrd(t *testing.T, path, binary string, modules []string) {
	t.Helper()
	records := []cpio.Record{cpio.CharDev("dev/console", 0o600, 5, 1), cpio.StaticFile("init", verityInit, 0o755)}
	for _, dir := range []string{"bin", "dev", "mnt", "proc", "sys", "tmp"} {
		records = append(records, cpio.Directory(dir, 0o755))
	}
	var names []string
	add := func(name, from string, mode uint64) {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		records = append(records, cpio.StaticFile(name, string(data), mode))
	}
	add("bin/busybox", "/bin/busybox", 0o755)
	add("test", binary, 0o755)
	for _, m := range modules {
		add(filepath.Base(m), m, 0o644)
		names = append(names, filepath.Base(m))
	}
	records = append(records, cpio.StaticFile("modules", strings.Join(names, "\n")+"\n", 0o644))
	slices.SortStableFunc(records, func(a, b cpio.Record) int { return strings.Count(a.Name, "/") - strings.Count(b.Name, "/") })
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
}

// flipOnDisk turns a bit of a block of a file round, under the file system.
func flipOnDisk(t *testing.T, device, path string, block int64) {
	t.Helper()
	unix.Sync()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := uint32(block)
	const fibmap = 1 // linux/fs.h
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fibmap, uintptr(unsafe.Pointer(&at))); errno != 0 || at == 0 {
		t.Fatalf("%s has no block %d: %v", path, block, errno)
	}
	disk, err := os.OpenFile("/dev/"+device, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	var word [4]byte
	where := int64(at)*4096 + 100
	if _, err := disk.ReadAt(word[:], where); err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(word[:], binary.LittleEndian.Uint32(word[:])^1<<20)
	if _, err := disk.WriteAt(word[:], where); err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
}

func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
}

// bytesRead is what was read from a disk so far.
func bytesRead(t *testing.T, device string) int64 {
	t.Helper()
	stat, err := os.ReadFile("/sys/block/" + device + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	sectors, err := strconv.ParseInt(strings.Fields(string(stat))[2], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return sectors * sector
}

func waitUntil(t *testing.T, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}
