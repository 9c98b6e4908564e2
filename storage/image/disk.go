package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
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
	bucketDisks  = []byte("atoll.disks")  // image ID → diskRecord
	bucketHolds  = []byte("atoll.holds")  // user NUL image ID → 1
	bucketLayers = []byte("atoll.layers") // diff ID → layerRecord
)

// A diskRecord says what an image's disk must be: metadata of its own, and the
// blobs of its layers, shown as one disk by a VMDK descriptor.
type diskRecord struct {
	erofs.Image
	Version int
	Layers  []diskLayer
	// Good is the metadata when all of it was last known to be right.
	Good sighting
	// Seal is the metadata's; empty: it has none.
	Seal digest.Digest `json:",omitempty"`
}

func (r diskRecord) layers() (ids []digest.Digest) {
	for _, l := range r.Layers {
		ids = append(ids, l.DiffID)
	}
	return ids
}

type diskLayer struct {
	DiffID digest.Digest
	Data   int64 // bytes of its blob
}

const (
	metaSuffix = ".erofs"
	diskSuffix = ".vmdk"
)

func (s *Store) diskDir() string { return filepath.Join(s.root, "disks") }

func (s *Store) diskFile(id, suffix string) string {
	return filepath.Join(s.diskDir(), strings.TrimPrefix(id, "sha256:")+suffix)
}

func (s *Store) metaPath(id string) string { return s.diskFile(id, metaSuffix) }
func (s *Store) diskPath(id string) string { return s.diskFile(id, diskSuffix) }

func (s *Store) initRecords() error {
	return s.bolt.Update(func(tx *bolt.Tx) error {
		for _, bucket := range [][]byte{bucketDisks, bucketHolds, bucketLayers} {
			if _, err := tx.CreateBucketIfNotExists(bucket); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachDisk calls do with each record of this version.
func (s *Store) eachDisk(do func(id string, rec diskRecord) error) error {
	all := map[string]diskRecord{}
	err := s.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketDisks).ForEach(func(k, v []byte) error {
			var rec diskRecord
			if json.Unmarshal(v, &rec) == nil && rec.Version == erofs.Version {
				all[string(k)] = rec
			}
			return nil
		})
	})
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if err == nil {
			err = do(id, all[id])
		}
	}
	return err
}

// Disk implements storage.Images. What the disk consists of is checked before
// a new user gets it (checkLayer says what that costs): metadata that is wrong
// is made again, a layer that is wrong is fetched again, without credentials;
// if the registry wants some, the image counts as not here, so that it gets
// pulled. A guest that has the old files keeps those.
func (s *Store) Disk(ctx context.Context, imageID, user string) (storage.ImageDisk, error) {
	if d := digest.Digest(imageID); d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return storage.ImageDisk{}, fmt.Errorf("disk of image %.100q: want an image ID, sha256:…: %w", imageID, errdefs.ErrInvalidArgument)
	}
	if user == "" || strings.ContainsRune(user, 0) {
		return storage.ImageDisk{}, fmt.Errorf("disk of image %s for user %q: want a name: %w", imageID, user, errdefs.ErrInvalidArgument)
	}
	disk, err := s.disk(s.in(ctx), imageID, user)
	var lost *lostLayer
	if !errors.As(err, &lost) {
		return disk, err
	}
	if rerr := s.refetch(ctx, imageID); rerr != nil {
		if rec, err := s.diskRecord(imageID); err == nil {
			s.tellUnmended(ctx, rec.layers())
		}
		return disk, classed(errdefs.ErrDataLoss, "image %s has a damaged layer, which could not be fetched again without credentials: pull it again: %v; %v", imageID, lost.err, rerr)
	}
	return s.disk(s.in(ctx), imageID, user)
}

func (s *Store) disk(ctx context.Context, imageID, user string) (storage.ImageDisk, error) {
	defer s.locks.lock(imageID)()
	fresh, err := s.hold(imageID, user)
	if err != nil {
		return storage.ImageDisk{}, err
	}
	failpoint.Hit(failpoint.HoldRecorded)
	rec, err := s.ensureDisk(ctx, imageID, user, !fresh)
	if err != nil {
		if fresh {
			err = errors.Join(err, s.unhold(imageID, user))
		}
		return storage.ImageDisk{}, err
	}
	return storage.ImageDisk{
		ID:     "img-" + strings.TrimPrefix(imageID, "sha256:")[:16],
		Path:   s.diskPath(imageID),
		Format: "vmdk",
		FSType: "erofs",
		Bytes:  rec.Meta + rec.Data,
	}, nil
}

