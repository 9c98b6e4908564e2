package podinit

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func inode(t *testing.T, p string) uint64 {
	t.Helper()
	st, err := os.Stat(p)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Ino
}

func content(t *testing.T, p string) string {
	t.Helper()
	b, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestReplaceTree follows a ConfigMap and a plain file through updates.
func TestReplaceTree(t *testing.T) {
	base := t.TempDir()
	dir, stage := filepath.Join(base, "v"), filepath.Join(base, "stage")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(r io.Reader) {
		t.Helper()
		if err := replaceTree(dir, stage, r, 0); err != nil {
			t.Fatal(err)
		}
	}
	put(treeTar(t, "..1", map[string]string{"a": "one", "gone": "x"}, map[string]string{"plain": "old content"}))
	root, plain := inode(t, dir), inode(t, dir+"/plain")
	held, err := os.Open(dir + "/..data/a") // a reader in the middle of the old version
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	put(treeTar(t, "..2", map[string]string{"a": "two", "new": "n"}, map[string]string{"plain": "new"}))
	if got := content(t, dir+"/a") + content(t, dir+"/new") + content(t, dir+"/plain"); got != "twonnew" {
		t.Errorf("got %q", got)
	}
	if b, _ := io.ReadAll(held); string(b) != "one" {
		t.Errorf("the old version, still open, reads %q", b)
	}
	if inode(t, dir) != root || inode(t, dir+"/plain") != plain {
		t.Error("an inode that containers have mounted has changed")
	}
	for _, name := range []string{"gone", "..1", "..data_tmp"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is still there", name)
		}
	}
	put(treeTar(t, "..2", map[string]string{"a": "two", "new": "n"}, map[string]string{"plain": "new"})) // again: nothing changes
	if content(t, dir+"/a") != "two" {
		t.Error("repeating the update lost it")
	}
	if _, err := os.Lstat(stage); !os.IsNotExist(err) {
		t.Error("the stage is left")
	}
}

// TestReplaceTreeCutShort: whatever comes in half changes nothing.
func TestReplaceTreeCutShort(t *testing.T) {
	base := t.TempDir()
	dir, stage := filepath.Join(base, "v"), filepath.Join(base, "stage")
	os.Mkdir(dir, 0o755)
	if err := replaceTree(dir, stage, treeTar(t, "..1", map[string]string{"a": "one"}, nil), 0); err != nil {
		t.Fatal(err)
	}
	whole, _ := io.ReadAll(treeTar(t, "..2", map[string]string{"a": "two", "b": strings.Repeat("b", 5000)}, nil))
	for n := 0; n < len(whole)-1024; n += 300 {
		broken := io.MultiReader(bytes.NewReader(whole[:n]), brokenReader{})
		if err := replaceTree(dir, stage, broken, 0); err == nil {
			t.Fatalf("a tree cut at %d of %d was taken", n, len(whole))
		}
		if got, _ := os.Readlink(dir + "/..data"); got != "..1" || content(t, dir+"/a") != "one" {
			t.Fatalf("cut at %d: ..data is %q", n, got)
		}
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errdefs.ErrUnavailable }

func TestTreeStaysInside(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "v")
	os.Mkdir(dir, 0o755)
	outside := filepath.Join(base, "outside")
	os.WriteFile(outside, []byte("safe"), 0o644)
	for name, headers := range map[string][]tar.Header{
		"dots":            {{Name: "../outside", Typeflag: tar.TypeReg}},
		"through a link":  {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: base}, {Name: "l/outside", Typeflag: tar.TypeReg}},
		"hard link":       {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../outside"}},
		"device":          {{Name: "d", Typeflag: tar.TypeChar}},
		"absolute target": {{Name: "/../../outside", Typeflag: tar.TypeReg}},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			for _, h := range headers {
				h.Mode = 0o644
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
			}
			w.Close()
			err := replaceTree(dir, filepath.Join(base, "stage"), &b, 0)
			t.Log(err)
			if content(t, outside) != "safe" {
				t.Error("it wrote outside")
			}
		})
	}
}

