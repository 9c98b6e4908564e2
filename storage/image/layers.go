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
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage/erofs"
)

// A layer is on the host once, for all images that have it, under the digest
// of what it unpacks to: a data blob and an index. It is a part of disks, whose
// metadata says where in the blob things are; since that depends on the layer
// alone, a layer that is fetched again fits all of them.

const (
	dataSuffix  = ".data"
	indexSuffix = ".index"
	tempPrefix  = ".converting-"
)

// A layerRecord says what a layer's files must be.
type layerRecord struct {
	erofs.Converted
	Version int
	// Good is the blob when all of it was last known to be right.
	Good sighting
	// DataSeal and IndexSeal are the files' seals; empty: they have none.
	DataSeal, IndexSeal digest.Digest `json:",omitempty"`
	// Damaged says what is wrong with it, once that is known.
	Damaged string `json:",omitempty"`
}

func (s *Store) layerDir() string { return filepath.Join(s.root, "layers") }

func (s *Store) layerPath(id digest.Digest, suffix string) string {
	return filepath.Join(s.layerDir(), id.Encoded()+suffix)
}

func (s *Store) layerRecord(id digest.Digest) (rec layerRecord, err error) {
	var data []byte
	err = s.bolt.View(func(tx *bolt.Tx) error {
		data = bytes.Clone(tx.Bucket(bucketLayers).Get([]byte(id)))
		return nil
	})
	if err != nil {
		return rec, err
	}
	if data == nil || json.Unmarshal(data, &rec) != nil || rec.Version != erofs.Version {
		return rec, fmt.Errorf("layer %s is not on this node: %w", id, errdefs.ErrNotFound)
	}
	return rec, nil
}

func (s *Store) recordLayer(rec layerRecord) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return s.bolt.Update(func(tx *bolt.Tx) error { return tx.Bucket(bucketLayers).Put([]byte(rec.DiffID), data) })
}

// changeLayer changes a record, unless it is gone.
func (s *Store) changeLayer(id digest.Digest, change func(*layerRecord)) error {
	return s.bolt.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketLayers)
		var rec layerRecord
		data := b.Get([]byte(id))
		if data == nil {
			return nil
		}
		if err := json.Unmarshal(data, &rec); err != nil {
			return err
		}
		change(&rec)
		data, err := json.Marshal(rec)
		if err != nil {
			return err
		}
		return b.Put([]byte(id), data)
	})
}

// A layerFlight is a layer that is being fetched and converted, and what those
// wait for who want it too.
type layerFlight struct {
	done chan struct{}
	err  error
}

