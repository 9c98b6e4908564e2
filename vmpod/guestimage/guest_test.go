package guestimage

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func writeFiles(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestLoadNamesTheFileAndTheCure(t *testing.T) {
	good := `{"kernel":"6.1.0-1-cloud-amd64","flavour":"stock","hash":"abc","cmdlineExtra":"x"}`
	for name, c := range map[string]struct {
		files map[string]string
		names string
		class func(error) bool
	}{
		"nothing":      {nil, "guest.json", errdefs.IsNotFound},
		"damaged":      {map[string]string{"guest.json": "{"}, "guest.json", errdefs.IsFailedPrecondition},
		"empty record": {map[string]string{"guest.json": "{}"}, "guest.json", errdefs.IsFailedPrecondition},
		"no kernel":    {map[string]string{"guest.json": good, "initramfs": "i"}, "vmlinuz", errdefs.IsNotFound},
		"empty initrd": {map[string]string{"guest.json": good, "vmlinuz": "k", "initramfs": ""}, "initramfs", errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeFiles(t, dir, c.files)
			_, err := Load(dir)
			if !c.class(err) {
				t.Fatalf("class of %v", err)
			}
			for _, want := range []string{filepath.Join(dir, c.names), "make guest"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q does not say %q", err, want)
				}
			}
		})
	}
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{"guest.json": good, "vmlinuz": "k", "initramfs": "i"})
	g, err := Load(dir)
	want := Guest{Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initramfs"), KernelRelease: "6.1.0-1-cloud-amd64", Flavour: "stock", Cmdline: "x", Hash: "abc"}
	if err != nil || g != want {
		t.Errorf("got %+v, %v", g, err)
	}
}

func TestModuleLoadOrder(t *testing.T) {
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{
		"modules.builtin": "kernel/fs/ext4/ext4.ko\nkernel/net/packet/af_packet.ko\n",
		"modules.dep": "kernel/v/virtio_pci.ko.xz: kernel/v/pci-lib.ko.xz kernel/v/virtio.ko.xz kernel/v/virtio_ring.ko.xz\n" +
			"kernel/v/virtio.ko.xz: kernel/v/virtio_ring.ko.xz\n" +
			"kernel/v/virtio_ring.ko.xz:\nkernel/v/pci-lib.ko.xz:\n" +
			"kernel/v/virtio_blk.ko.xz: kernel/v/virtio.ko.xz kernel/v/virtio_ring.ko.xz\n",
	})
	tree, err := openModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	got, err := tree.loadOrder([]string{"ext4", "virtio-pci", "virtio_blk", "pvpanic-pci"})
	want := []string{"kernel/v/virtio_ring.ko.xz", "kernel/v/virtio.ko.xz", "kernel/v/pci-lib.ko.xz", "kernel/v/virtio_pci.ko.xz", "kernel/v/virtio_blk.ko.xz"}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	if _, err := tree.loadOrder([]string{"erofs"}); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "erofs") {
		t.Errorf("a needed module that is missing: %v", err)
	}
}

func TestWithoutSignature(t *testing.T) {
	trailer := make([]byte, 12)
	binary.BigEndian.PutUint32(trailer[8:], 5)
	signed := append(append([]byte("module"), "12345"...), append(trailer, signatureMagic...)...)
	if got := withoutSignature(signed); string(got) != "module" {
		t.Errorf("got %q", got)
	}
	for _, plain := range []string{"", "module", string(signatureMagic)} {
		if got := withoutSignature([]byte(plain)); string(got) != plain {
			t.Errorf("%q became %q", plain, got)
		}
	}
	binary.BigEndian.PutUint32(trailer[8:], 1<<31)
	lying := append(append([]byte("module"), trailer...), signatureMagic...)
	if got := withoutSignature(lying); !bytes.Equal(got, lying) {
		t.Errorf("a wrong length gave %q", got)
	}
}

