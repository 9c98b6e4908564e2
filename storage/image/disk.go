package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/erofs"
)

// The buckets beside containerd's.
var (
	bucketDisks = []byte("atoll.disks") // image ID → diskRecord
	bucketHolds = []byte("atoll.holds") // user NUL image ID → 1
)

// A diskRecord says what an image's disk must be.
type diskRecord struct {
	erofs.Image
	Version int
	// BootID of the host when all of it was last known to be right. What the
	// kernel has taken outlives every process, but not a crash of the host.
	BootID string
}

const diskSuffix = ".erofs"

func (s *Store) diskDir() string { return filepath.Join(s.root, "disks") }

func (s *Store) diskPath(id string) string {
	return filepath.Join(s.diskDir(), strings.TrimPrefix(id, "sha256:")+diskSuffix)
}

func (s *Store) initRecords() error {
	return s.bolt.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucketDisks)
		_, err2 := tx.CreateBucketIfNotExists(bucketHolds)
		return errors.Join(err, err2)
	})
}

// Disk implements storage.Images. Of a disk made before the host's last boot
// every byte is checked once; else its size and superblock. One that is wrong
// is made again; a guest that has the old file keeps that.
func (s *Store) Disk(ctx context.Context, imageID, user string) (storage.ImageDisk, error) {
	ctx = s.in(ctx)
	if d := digest.Digest(imageID); d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return storage.ImageDisk{}, fmt.Errorf("disk of image %.100q: want an image ID, sha256:…: %w", imageID, errdefs.ErrInvalidArgument)
	}
	if user == "" || strings.ContainsRune(user, 0) {
		return storage.ImageDisk{}, fmt.Errorf("disk of image %s for user %q: want a name: %w", imageID, user, errdefs.ErrInvalidArgument)
	}
	defer s.locks.lock(imageID)()
	fresh, err := s.hold(imageID, user)
	if err != nil {
		return storage.ImageDisk{}, err
	}
	failpoint.Hit(failpoint.HoldRecorded)
	rec, err := s.ensureDisk(ctx, imageID, !fresh)
	if err != nil {
		if fresh {
			err = errors.Join(err, s.unhold(imageID, user))
		}
		return storage.ImageDisk{}, err
	}
	return storage.ImageDisk{
		ID:     "img-" + strings.TrimPrefix(imageID, "sha256:")[:16],
		Path:   s.diskPath(imageID),
		Format: "raw",
		FSType: "erofs",
		Bytes:  rec.Bytes,
	}, nil
}

// ensureDisk checks an image's disk and makes it if need be. The lock of id is
// held. held says that the user had the disk before, so that the image itself
// may be gone.
func (s *Store) ensureDisk(ctx context.Context, id string, held bool) (diskRecord, error) {
	records, err := s.records(ctx)
	if err != nil {
		return diskRecord{}, err
	}
	if len(records[id]) == 0 && !held {
		return diskRecord{}, classed(errdefs.ErrNotFound, "image %s is not on this node: pull it first", id)
	}
	rec, err := s.checkDisk(ctx, id)
	if err == nil {
		return rec, nil
	}
	if !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
		return diskRecord{}, err
	}
	if len(records[id]) == 0 {
		return diskRecord{}, classed(errdefs.ErrDataLoss, "image %s was removed and its disk is no longer right: pull the image again: %v", id, err)
	}
	d, derr := s.detail(ctx, id, records[id][0])
	if derr != nil {
		return diskRecord{}, derr
	}
	s.log.Info("image disk is made again", "image", id, "reason", err)
	rec, err = s.makeDisk(ctx, d.manifest)
	if err != nil {
		return diskRecord{}, s.explainDisk(records[id][0].Name, err)
	}
	return rec, nil
}

// checkDisk returns the record of a disk that is as it should be.
func (s *Store) checkDisk(ctx context.Context, id string) (diskRecord, error) {
	var rec diskRecord
	var data []byte
	err := s.bolt.View(func(tx *bolt.Tx) error {
		data = bytes.Clone(tx.Bucket(bucketDisks).Get([]byte(id)))
		return nil
	})
	if err != nil {
		return rec, err
	}
	if data == nil {
		return rec, fmt.Errorf("image %s has no disk: %w", id, errdefs.ErrNotFound)
	}
	if err := json.Unmarshal(data, &rec); err != nil || rec.Version != erofs.Version {
		return rec, fmt.Errorf("image %s has a disk of another version: %w", id, errdefs.ErrNotFound)
	}
	full := rec.BootID != s.bootID
	if err := erofs.Check(ctx, s.diskPath(id), rec.Image, full); err != nil || !full {
		return rec, err
	}
	rec.BootID = s.bootID
	return rec, s.recordDisk(id, rec)
}

func (s *Store) recordDisk(id string, rec diskRecord) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return s.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketDisks).Put([]byte(id), data) })
}

// convert makes the disk of an image that was just fetched, unless it is
// there. again is true when layers turned out to be damaged in the store: they
// are dropped from it, and fetching the image again may help.
func (s *Store) convert(ctx context.Context, r ref, m *manifest) (again bool, err error) {
	defer s.locks.lock(m.id())()
	_, err = s.checkDisk(ctx, m.id())
	if err == nil {
		return false, nil
	}
	if !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
		return false, err
	}
	if _, err = s.makeDisk(ctx, m); errdefs.IsDataLoss(err) {
		var forget error
		again, forget = s.forgetDamaged(ctx, m)
		err = errors.Join(err, forget)
	}
	return again, s.explainDisk(r.String(), err)
}