// ensureLayer sees to it that a layer is here and right, by build if need be.
// One at a time builds a layer; the others wait, and if that fails, since the
// pull that it was for has ended perhaps, the next tries.
func (s *Store) ensureLayer(ctx context.Context, id digest.Digest, build func() error) (made bool, err error) {
	for {
		s.mu.Lock()
		f := s.layerFlights[id]
		if f == nil {
			f = &layerFlight{done: make(chan struct{})}
			s.layerFlights[id] = f
			s.mu.Unlock()
			err = s.checkLayer(ctx, id)
			if errdefs.IsNotFound(err) || errdefs.IsDataLoss(err) {
				made, err = true, build()
			}
			f.err = err
			s.mu.Lock()
			delete(s.layerFlights, id)
			s.mu.Unlock()
			close(f.done)
			return made, err
		}
		s.mu.Unlock()
		select {
		case <-f.done:
			if f.err == nil {
				return false, nil
			}
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// A layerSource is where a layer comes from: the registry, or the store.
type layerSource func(ctx context.Context) (io.ReadCloser, error)

// convertLayer reads a layer once, and digests, unpacks and converts it while
// it comes. What is not what desc and id say becomes no layer.
func (s *Store) convertLayer(ctx context.Context, desc ocispec.Descriptor, id digest.Digest, budget *erofs.Budget, open layerSource) (err error) {
	data, err := s.tempFile(s.layerDir())
	if err != nil {
		return err
	}
	defer data.discard()
	index, err := s.tempFile(s.layerDir())
	if err != nil {
		return err
	}
	defer index.discard()
	rc, err := open(ctx)
	if err != nil {
		return err
	}
	defer rc.Close()
	src := &checkedReader{r: rc, verifier: desc.Digest.Verifier(), limit: desc.Size}
	made, err := erofs.Convert(ctx, src, data, index, s.limits, budget)
	if err == nil || errdefs.IsDataLoss(err) && erofs.IsLayerFault(err) {
		// Is it the layer that is wrong, or what came in its place?
		if verr := src.verify(desc); verr != nil {
			return verr
		}
	}
	if err == nil && made.DiffID != id {
		err = fmt.Errorf("unpacks to %s, and the image's config says %s: %w", made.DiffID, id, errdefs.ErrDataLoss)
	}
	if err != nil {
		return err
	}
	if err := data.Truncate(made.Data); err != nil { // it may end with a hole
		return err
	}
	s.converted.Add(made.Data + made.Index)
	return s.keepLayer(made, data, index)
}

// keepLayer gives a layer's files their names and records them. They are not
// synced: after a crash of the host all that was written before it is checked
// before it is used, and what is wrong is fetched again.
func (s *Store) keepLayer(made erofs.Converted, data, index *tempFile) error {
	defer s.locks.lock("layer " + made.DiffID.String())()
	rec := layerRecord{Converted: made, Version: erofs.Version}
	var err error
	if rec.IndexSeal, err = s.keepSealed(index, s.layerPath(made.DiffID, indexSuffix)); err != nil {
		return err
	}
	if rec.DataSeal, err = s.keepSealed(data, s.layerPath(made.DiffID, dataSuffix)); err != nil {
		return err
	}
	failpoint.Hit(failpoint.PullLayerKept)
	if rec.Good, err = s.sight(s.layerPath(made.DiffID, dataSuffix)); err != nil {
		return err
	}
	old, _ := s.layerRecord(made.DiffID)
	err = s.recordLayer(rec)
	if err == nil && old.Damaged != "" {
		s.tellMended(s.ctx, made.DiffID)
	}
	return err
}

// A checkedReader digests what passes, and ends at limit.
type checkedReader struct {
	r            io.Reader
	verifier     digest.Verifier
	bytes, limit int64
	ended        bool // r has: a registry's body must not be read again then
}

func (c *checkedReader) Read(p []byte) (int, error) {
	if c.ended || c.bytes == c.limit {
		return 0, io.EOF
	}
	n, err := c.r.Read(p[:min(int64(len(p)), c.limit-c.bytes)])
	c.bytes += int64(n)
	_, _ = c.verifier.Write(p[:n])
	c.ended = err == io.EOF
	return n, err
}

// verify reads to the end and compares.
func (c *checkedReader) verify(desc ocispec.Descriptor) error {
	if _, err := io.Copy(io.Discard, c); err != nil {
		return err
	}
	if !c.ended && c.bytes == c.limit {
		n, err := io.ReadFull(c.r, make([]byte, 1))
		if n > 0 {
			return fmt.Errorf("layer %s has more than the %d bytes that it should have: %w", desc.Digest, desc.Size, errdefs.ErrFailedPrecondition)
		}
		if err != io.EOF {
			return err
		}
	}
	switch {
	case c.bytes != desc.Size:
		return fmt.Errorf("layer %s ends after %d of %d bytes: %w", desc.Digest, c.bytes, desc.Size, io.ErrUnexpectedEOF)
	case !c.verifier.Verified():
		return fmt.Errorf("layer %s has another digest: %w", desc.Digest, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// A tempFile is a file that gets its name when it is whole.
type tempFile struct{ *os.File }

func (s *Store) tempFile(dir string) (*tempFile, error) {
	f, err := os.CreateTemp(dir, tempPrefix+"*")
	if err != nil {
		return nil, err
	}
	return &tempFile{f}, nil
}

// discard erases the file unless it was kept.
func (f *tempFile) discard() {
	_ = f.Close()
	_ = os.Remove(f.Name())
}

// finish closes the file: readable for QEMU as whatever user, writable for
// nobody.
func (f *tempFile) finish() error {
	if err := f.Chmod(0o444); err != nil {
		return err
	}
	return f.Close()
}

// pin keeps layers from being erased until unpin is called, recorded or not.
func (s *Store) pin(ids []digest.Digest) (unpin func()) {
	add := func(n int) {
		s.collecting.Lock()
		defer s.collecting.Unlock()
		for _, id := range ids {
			if s.pins[id] += n; s.pins[id] == 0 {
				delete(s.pins, id)
			}
		}
	}
	add(1)
	return func() { add(-1) }
}

// collectLayers erases the layers that no image has, no disk that somebody
// holds, and no pull under way.
func (s *Store) collectLayers(ctx context.Context) error {
	s.collecting.Lock()
	defer s.collecting.Unlock()
	used, err := s.layersInUse(ctx)
	if err != nil {
		return err
	}
	var gone []digest.Digest
	err = s.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketLayers).ForEach(func(k, _ []byte) error {
			if id := digest.Digest(k); !used[id] {
				gone = append(gone, id)
			}
			return nil
		})
	})
	if err != nil || len(gone) == 0 {
		return err
	}
	err = s.bolt.Update(func(tx *bolt.Tx) error {
		var err error
		for _, id := range gone {
			err = errors.Join(err, tx.Bucket(bucketLayers).Delete([]byte(id)))
		}
		return err
	})
	if err != nil {
		return err
	}
	failpoint.Hit(failpoint.ImageLayersForgot)
	for _, id := range gone {
		for _, suffix := range []string{dataSuffix, indexSuffix} {
			if err := os.Remove(s.layerPath(id, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// layersInUse are the layers that must stay. collecting is locked.
func (s *Store) layersInUse(ctx context.Context) (map[digest.Digest]bool, error) {
	used := map[digest.Digest]bool{}
	for id := range s.pins {
		used[id] = true
	}
	err := s.eachDisk(func(_ string, rec diskRecord) error {
		for _, l := range rec.Layers {
			used[l.DiffID] = true
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	// An image whose disk is to be made again.
	records, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	for id, recs := range records {
		if d, err := s.detail(ctx, id, recs[0]); err == nil {
			for _, id := range d.config.RootFS.DiffIDs {
				used[id] = true
			}
		}
	}
	return used, nil
}

// sweepLayers erases files that no record knows. Nothing else uses the store.
func (s *Store) sweepLayers(ctx context.Context) error {
	if err := s.collectLayers(ctx); err != nil {
		return err
	}
	known := map[string]bool{}
	err := s.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketLayers).ForEach(func(k, _ []byte) error {
			known[digest.Digest(k).Encoded()] = true
			return nil
		})
	})
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(s.layerDir())
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, suffix, _ := strings.Cut(e.Name(), ".")
		if known[name] && slices.Contains([]string{dataSuffix, indexSuffix}, "."+suffix) {
			continue
		}
		if err := os.Remove(filepath.Join(s.layerDir(), e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
