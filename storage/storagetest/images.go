package storagetest

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/storage"
)

// An ImagesFixture is what Images needs from a registry.
type ImagesFixture struct {
	// Ref is a full reference by tag of an image that can be pulled.
	Ref string
	// Missing is one that the registry does not have.
	Missing string
	// Check looks into the disk of the image.
	Check func(t *testing.T, path string)
}

// Images is what every storage.Images must do. The implementation given must
// hold no images.
func Images(t *testing.T, s storage.Images, f ImagesFixture) {
	ctx := t.Context()
	if _, err := s.Get(ctx, f.Ref); !errdefs.IsNotFound(err) {
		t.Fatalf("Get before Pull = %v, want ErrNotFound", err)
	}
	if _, err := s.Pull(ctx, f.Missing, nil, nil); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), f.Missing) {
		t.Errorf("Pull of a missing image = %v, want ErrNotFound that names it", err)
	}
	for _, bad := range []string{"", "UPPER", "a b", "x:y:z", "x@sha256:12"} {
		if _, err := s.Pull(ctx, bad, nil, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Pull(%q) = %v, want ErrInvalidArgument", bad, err)
		}
	}

	var mu sync.Mutex
	var stages []string
	img, err := s.Pull(ctx, f.Ref, nil, func(p storage.Progress) {
		mu.Lock()
		defer mu.Unlock()
		if len(stages) == 0 || stages[len(stages)-1] != p.Stage {
			stages = append(stages, p.Stage)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"resolving", "fetching", "converting", "done"}; !slices.Equal(stages, want) {
		t.Errorf("stages %q, want %q", stages, want)
	}
	if !slices.Equal(img.Tags, []string{f.Ref}) || len(img.Digests) != 1 || img.Size <= 0 || img.Config.OS != "linux" {
		t.Errorf("Pull = %+v", img)
	}
	for _, ref := range []string{f.Ref, img.ID, strings.TrimPrefix(img.ID, "sha256:"), img.ID[:20], img.Digests[0]} {
		got, err := s.Get(ctx, ref)
		if err != nil || got.ID != img.ID {
			t.Errorf("Get(%s) = %q, %v; want %s", ref, got.ID, err, img.ID)
		}
	}
	byDigest, err := s.Pull(ctx, img.Digests[0], nil, nil)
	if err != nil || byDigest.ID != img.ID || !slices.Equal(byDigest.Tags, img.Tags) {
		t.Errorf("Pull by digest = %+v, %v", byDigest, err)
	}
	list, err := s.List(ctx)
	if err != nil || len(list) != 1 || list[0].ID != img.ID {
		t.Errorf("List = %+v, %v", list, err)
	}
	usage, err := s.Usage(ctx)
	if err != nil || usage.Bytes < uint64(img.Size) || usage.CapacityBytes <= usage.Bytes || usage.Inodes == 0 {
		t.Errorf("Usage = %+v, %v; the image has %d bytes", usage, err, img.Size)
	}
	disks(t, s, f, img)
}

func disks(t *testing.T, s storage.Images, f ImagesFixture, img storage.Image) {
	ctx := t.Context()
	disk, err := s.Disk(ctx, img.ID, "pod-1")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^[a-z0-9-]{1,20}$`).MatchString(disk.ID) || disk.FSType == "" || disk.Format == "" {
		t.Errorf("Disk = %+v", disk)
	}
	fi, err := os.Stat(disk.Path)
	if err != nil || disk.Bytes%4096 != 0 || disk.Format == "raw" && fi.Size() != disk.Bytes || fi.Mode().Perm()&0o222 != 0 {
		t.Errorf("disk file: %v, %v; want a read-only one of %d bytes", fi, err, disk.Bytes)
	}
	f.Check(t, disk.Path)
	second, err := s.Disk(ctx, img.ID, "pod-2")
	if err != nil || second != disk {
		t.Errorf("the second user's disk = %+v, %v; want %+v", second, err, disk)
	}

	for range 2 {
		if err := s.Remove(ctx, f.Ref); err != nil {
			t.Errorf("Remove = %v", err)
		}
	}
	if _, err := s.Get(ctx, img.ID); !errdefs.IsNotFound(err) {
		t.Errorf("Get after Remove = %v, want ErrNotFound", err)
	}
	if _, err := s.Disk(ctx, img.ID, "pod-3"); !errdefs.IsNotFound(err) {
		t.Errorf("a new user's Disk after Remove = %v, want ErrNotFound", err)
	}
	if again, err := s.Disk(ctx, img.ID, "pod-1"); err != nil || again != disk {
		t.Errorf("Disk after Remove, of who holds it = %+v, %v", again, err)
	}
	for _, user := range []string{"pod-1", "pod-2", "pod-2", "nobody"} {
		if _, err := os.Stat(disk.Path); err != nil && user != "nobody" && user != "pod-2" {
			t.Errorf("the disk is gone before %s released it", user)
		}
		if err := s.Release(ctx, user); err != nil {
			t.Errorf("Release(%s) = %v", user, err)
		}
	}
	if _, err := os.Stat(disk.Path); !os.IsNotExist(err) {
		t.Errorf("the disk that nobody holds is still there: %v", err)
	}
	for _, bad := range []string{"", "../../etc/passwd", "sha256:12"} {
		if _, err := s.Disk(ctx, bad, "pod"); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Disk(%q) = %v, want ErrInvalidArgument", bad, err)
		}
	}
}