func TestFindKernel(t *testing.T) {
	root := t.TempDir()
	boot, modules, tuned := filepath.Join(root, "boot"), filepath.Join(root, "modules"), filepath.Join(root, "tuned")
	if _, err := findKernel("auto", tuned, boot, modules); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "apt-get install linux-image-cloud-amd64") {
		t.Fatalf("no kernel at all: %v", err)
	}
	writeFiles(t, root, map[string]string{
		"boot/vmlinuz-6.9.0-1-amd64":        "k",
		"modules/6.9.0-1-amd64/modules.dep": "",
	})
	release := func(flavour, want string) {
		t.Helper()
		k, err := findKernel(flavour, tuned, boot, modules)
		if err != nil || k.release != want {
			t.Errorf("%s: got %q, %v, want %q", flavour, k.release, err, want)
		}
	}
	release("stock", "6.9.0-1-amd64")
	writeFiles(t, root, map[string]string{
		"boot/vmlinuz-6.1.0-9-cloud-amd64":         "k",
		"boot/vmlinuz-6.1.0-10-cloud-amd64":        "k",
		"boot/vmlinuz-6.1.0-11-cloud-amd64":        "k without modules",
		"modules/6.1.0-9-cloud-amd64/modules.dep":  "",
		"modules/6.1.0-10-cloud-amd64/modules.dep": "",
	})
	release("", "6.1.0-10-cloud-amd64")
	stale, _ := json.Marshal(kernelRecord{Release: "6.1.200-podvm", Fragment: "another"})
	fresh, _ := json.Marshal(kernelRecord{Release: "6.1.100-podvm", Fragment: FragmentHash()})
	writeFiles(t, root, map[string]string{"tuned/a/kernel.json": string(stale), "tuned/a/vmlinux": "k"})
	release("auto", "6.1.0-10-cloud-amd64")
	if _, err := findKernel("tuned", tuned, boot, modules); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "make guest-kernel") {
		t.Errorf("only a stale tuned kernel: %v", err)
	}
	writeFiles(t, root, map[string]string{"tuned/b/kernel.json": string(fresh), "tuned/b/vmlinux": "k"})
	release("auto", "6.1.100-podvm")
	release("stock", "6.1.0-10-cloud-amd64")
	if _, err := findKernel("fast", tuned, boot, modules); !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown flavour: %v", err)
	}
}

