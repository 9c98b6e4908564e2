package main

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage/image"
	"github.com/openatoll/atoll/storage/treesum"
	"github.com/openatoll/atoll/supervisor/registry"
)

// TestDemoImages goes the way of every demo image: built, seeded into the
// registry, pulled by its name through hosts.toml, made a disk, and mounted
// by this host's kernel, where it must be what was expected and what tar -x
// makes of the layers, byte by byte and mode by mode.
func TestDemoImages(t *testing.T) {
	out := filepath.Join(t.TempDir(), "images")
	if err := run(out, "", false); err != nil {
		t.Fatal(err)
	}
	store := openStore(t, serveSeeds(t, out))
	for _, name := range []string{"web", "busybox", "pause", "tree"} {
		t.Run(name, func(t *testing.T) {
			img, err := store.Pull(t.Context(), "atoll.local/"+name, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			disk, err := store.Disk(t.Context(), img.ID, "test")
			if err != nil {
				t.Fatal(err)
			}
			raw := filepath.Join(t.TempDir(), "raw")
			if msg, err := exec.Command("qemu-img", "convert", "-f", disk.Format, "-O", "raw", disk.Path, raw).CombinedOutput(); err != nil {
				t.Fatalf("qemu-img: %v\n%s", err, msg)
			}
			want := readExpected(t, filepath.Join(out, "expected", name+".jsonl"))
			same(t, "the mounted disk", want, sum(t, mount(t, raw)))
			// The layers say nothing of the root, and an untarred "/" has
			// this moment's time, as have directories that whiteouts are in.
			untarred := sum(t, untar(t, out, name))
			untarred[0] = want[0]
			for i := range min(len(want), len(untarred)) {
				if want[i].Type == "dir" && name == "tree" {
					untarred[i].Mtime = want[i].Mtime
				}
			}
			same(t, "tar -x", want, untarred)
		})
	}
}

func TestImagesCanBeReproduced(t *testing.T) {
	dir := t.TempDir()
	for _, out := range []string{"a", "b"} {
		if err := run(filepath.Join(dir, out), "", true); err != nil {
			t.Fatal(err)
		}
	}
	if diff, err := exec.Command("diff", "-r", filepath.Join(dir, "a"), filepath.Join(dir, "b")).CombinedOutput(); err != nil {
		t.Errorf("two builds differ: %v\n%s", err, diff)
	}
}

// serveSeeds serves the layout and returns a directory with the hosts.toml.
func serveSeeds(t *testing.T, layout string) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	config := registry.Config{Dir: t.TempDir(), Listener: l, Seeds: []string{layout}}
	done := make(chan error, 1)
	go func() { done <- registry.Serve(ctx, config) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	hosts := t.TempDir()
	if err := registry.WriteHosts(hosts, "atoll.local", "http://"+l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	return hosts
}

func openStore(t *testing.T, hosts string) *image.Store {
	store, err := image.Open(t.Context(), image.Config{Root: t.TempDir(), HostsDir: hosts, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

// mount has the kernel mount an image disk, if it can.
func mount(t *testing.T, disk string) string {
	kinds, err := os.ReadFile("/proc/filesystems")
	if err != nil || !bytes.Contains(kinds, []byte("\terofs\n")) || os.Getuid() != 0 {
		t.Skip("this host cannot mount EROFS")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "loop,ro", disk, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// untar unpacks the layers of a layout's image with tar.
func untar(t *testing.T, out, name string) string {
	path, err := layout.FromPath(out)
	if err != nil {
		t.Fatal(err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, desc := range manifest.Manifests {
		if desc.Annotations["org.opencontainers.image.ref.name"] != "atoll.local/"+name+":latest" {
			continue
		}
		img, err := index.Image(desc.Digest)
		if err != nil {
			t.Fatal(err)
		}
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range layers {
			r, err := l.Uncompressed()
			if err != nil {
				t.Fatal(err)
			}
			whiteOut(t, dir, l)
			cmd := exec.Command("tar", "-x", "--exclude=.wh.*", "--delay-directory-restore", "--xattrs", "--xattrs-include=*", "--same-owner", "--numeric-owner", "-p", "-C", dir)
			cmd.Stdin = r
			if msg, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("tar: %v\n%s", err, msg)
			}
			r.Close()
		}
	}
	return dir
}

// whiteOut removes from dir what a layer hides of those below it, and what it
// has as another type: tar knows nothing of that.
func whiteOut(t *testing.T, dir string, l v1.Layer) {
	r, err := l.Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for tr := tar.NewReader(r); ; {
		hdr, err := tr.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		parent, base := filepath.Split(filepath.Join(dir, hdr.Name))
		gone := filepath.Join(parent, strings.TrimPrefix(base, ".wh."))
		switch old, err := os.Lstat(gone); {
		case base == ".wh..wh..opq":
			entries, _ := os.ReadDir(parent)
			for _, e := range entries {
				if err := os.RemoveAll(filepath.Join(parent, e.Name())); err != nil {
					t.Fatal(err)
				}
			}
		case err == nil && (strings.HasPrefix(base, ".wh.") || old.IsDir() != (hdr.Typeflag == tar.TypeDir)):
			if err := os.RemoveAll(gone); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func sum(t *testing.T, dir string) []treesum.Entry {
	entries, err := treesum.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func readExpected(t *testing.T, path string) []treesum.Entry {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	entries, err := treesum.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

func same(t *testing.T, what string, want, got []treesum.Entry) {
	t.Helper()
	for _, d := range treesum.Diff(want, got, 20) {
		t.Errorf("%s: %s", what, d)
	}
}
