package hostnet

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
}

func TestNamespaceLifecycle(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("atoll-test-%d", os.Getpid())
	t.Cleanup(func() { _ = Remove(name) })
	for i, want := range []bool{true, false} {
		made, err := Ensure(name)
		if err != nil || made != want {
			t.Fatalf("Ensure #%d = %v, %v; want %v", i+1, made, err, want)
		}
	}
	// A listener made inside is reached from inside and not from here.
	var l net.Listener
	err := Do(Path(name), func() (err error) {
		l, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := Dialer(Path(name))(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatalf("dial from inside: %v", err)
	}
	conn.Close()
	if conn, err := Dialer("")(t.Context(), "tcp", l.Addr().String()); err == nil {
		conn.Close()
		t.Error("reached from outside")
	}
	for range 2 {
		if err := Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := Exists(name); ok || err != nil {
		t.Errorf("Exists after Remove = %v, %v", ok, err)
	}
}

// TestRemoveBeneath has something mounted on a file, and then the directory on
// itself, as ip-netns(8) does where that is not shared.
func TestRemoveBeneath(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "netns")
	path := filepath.Join(dir, "name")
	if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil || unix.Unmount(path, unix.MNT_DETACH) == nil {
		}
	})
	for _, m := range [][2]string{{"/proc/self/ns/net", path}, {dir, dir}} {
		if err := unix.Mount(m[0], m[1], "none", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(path); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("remove what is mounted on, out of sight: %v", err)
	}
	if err := removeBeneath(path); err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), path) {
		t.Errorf("still mounted (%v):\n%s", err, mounts)
	}
}

// TestShareDirectory wants namespaces to stay where they can be seen.
func TestShareDirectory(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "netns")
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	for range 2 {
		if err := shareDirectory(dir); err != nil {
			t.Fatal(err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if n := strings.Count(string(mounts), " "+dir+" "); err != nil || n != 1 {
		t.Errorf("mounted %d times, want once (%v)", n, err)
	}
}

func TestEnsureReplacesAStaleFile(t *testing.T) {
	needRoot(t)
	name := fmt.Sprintf("atoll-stale-%d", os.Getpid())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(Path(name), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Remove(name) })
	if made, err := Ensure(name); err != nil || !made {
		t.Fatalf("Ensure = %v, %v; want true", made, err)
	}
}

func TestDoWithoutNamespace(t *testing.T) {
	err := Do(Path("atoll-no-such"), func() error { t.Error("ran"); return nil })
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("err = %v, want fs.ErrNotExist", err)
	}
}