func TestBootableLeavesWhatItDoesNotKnow(t *testing.T) {
	header := make([]byte, 0x400)
	copy(header[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(header[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(header[0x248:], 0xfffffff0)
	binary.LittleEndian.PutUint32(header[0x24c:], 0xfffffff0)
	for name, image := range map[string][]byte{
		"empty": {}, "short": []byte("MZ"), "lying header": header, "ELF without a note": []byte("\x7fELF"),
	} {
		if got := bootable(image); !bytes.Equal(got, image) {
			t.Errorf("%s: changed", name)
		}
	}
}

func TestCPIO(t *testing.T) {
	entries := []entry{
		{path: "/b/c/file", mode: modeFile | 0o644, data: []byte("hello")},
		{path: "/tmp", mode: modeDir | 0o1777},
		{path: "/dev/console", mode: modeChar | 0o600, major: 5, minor: 1},
		{path: "/link", mode: modeSymlink | 0o777, data: []byte("b/c/file")},
	}
	a, err := writeCPIO(entries)
	if err != nil {
		t.Fatal(err)
	}
	entries[0], entries[3] = entries[3], entries[0]
	if b, err := writeCPIO(entries); err != nil || !bytes.Equal(a, b) {
		t.Error("the order of the entries shows in the archive")
	}
	for _, bad := range []string{"relative", "/a/../b", "/"} {
		if _, err := writeCPIO([]entry{{path: bad, mode: modeFile}}); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	if _, err := writeCPIO([]entry{{path: "/a", mode: modeFile}, {path: "/a", mode: modeFile}}); err == nil {
		t.Error("a file twice was accepted")
	}
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("cpio is not installed")
	}
	cmd := exec.CommandContext(t.Context(), "cpio", "-tv", "--quiet", "-n")
	cmd.Stdin = bytes.NewReader(a)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	var got []string
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		f := strings.Fields(line)
		got = append(got, f[0]+" "+f[len(f)-1])
	}
	want := []string{"drwxr-xr-x b", "drwxr-xr-x b/c", "-rw-r--r-- b/c/file", "drwxr-xr-x dev", "crw------- dev/console", "lrwxrwxrwx b/c/file", "drwxrwxrwt tmp"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q", got)
	}
}

func TestBuildTwiceDoesNothing(t *testing.T) {
	if _, err := findStock("/boot", "/lib/modules"); err != nil {
		t.Skip(err)
	}
	if _, err := exec.LookPath("crun"); err != nil {
		t.Skip(err)
	}
	o := Options{Out: t.TempDir(), Kernel: FlavourStock, Podinit: "/bin/busybox"}
	if err := requireStatic(o.Podinit); err != nil {
		t.Skip(err)
	}
	first, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	inode := func() os.FileInfo {
		st, err := os.Stat(first.Initrd)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	before := inode()
	if again, err := Build(t.Context(), o); err != nil || again != first || !os.SameFile(before, inode()) {
		t.Errorf("the second build gave %+v, %v", again, err)
	}
	if err := os.Remove(first.Initrd); err != nil {
		t.Fatal(err)
	}
	if again, err := Build(t.Context(), o); err != nil || again != first {
		t.Errorf("after a file was lost: %+v, %v", again, err)
	}
	o.Podinit = "/bin/bash"
	if err := requireStatic(o.Podinit); err == nil {
		t.Skip("bash is static here")
	}
	if _, err := Build(t.Context(), o); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("a dynamic /init: %v", err)
	}
	o.Podinit = filepath.Join(t.TempDir(), "podinit")
	if _, err := Build(t.Context(), o); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), o.Podinit) {
		t.Errorf("no /init: %v", err)
	}
}

func TestSharedLibraries(t *testing.T) {
	file, err := exec.LookPath("crun")
	if err != nil {
		t.Skip(err)
	}
	ldd, err := exec.CommandContext(t.Context(), "ldd", file).Output()
	if err != nil {
		t.Skip(err)
	}
	interp, libs, err := sharedLibraries(file, librarySearchPath("/"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(ldd), interp) {
		t.Errorf("loader %q is not in\n%s", interp, ldd)
	}
	for _, l := range libs {
		if !strings.Contains(string(ldd), l.soname) {
			t.Errorf("%s is not in\n%s", l.soname, ldd)
		}
	}
	for _, line := range strings.Split(string(ldd), "\n") {
		soname, _, ok := strings.Cut(strings.TrimSpace(line), " => ")
		if !ok {
			continue
		}
		found := false
		for _, l := range libs {
			found = found || l.soname == soname
		}
		if !found {
			t.Errorf("%s is missing", soname)
		}
	}
}

func TestQuotaIsWhatTheKernelHas(t *testing.T) {
	module := []entry{{path: "/modules/03-quota_tree.ko"}, {path: "/modules/04-quota_v2.ko"}}
	for _, tt := range []struct {
		name, config string
		image        []entry
		want         bool
	}{
		{"built in", "CONFIG_QUOTA=y\nCONFIG_QFMT_V2=y\n", nil, true},
		{"a module", "CONFIG_QUOTA=y\nCONFIG_QFMT_V2=m\n", module, true},
		{"a module that is missing", "CONFIG_QUOTA=y\nCONFIG_QFMT_V2=m\n", nil, false},
		{"another format", "CONFIG_QUOTA=y\nCONFIG_QFMT_V1=y\n# CONFIG_QFMT_V2 is not set\n", module, false},
		{"none", "# CONFIG_QUOTA is not set\n", module, false},
	} {
		file := filepath.Join(t.TempDir(), "config")
		if err := os.WriteFile(file, []byte(tt.config), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := (kernel{config: file}).quota(tt.image); got != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, got, tt.want)
		}
	}
	if (kernel{config: "/no/such/file"}).quota(module) {
		t.Error("a kernel without a configuration has quotas")
	}
}
