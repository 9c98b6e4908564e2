package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage/erofs"
)

// A sighting is a file in the state in which all of it was right. As long as
// the file still is in that state, and the host was not booted since, it is
// not read again to see: whatever writes to a file changes its ctime, and what
// the kernel has taken outlives every process, but not a crash of the host.
type sighting struct {
	Boot          string
	Device, Inode uint64
	Bytes         int64
	Mtime, Ctime  int64 // ns
}

func (s *Store) sight(path string) (sighting, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return sighting{}, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return sighting{
		Boot: s.bootID, Device: st.Dev, Inode: st.Ino, Bytes: st.Size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano(),
	}, nil
}

// checkLayer returns nil if a layer is here and right, ErrNotFound if it is not
// here, and ErrDataLoss if it is damaged. All of it is read once a boot, and
// after each change of the file, unless it is sealed; else this costs a look at
// the record and the inode.
func (s *Store) checkLayer(ctx context.Context, id digest.Digest) error {
	defer s.locks.lock("layer " + id.String())()
	rec, err := s.layerRecord(id)
	if err != nil {
		return err
	}
	if rec.Damaged != "" {
		return fmt.Errorf("layer %s: %s: %w", id, rec.Damaged, errdefs.ErrDataLoss)
	}
	now, err := s.sight(s.layerPath(id, dataSuffix))
	switch {
	case err == nil && now == rec.Good:
		return nil
	case err == nil && s.layerSealed(id, rec):
		return s.changeLayer(id, func(r *layerRecord) { r.Good = now })
	}
	return s.verifyLayer(ctx, id, rec, os.O_RDONLY, func(f *os.File) erofs.BlobFile { return f })
}

// verifyLayer reads all of a layer, and notes what it finds. The layer is
// locked, or rec is all that is known of it.
func (s *Store) verifyLayer(ctx context.Context, id digest.Digest, rec layerRecord, flags int, wrap func(*os.File) erofs.BlobFile) error {
	now, err := s.sight(s.layerPath(id, dataSuffix))
	if err == nil {
		err = s.readLayer(ctx, id, rec, flags, wrap)
	}
	if errors.Is(err, fs.ErrNotExist) {
		if _, gone := s.layerRecord(id); errdefs.IsNotFound(gone) {
			return gone
		}
		err = fmt.Errorf("a file of it is gone: %w", errdefs.ErrDataLoss)
	}
	switch {
	case err == nil:
		return s.changeLayer(id, func(r *layerRecord) { r.Good = now })
	case !errdefs.IsDataLoss(err):
		return err
	}
	return s.damaged(ctx, id, err)
}

func (s *Store) readLayer(ctx context.Context, id digest.Digest, rec layerRecord, flags int, wrap func(*os.File) erofs.BlobFile) error {
	index, err := s.openIndex(ctx, id, rec)
	if err != nil {
		return err
	}
	defer index.Close()
	sums, err := erofs.Sums(index, rec.Index, rec.Data)
	if err != nil {
		return err
	}
	path := s.layerPath(id, dataSuffix)
	f, err := openPart(path, flags)
	if err != nil {
		return err
	}
	defer f.Close()
	if flags&unix.O_DIRECT != 0 { // of sealed files there is no direct I/O
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	return erofs.CheckData(ctx, wrap(f), rec.Data, sums)
}

// openPart opens a file that disks consist of. It returns ErrDataLoss if the
// host's disk does not give it.
func openPart(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW, 0)
	if errors.Is(err, unix.EINVAL) && flags&unix.O_DIRECT != 0 { // direct I/O, which this file system has not
		f, err = os.OpenFile(path, flags&^unix.O_DIRECT|unix.O_NOFOLLOW, 0)
	}
	for _, no := range []error{unix.EIO, unix.EUCLEAN, unix.EBADMSG} {
		if errors.Is(err, no) {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
		}
	}
	return f, err
}

// openIndex opens a layer's index once it is known to be right.
func (s *Store) openIndex(ctx context.Context, id digest.Digest, rec layerRecord) (*os.File, error) {
	f, err := openPart(s.layerPath(id, indexSuffix), os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	err = checkDigest(ctx, f, rec.IndexDigest)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func checkDigest(ctx context.Context, f *os.File, want digest.Digest) error {
	verifier := want.Verifier()
	if _, err := io.Copy(verifier, &ctxReader{ctx, f}); err != nil {
		if ctx.Err() == nil {
			err = fmt.Errorf("%s cannot be read: %w: %w", f.Name(), err, errdefs.ErrDataLoss)
		}
		return err
	}
	if !verifier.Verified() {
		return fmt.Errorf("%s is damaged: %w", f.Name(), errdefs.ErrDataLoss)
	}
	return nil
}

type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// scrub reads all layers from the disk itself, past what the kernel has in
// memory, so that bits that flipped there are found before they are needed:
// after a boot, those that were not read since and have no seal, and then all,
// every so often.
func (s *Store) scrub(ctx context.Context) {
	s.scrubAll(ctx, func(id digest.Digest, rec layerRecord) bool {
		return rec.Good.Boot != s.bootID && !s.layerSealed(id, rec)
	})
	close(s.scrubbed)
	tick := time.NewTicker(s.scrubEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.scrubAll(ctx, func(digest.Digest, layerRecord) bool { return true })
		}
	}
}

func (s *Store) scrubAll(ctx context.Context, wanted func(digest.Digest, layerRecord) bool) {
	err := s.scrubLayers(ctx, wanted)
	err = errors.Join(err, s.eachDisk(func(id string, rec diskRecord) error { return s.scrubDisk(ctx, id, rec) }))
	if err != nil && ctx.Err() == nil {
		s.log.Warn("not all image layers could be looked at", "error", err)
	}
}

// scrubLayers reads the layers that are wanted and not known to be damaged, and
// mends them.
func (s *Store) scrubLayers(ctx context.Context, wanted func(digest.Digest, layerRecord) bool) error {
	var ids []digest.Digest
	err := s.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketLayers).ForEach(func(k, _ []byte) error { ids = append(ids, digest.Digest(k)); return nil })
	})
	for _, id := range ids {
		rec, rerr := s.layerRecord(id)
		if rerr != nil || rec.Damaged != "" || !wanted(id, rec) {
			continue
		}
		verr := s.verifyLayer(ctx, id, rec, os.O_RDONLY|unix.O_DIRECT, func(f *os.File) erofs.BlobFile { return &pacedFile{f, ctx} })
		switch {
		case errdefs.IsDataLoss(verr):
			s.mend(ctx, id)
		case verr != nil && !errdefs.IsNotFound(verr):
			err = errors.Join(err, verr)
		}
	}
	return err
}

// scrubRate is how fast layers are read that nobody waits for, in bytes a
// second.
const scrubRate = 64 << 20

// A pacedFile is read slowly.
type pacedFile struct {
	*os.File
	ctx context.Context
}

func (f *pacedFile) ReadAt(p []byte, off int64) (int, error) {
	select {
	case <-time.After(time.Duration(len(p)) * time.Second / scrubRate):
	case <-f.ctx.Done():
	}
	return f.File.ReadAt(p, off)
}
