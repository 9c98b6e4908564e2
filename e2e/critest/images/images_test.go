package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestArchive(t *testing.T) {
	root := t.TempDir()
	for _, err := range []error{
		write(filepath.Join(root, "bin/a"), "a"), os.Link(filepath.Join(root, "bin/a"), filepath.Join(root, "bin/b")),
		os.Symlink("a", filepath.Join(root, "bin/c")), os.Chmod(filepath.Join(root, "bin/a"), 0o755|os.ModeSetuid),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	data, err := archive(root)
	if err != nil {
		t.Fatal(err)
	}
	again, err := archive(root)
	if err != nil || !bytes.Equal(data, again) {
		t.Errorf("not the same twice: %v", err)
	}
	var got []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, h.Name+string(h.Typeflag)+h.Linkname)
		if h.Name == "bin/a" && h.Mode != 0o4755 {
			t.Errorf("bin/a has mode %o", h.Mode)
		}
	}
	if want := []string{"bin/5", "bin/a0", "bin/b1bin/a", "bin/c2a"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestNamesAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, im := range images() {
		for _, name := range im.names {
			if seen[name] {
				t.Errorf("%s is there twice", name)
			}
			seen[name] = true
		}
	}
	if !seen[DigestName] {
		t.Errorf("no %s", DigestName)
	}
}