func (s *Store) makeDisk(ctx context.Context, m *manifest) (diskRecord, error) {
	layers := make([]erofs.Layer, len(m.Layers))
	for i, desc := range m.Layers {
		layers[i] = erofs.Layer{
			Name:   desc.Digest.String(),
			DiffID: m.config.RootFS.DiffIDs[i],
			Open:   func(ctx context.Context) (io.ReadCloser, error) { return s.openBlob(ctx, desc) },
		}
	}
	img, err := erofs.Build(ctx, s.diskPath(m.id()), layers, s.limits)
	if err != nil {
		return diskRecord{}, err
	}
	failpoint.Hit(failpoint.PullBuilt)
	// Readable for QEMU as whatever user, writable for nobody.
	if err := os.Chmod(s.diskPath(m.id()), 0o444); err != nil {
		return diskRecord{}, err
	}
	if len(img.Dropped) > 0 {
		s.log.Warn("image has extended attributes that its disk leaves out", "image", m.id(), "attributes", img.Dropped)
	}
	rec := diskRecord{Image: img, Version: erofs.Version, BootID: s.bootID}
	err = s.recordDisk(m.id(), rec)
	failpoint.Hit(failpoint.PullDiskRecorded)
	return rec, err
}

func (s *Store) openBlob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := s.content.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{content.NewReader(ra), ra}, nil
}

// forgetDamaged drops the layers that are not what their digest says, and
// reports whether there were any.
func (s *Store) forgetDamaged(ctx context.Context, m *manifest) (any bool, err error) {
	for _, desc := range m.Layers {
		if err := ctx.Err(); err != nil {
			return any, err
		}
		rc, err := s.openBlob(ctx, desc)
		if err != nil {
			continue
		}
		verifier := desc.Digest.Verifier()
		_, err = io.Copy(verifier, rc)
		rc.Close()
		if err == nil && verifier.Verified() {
			continue
		}
		if err := s.forgetBlob(ctx, desc); err != nil {
			return any, err
		}
		any = true
	}
	return any, nil
}

func (s *Store) explainDisk(name string, err error) error {
	var done *classError
	switch {
	case err == nil, errors.As(err, &done), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case isDiskFull(err):
		return classed(errdefs.ErrResourceExhausted,
			"disk of image %s: the disk under %s is full: remove images that are not needed or free space there: %v", name, s.root, err)
	case errdefs.IsOutOfRange(err):
		return classed(errdefs.ErrFailedPrecondition, "image %s is larger than this node allows: use a smaller image: %v", name, err)
	case errdefs.IsDataLoss(err), errdefs.IsNotFound(err):
		return classed(errdefs.ErrDataLoss, "image %s has a corrupt layer: pull it again, and if that fails build and push it again: %v", name, err)
	}
	return fmt.Errorf("disk of image %s: %w", name, err)
}

// hold notes that user has the disk of id and reports whether that is new.
func (s *Store) hold(id, user string) (fresh bool, err error) {
	err = s.bolt.Update(func(tx *bolt.Tx) error {
		key := []byte(user + "\x00" + id)
		b := tx.Bucket(bucketHolds)
		if fresh = b.Get(key) == nil; !fresh {
			return nil
		}
		return b.Put(key, []byte{1})
	})
	return fresh, err
}

func (s *Store) unhold(id, user string) error {
	return s.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketHolds).Delete([]byte(user + "\x00" + id)) })
}

// Release implements storage.Images.
func (s *Store) Release(ctx context.Context, user string) error {
	var ids []string
	err := s.bolt.View(func(tx *bolt.Tx) error {
		prefix := []byte(user + "\x00")
		c := tx.Bucket(bucketHolds).Cursor()
		for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
			ids = append(ids, string(k[len(prefix):]))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("release image disks of %s: %w", user, err)
	}
	for _, id := range ids {
		if err := s.release(s.in(ctx), id, user); err != nil {
			return fmt.Errorf("release image disks of %s: %w", user, err)
		}
	}
	return nil
}

func (s *Store) release(ctx context.Context, id, user string) error {
	defer s.locks.lock(id)()
	if err := s.unhold(id, user); err != nil {
		return err
	}
	failpoint.Hit(failpoint.HoldErased)
	records, err := s.records(ctx)
	if err != nil || len(records[id]) > 0 {
		return err
	}
	return s.dropDisk(id)
}

// dropDisk erases the disk of an image that is gone, unless somebody has it.
// The lock of id is held.
func (s *Store) dropDisk(id string) error {
	held := false
	err := s.bolt.Update(func(tx *bolt.Tx) error {
		suffix := []byte("\x00" + id)
		err := tx.Bucket(bucketHolds).ForEach(func(k, _ []byte) error {
			held = held || bytes.HasSuffix(k, suffix)
			return nil
		})
		if err != nil || held {
			return err
		}
		return tx.Bucket(bucketDisks).Delete([]byte(id))
	})
	if err != nil || held {
		return err
	}
	failpoint.Hit(failpoint.ImageDiskForgot)
	if err := os.Remove(s.diskPath(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	failpoint.Hit(failpoint.ImageDiskErased)
	return nil
}

// sweepDisks erases files without a record and records without an image or a
// holder.
func (s *Store) sweepDisks(ctx context.Context) error {
	records, err := s.records(ctx)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	var orphans []string
	err = s.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketDisks).ForEach(func(k, _ []byte) error {
			known[filepath.Base(s.diskPath(string(k)))] = true
			if len(records[string(k)]) == 0 {
				orphans = append(orphans, string(k))
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, id := range orphans {
		if err := s.dropDisk(id); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(s.diskDir())
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if !known[entry.Name()] {
			if err := os.Remove(filepath.Join(s.diskDir(), entry.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// diskUsage is what an image's disk takes on the host.
func (s *Store) diskUsage(id string) int64 {
	var st unix.Stat_t
	if unix.Lstat(s.diskPath(id), &st) != nil {
		return 0
	}
	return st.Blocks * 512
}
