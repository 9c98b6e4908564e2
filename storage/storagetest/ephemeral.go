// Package storagetest judges implementations of storage's interfaces.
package storagetest

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

// Ephemeral is what every storage.Ephemeral must do. The implementation given
// must hold no disks.
func Ephemeral(t *testing.T, e storage.Ephemeral) {
	const key, size = "5d2f6c0e-0001-4000-8000-000000000001", 64 << 20
	ctx := t.Context()

	path, err := e.Create(ctx, key, size)
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() != size {
		t.Errorf("a disk of %d bytes, want %d", fi.Size(), size)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		t.Errorf("mode %v: others must not read a pod's disk", fi.Mode())
	}
	out, err := exec.Command("/sbin/dumpe2fs", "-h", path).CombinedOutput()
	if err != nil {
		t.Fatalf("dumpe2fs: %v\n%s", err, out)
	}
	for _, want := range []string{"Filesystem volume name:   atoll-eph\n", "Filesystem state:         clean\n"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("dumpe2fs does not say %q:\n%s", want, out)
		}
	}
	if strings.Contains(string(out), "has_journal") {
		t.Error("the disk has a journal")
	}

	again, err := e.Create(ctx, key, 2*size)
	if err != nil || again != path {
		t.Errorf("a second Create = %q, %v; want the disk that is there", again, err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Size() != size {
		t.Errorf("a second Create changed the disk: %v, %v", fi, err)
	}
	usage, err := e.Usage(ctx, key)
	if err != nil || usage.CapacityBytes != size || usage.Bytes == 0 || usage.Bytes > size/4 || usage.AvailableBytes == 0 {
		t.Errorf("Usage = %+v, %v; want a sparse disk of %d bytes", usage, err, size)
	}

	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := e.Create(ctx, "another", size); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	keys, err := e.List(ctx)
	slices.Sort(keys)
	if err != nil || !slices.Equal(keys, []string{key, "another"}) {
		t.Errorf("List = %q, %v", keys, err)
	}
	for _, k := range []string{key, key, "another", "never-was"} {
		if err := e.Remove(ctx, k); err != nil {
			t.Errorf("Remove(%q) = %v", k, err)
		}
	}
	if keys, err := e.List(ctx); err != nil || len(keys) != 0 {
		t.Errorf("List after Remove = %q, %v", keys, err)
	}
	if _, err := e.Usage(ctx, key); !errdefs.IsNotFound(err) {
		t.Errorf("Usage after Remove: %v, want ErrNotFound", err)
	}

	for _, bad := range []string{"", "..", "a/b", "../x", ".hidden", "x\x00y"} {
		if _, err := e.Create(ctx, bad, size); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Create(%q) = %v, want ErrInvalidArgument", bad, err)
		}
	}
	for _, bad := range []int64{0, -1, 1 << 62} {
		if _, err := e.Create(ctx, "size", bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Create of %d bytes = %v, want ErrInvalidArgument", bad, err)
		}
	}
}
