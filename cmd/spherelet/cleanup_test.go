package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A run directory that the configuration names may be anything, even /tmp.
func TestRunDirOfOthers(t *testing.T) {
	dir := t.TempDir()
	cfg := &v1alpha1.SphereletConfiguration{DataDir: "/nowhere", RunDir: dir}
	for _, name := range append(slices.Clone(runDirNames), "precious") {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := removeRunDir(cfg); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "precious" {
		t.Fatalf("left %v, %v", entries, err)
	}
	if err := os.Remove(filepath.Join(dir, "precious")); err != nil {
		t.Fatal(err)
	}
	if err := removeRunDir(cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the empty run directory is still there")
	}
}

// What the kubelet mounted goes; a disk that the user mounted for the images
// stays, and the way to the data directory may lead over a link.
func TestOnlyTheKubeletsMountsGo(t *testing.T) {
	base := t.TempDir()
	data := filepath.Join(base, "data")
	mount := func(rel string) string {
		dir := filepath.Join(data, rel)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("test", dir, "tmpfs", 0, ""); err != nil {
			t.Skipf("mount: %v", err)
		}
		t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
		return dir
	}
	users := mount("images")
	mount("kubelet")
	mount("kubelet/pods/x/volumes/secret")
	if err := os.Symlink(data, filepath.Join(base, "link")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := unmountKubelet(filepath.Join(base, "link", "kubelet")); err != nil {
			t.Fatal(err)
		}
	}
	left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(data))
	if err != nil || len(left) != 1 || left[0].Mountpoint != users {
		t.Errorf("left %v, %v", left, err)
	}
}