// A lostLayer is the reason why a disk cannot be made from what is here.
type lostLayer struct{ err error }

func (e *lostLayer) Error() string { return e.err.Error() }
func (e *lostLayer) Unwrap() error { return e.err }

// refetch pulls an image under the names that it was pulled by.
func (s *Store) refetch(ctx context.Context, id string) error {
	records, err := s.records(s.in(ctx))
	if err != nil {
		return err
	}
	err = fmt.Errorf("image %s has no digest at a registry: %w", id, errdefs.ErrNotFound)
	for _, rec := range records[id] {
		if !strings.Contains(rec.Name, "@") {
			continue
		}
		if _, err = s.Pull(ctx, rec.Name, nil, nil); err == nil {
			return nil
		}
	}
	return err
}

// ensureDisk checks an image's disk and makes it if need be. The lock of id is
// held. held says that the user had the disk before, so that the image itself
// may be gone.
func (s *Store) ensureDisk(ctx context.Context, id, user string, held bool) (diskRecord, error) {
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
	rec, merr := s.makeDisk(ctx, d.manifest)
	if merr != nil {
		return diskRecord{}, s.explainDisk(records[id][0].Name, merr)
	}
	if held {
		user = "" // it has the old one
	}
	s.tellMetadata(ctx, id, user, err)
	return rec, nil
}

func (s *Store) diskRecord(id string) (rec diskRecord, err error) {
	var data []byte
	err = s.bolt.View(func(tx *bolt.Tx) error {
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
	return rec, nil
}

// checkDisk returns the record of a disk that is as it should be.
func (s *Store) checkDisk(ctx context.Context, id string) (diskRecord, error) {
	rec, err := s.diskRecord(id)
	if err != nil {
		return rec, err
	}
	if err := s.checkMeta(ctx, id, rec); err != nil {
		return rec, err
	}
	for _, l := range rec.Layers {
		if err := s.checkLayer(ctx, l.DiffID); err != nil {
			return rec, err
		}
	}
	return rec, nil
}

// checkMeta checks what belongs to one image alone.
func (s *Store) checkMeta(ctx context.Context, id string, rec diskRecord) error {
	text, err := os.ReadFile(s.diskPath(id))
	if err == nil && string(text) != s.descriptor(id, rec) {
		err = fmt.Errorf("%s is not what it was made as: %w", s.diskPath(id), errdefs.ErrDataLoss)
	}
	now, serr := s.sight(s.metaPath(id))
	err = errors.Join(err, serr)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil || now == rec.Good {
		return err
	}
	if !s.sealed(s.metaPath(id), rec.Seal) {
		err = s.readMeta(ctx, id, rec)
	}
	if err != nil {
		if errdefs.IsDataLoss(err) {
			err = s.metadataDamaged(ctx, id, err)
		}
		return err
	}
	rec.Good = now
	return s.recordDisk(id, rec)
}

func (s *Store) readMeta(ctx context.Context, id string, rec diskRecord) error {
	f, err := openPart(s.metaPath(id), os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // what is on the disk matters
	return checkDigest(ctx, f, rec.Digest)
}

func (s *Store) recordDisk(id string, rec diskRecord) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return s.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketDisks).Put([]byte(id), data) })
}

// convert makes the disk of an image that was just fetched, unless it is
// there.
func (s *Store) convert(ctx context.Context, r ref, m *manifest) error {
	defer s.locks.lock(m.id())()
	_, err := s.checkDisk(ctx, m.id())
	if err == nil {
		return nil
	}
	if !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
		return err
	}
	if _, err := s.makeDisk(ctx, m); err != nil {
		return s.explainDisk(r.String(), err)
	}
	s.tellMetadata(ctx, m.id(), "", err)
	return nil
}

