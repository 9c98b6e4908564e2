package local

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestClass(t *testing.T) {
	const mib, gib = 1 << 20, 1 << 30
	for _, tt := range []struct{ bytes, want int64 }{
		{1, 16 * mib},
		{16 * mib, 16 * mib},
		{16*mib + 1, 20 * mib},
		{64 * mib, 64 * mib},
		{65 * mib, 80 * mib},
		{364 * mib, 384 * mib},
		{10 * gib, 10 * gib},
		{11 * gib, 12 * gib},
		{16 << 40, 16 << 40},
	} {
		if got := class(tt.bytes); got != tt.want {
			t.Errorf("class(%d) = %d, want %d", tt.bytes, got, tt.want)
		}
	}
	for size := int64(minBytes); size < 16<<40; size = class(size + 1) {
		if class(size) != size || class(size-1) > size || class(size+1) > size+size/4 {
			t.Errorf("size %d: class of it %d, of a byte more %d", size, class(size), class(size+1))
		}
	}
}

func open(t testing.TB, c Config) *Ephemeral {
	t.Helper()
	e, err := NewEphemeral(c)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func create(t testing.TB, e *Ephemeral, key string, bytes int64) string {
	t.Helper()
	path, err := e.Create(t.Context(), key, bytes)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// clean has e2fsck say whether the file system is.
func clean(t testing.TB, path string) {
	t.Helper()
	if out, err := exec.Command("/sbin/e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck of %s: %v\n%s", path, err, out)
	}
}

// header is a field of what dumpe2fs says.
func header(t testing.TB, path, field string) string {
	t.Helper()
	out, err := exec.Command("/sbin/dumpe2fs", "-h", path).CombinedOutput()
	if err != nil {
		t.Fatalf("dumpe2fs: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if name, value, ok := strings.Cut(line, ":"); ok && name == field {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("dumpe2fs says nothing of %q:\n%s", field, out)
	return ""
}

func mastersOf(t testing.TB, dir string) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, mastersDir, "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestDisksDifferAndAreClean(t *testing.T) {
	for _, quota := range []bool{false, true} {
		for _, size := range []int64{16 << 20, 64 << 20, 10 << 30} {
			e := open(t, Config{Dir: t.TempDir(), Quota: quota})
			a, b := create(t, e, "a", size), create(t, e, "b", size)
			clean(t, a)
			clean(t, b)
			for _, field := range []string{"Filesystem UUID", "Directory Hash Seed"} {
				if x, y := header(t, a, field), header(t, b, field); x == y {
					t.Errorf("both have %s %s", field, x)
				}
			}
			if got := strings.Contains(header(t, a, "Filesystem features"), "project"); got != quota {
				t.Errorf("the file system has projects: %v, want %v", got, quota)
			}
			if n := len(mastersOf(t, e.dir)); n != 1 {
				t.Errorf("%d masters, want 1", n)
			}
			usage, err := e.Usage(t.Context(), "b")
			if limit := max(512<<10, uint64(size)>>16); err != nil || usage.Bytes > limit {
				t.Errorf("a disk of %d bytes takes %d, %v; want at most %d", size, usage.Bytes, err, limit)
			}
		}
	}
}

// No process is started for a disk whose size has a master: mkfs is taken away.
func TestMastersSaveMkfs(t *testing.T) {
	e := open(t, Config{Dir: t.TempDir()})
	if err := e.MakeMasters(t.Context(), 96<<30); err != nil {
		t.Fatal(err)
	}
	e.masters.mkfs = "/bin/false"
	for _, size := range []int64{1 << 20, 65 << 20, 364 << 20, 10 << 30, 63 << 30, 64 << 30, 90 << 30} {
		if _, err := e.Create(t.Context(), "x", size); (err != nil) != (size == 1<<20) {
			t.Errorf("disk of %d bytes: %v", size, err)
		}
		if err := e.Remove(t.Context(), "x"); err != nil {
			t.Error(err)
		}
	}
}

func TestDamagedMasterIsMadeAnew(t *testing.T) {
	dir := t.TempDir()
	for name, damage := range map[string]func(path string) error{
		"a flipped bit": func(path string) error { return flip(path, 8*4096+17) },
		"cut":           func(path string) error { return os.Truncate(path, 1<<20) },
		"emptied":       func(path string) error { return os.Truncate(path, 0) },
		"holes":         punch,
		"gone":          os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			e := open(t, Config{Dir: dir})
			create(t, e, "first", 64<<20)
			before := mastersOf(t, dir)
			if len(before) != 1 {
				t.Fatalf("masters: %q", before)
			}
			if err := damage(before[0]); err != nil {
				t.Fatal(err)
			}
			clean(t, create(t, e, "second", 64<<20))
			if after := mastersOf(t, dir); len(after) != 1 || name != "gone" && after[0] == before[0] {
				t.Errorf("masters were %q, are %q", before, after)
			}
			for _, key := range []string{"first", "second"} {
				if err := e.Remove(t.Context(), key); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func flip(path string, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		return err
	}
	b[0] ^= 4
	_, err = f.WriteAt(b, at)
	return err
}

func punch(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20)
}

// Masters of another mkfs, or of other options, are not used, and go.
func TestMastersHaveAVersion(t *testing.T) {
	dir := t.TempDir()
	create(t, open(t, Config{Dir: dir}), "without", 64<<20)
	old := mastersOf(t, dir)
	e := open(t, Config{Dir: dir, Quota: true})
	if path := create(t, e, "with", 64<<20); !strings.Contains(header(t, path, "Filesystem features"), "quota") {
		t.Error("the disk was copied from the other version's master")
	}
	if err := e.MakeMasters(t.Context(), 64<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(old[0]); !os.IsNotExist(err) {
		t.Errorf("the master of another version is still there: %v", err)
	}
}

func TestHalfMadeMastersAreErased(t *testing.T) {
	dir := t.TempDir()
	e := open(t, Config{Dir: dir})
	create(t, e, "x", 64<<20)
	half := filepath.Join(filepath.Dir(mastersOf(t, dir)[0]), tempPrefix+"67108864")
	if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, Config{Dir: dir})
	if left := mastersOf(t, dir); len(left) != 1 {
		t.Errorf("masters: %q", left)
	}
}

// A pod that is given up while its master is made does not take it from those
// who wait beside it.
func TestWaitersOutliveTheMaker(t *testing.T) {
	e := open(t, Config{Dir: t.TempDir()})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Create(ctx, "given-up", 64<<20); err == nil {
		t.Log("the disk was made before anybody looked") // not wrong
	}
	clean(t, create(t, e, "waits", 64<<20))
}

// Where the host shares blocks, a disk is the master's but for its superblock.
func TestReflink(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.xfs")
	if err != nil {
		t.Skip("needs mkfs.xfs (apt-get install xfsprogs)")
	}
	dir := t.TempDir()
	disk, mnt := filepath.Join(dir, "xfs"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 512<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.xfs: %v\n%s", err, out)
	}
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mount", "-o", "loop", disk, mnt).CombinedOutput(); err != nil {
		if os.Getuid() != 0 {
			t.Skip("mounting needs root")
		}
		// If there is a module, the attempt has had it loaded.
		if kinds, err := os.ReadFile("/proc/filesystems"); err == nil && !bytes.Contains(kinds, []byte("\txfs\n")) {
			t.Skip("this kernel has no XFS")
		}
		t.Fatalf("mounting XFS: %v: %s", err, bytes.TrimSpace(out))
	}
	t.Cleanup(func() { _ = unix.Unmount(mnt, 0) })
	e := open(t, Config{Dir: mnt, Quota: true})
	a, b := create(t, e, "a", 10<<30), create(t, e, "b", 10<<30)
	if e.masters.noClones.Load() {
		t.Error("the disks were copied, not cloned")
	}
	clean(t, a)
	clean(t, b)
	if header(t, a, "Filesystem UUID") == header(t, b, "Filesystem UUID") {
		t.Error("both disks have one UUID")
	}
}

// The first disk of a size on a full disk: the master is what fails.
func TestMasterOnFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=9m"); err != nil {
		t.Skipf("mounting needs root: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	e := open(t, Config{Dir: dir})
	if err := e.MakeMasters(t.Context(), 1<<30); !errdefs.IsResourceExhausted(err) {
		t.Errorf("MakeMasters = %v, want ErrResourceExhausted", err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, mastersDir, "*", tempPrefix+"*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