func TestSubPath(t *testing.T) {
	root := t.TempDir()
	if err := unix.Chmod(root, 0o2775); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll(root+"/..1", 0o755)
	os.WriteFile(root+"/..1/key", []byte("v"), 0o644)
	os.Symlink("..1", root+"/..data")
	os.Symlink("..data/key", root+"/key")
	os.Symlink("/etc", root+"/abs")
	os.Symlink("../..", root+"/up")
	os.Symlink("loop", root+"/loop")
	for sub, ok := range map[string]bool{
		"key": true, "a": true, "a/b/c": true, "..1": true, "./a": true,
		"abs": false, "abs/passwd": false, "up/x": false, "..": false, "../x": false, "a/../../x": false, "loop": false, "key/below": false,
	} {
		f, err := openSubPath(root, sub)
		if (err == nil) != ok {
			t.Errorf("%s: %v", sub, err)
		}
		if err == nil {
			f.Close()
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(root+"/a/b/c", &st); err != nil || st.Mode&0o7777 != 0o2775 {
		t.Errorf("a made directory has mode %o, %v", st.Mode&0o7777, err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(root), "x")); err == nil {
		t.Error("a directory was made outside")
	}
}

func TestOpenInRoot(t *testing.T) {
	root := t.TempDir()
	os.MkdirAll(root+"/etc", 0o755)
	os.WriteFile(root+"/etc/passwd", []byte("inside"), 0o644)
	os.Symlink("/etc/passwd", root+"/abs")
	os.Symlink("../../../../etc/passwd", root+"/up")
	os.Symlink("/proc/self/root/etc/passwd", root+"/proc")
	unix.Mkfifo(root+"/fifo", 0o644)
	for p, want := range map[string]string{"/etc/passwd": "inside", "/abs": "inside", "/up": "inside", "/../../etc/passwd": "inside"} {
		f, err := openInRoot(root, p)
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		if b, _ := io.ReadAll(f); string(b) != want {
			t.Errorf("%s: %q", p, b)
		}
		f.Close()
	}
	for _, p := range []string{"/proc", "/etc", "/fifo", "/none", "/etc/passwd/x"} {
		if f, err := openInRoot(root, p); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v, %v", p, f, err)
		}
	}
}

func TestLocate(t *testing.T) {
	c := &container{root: "/r", binds: []bind{{source: "/v/a", destination: "/data"}, {source: "/v/b", destination: "/data/deep/"}, {source: "/t", destination: "/dev/termination-log"}}}
	for p, want := range map[string]string{
		"/x": "/r /x", "/data": "/v/a ", "/data/f": "/v/a /f", "/data/deep/f": "/v/b /f", "/database": "/r /database",
		"/dev/termination-log": "/t ", "relative": "/r /relative", "/data/../x": "/r /x",
	} {
		if root, rel := c.locate(p); root+" "+rel != want {
			t.Errorf("%s: %q %q, want %q", p, root, rel, want)
		}
	}
}

func TestSmallParsers(t *testing.T) {
	for list, want := range map[string]int{"0": 1, "0-3": 4, "0-3,5,7-8": 7, "": 0} {
		if got := countRanges(list); got != want {
			t.Errorf("%q: %d", list, got)
		}
	}
	for name, want := range map[string]string{
		"net.ipv4.ip_forward": "net/ipv4/ip_forward", "net/ipv4/conf/eth0.1/x": "net/ipv4/conf/eth0.1/x", "net.ipv4.conf.eth0/1.x": "net/ipv4/conf/eth0.1/x",
	} {
		if got := sysctlPath(name); got != want {
			t.Errorf("%s: %s", name, got)
		}
	}
	dir := t.TempDir()
	os.MkdirAll(dir+"/vda", 0o755)
	os.MkdirAll(dir+"/sda/device", 0o755)
	os.WriteFile(dir+"/vda/serial", []byte("img-1\n"), 0o644)
	os.WriteFile(dir+"/sda/device/vpd_pg80", []byte("\x00\x80\x00\x05img-2"), 0o644)
	for serial, want := range map[string]string{"img-1": "vda", "img-2": "sda", "img": ""} {
		if got := diskBySerial(dir, serial); got != want {
			t.Errorf("%s: %q", serial, got)
		}
	}
	if err := checkID("x", "../y"); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

func TestWalkUsage(t *testing.T) {
	dir := t.TempDir()
	os.WriteFile(dir+"/a", make([]byte, 100_000), 0o644)
	os.Link(dir+"/a", dir+"/b")
	os.Symlink("/", dir+"/root")
	bytes, inodes := walkUsage(dir)
	if bytes < 100_000 || bytes > 200_000 || inodes != 3 {
		t.Errorf("%d bytes, %d inodes", bytes, inodes)
	}
}