// makeDisk merges an image's layers. It returns a lostLayer if one of them is
// not here.
func (s *Store) makeDisk(ctx context.Context, m *manifest) (rec diskRecord, err error) {
	rec = diskRecord{Version: erofs.Version}
	layers := make([]erofs.Indexed, len(m.Layers))
	for i, desc := range m.Layers {
		id := m.config.RootFS.DiffIDs[i]
		if err := s.localLayer(ctx, desc, id); err != nil {
			return rec, err
		}
		l, err := s.layerRecord(id)
		if err != nil {
			return rec, &lostLayer{err}
		}
		rec.Layers = append(rec.Layers, diskLayer{id, l.Data})
		layers[i] = erofs.Indexed{
			Name: desc.Digest.String(), DiffID: id, Data: l.Data,
			Open: func() (io.ReadCloser, error) {
				f, err := s.openIndex(ctx, id, l)
				if errdefs.IsDataLoss(err) || errors.Is(err, fs.ErrNotExist) {
					return nil, &lostLayer{s.damaged(ctx, id, err)}
				}
				return f, err
			},
		}
	}
	meta, err := s.tempFile(s.diskDir())
	if err != nil {
		return rec, err
	}
	defer meta.discard()
	if rec.Image, err = erofs.Merge(ctx, meta, layers, s.limits); err != nil {
		return rec, err
	}
	s.converted.Add(rec.Meta)
	failpoint.Hit(failpoint.PullBuilt)
	if rec.Seal, err = s.keepSealed(meta, s.metaPath(m.id())); err != nil {
		return rec, err
	}
	if err := s.writeDescriptor(m.id(), rec); err != nil {
		return rec, err
	}
	if len(rec.Dropped) > 0 {
		s.log.Warn("image has extended attributes that its disk leaves out", "image", m.id(), "attributes", rec.Dropped)
	}
	if rec.Good, err = s.sight(s.metaPath(m.id())); err != nil {
		return rec, err
	}
	err = s.recordDisk(m.id(), rec)
	failpoint.Hit(failpoint.PullDiskRecorded)
	return rec, err
}

// localLayer checks a layer, and makes it if that can be done without a
// registry.
func (s *Store) localLayer(ctx context.Context, desc ocispec.Descriptor, id digest.Digest) error {
	_, err := s.ensureLayer(ctx, id, func() error {
		done, err := s.layerFromBlob(ctx, desc, id, s.limits.NewBudget())
		if err == nil && !done {
			err = fmt.Errorf("layer %s is not on this node, or damaged: %w", id, errdefs.ErrNotFound)
		}
		return err
	})
	if errdefs.IsNotFound(err) {
		return &lostLayer{err}
	}
	return err
}

// layerFromBlob converts a layer that an earlier version of this program has
// kept as the registry had it.
func (s *Store) layerFromBlob(ctx context.Context, desc ocispec.Descriptor, id digest.Digest, budget *erofs.Budget) (done bool, err error) {
	here, err := s.hasBlob(ctx, desc)
	if err != nil || !here {
		return false, err
	}
	err = s.convertLayer(ctx, desc, id, budget, s.openBlob(desc))
	if errdefs.IsDataLoss(err) || errdefs.IsFailedPrecondition(err) {
		return false, s.forgetBlob(ctx, desc)
	}
	return err == nil, err
}

func (s *Store) openBlob(desc ocispec.Descriptor) layerSource {
	return func(ctx context.Context) (io.ReadCloser, error) {
		ra, err := s.content.ReaderAt(ctx, desc)
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{content.NewReader(ra), ra}, nil
	}
}

func (s *Store) explainDisk(name string, err error) error {
	var done *classError
	var lost *lostLayer
	switch {
	case err == nil, errors.As(err, &done), errors.As(err, &lost), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
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
	return s.dropDisk(ctx, id)
}

// dropDisk erases the disk of an image that is gone, unless somebody has it.
// The lock of id is held.
func (s *Store) dropDisk(ctx context.Context, id string) error {
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
	for _, path := range []string{s.diskPath(id), s.metaPath(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	failpoint.Hit(failpoint.ImageDiskErased)
	return s.collectLayers(ctx)
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
			known[filepath.Base(s.metaPath(string(k)))] = true
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
		if err := s.dropDisk(ctx, id); err != nil {
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

// diskUsage is what an image's disk takes on the host, with the layers that
// other images have too.
func (s *Store) diskUsage(id string, layers []digest.Digest) int64 {
	paths := []string{s.diskPath(id), s.metaPath(id)}
	for _, l := range layers {
		paths = append(paths, s.layerPath(l, dataSuffix), s.layerPath(l, indexSuffix))
	}
	slices.Sort(paths)
	var used int64
	for _, path := range slices.Compact(paths) {
		var st unix.Stat_t
		if unix.Lstat(path, &st) == nil {
			used += st.Blocks * 512
		}
	}
	return used
}
