// Package image implements storage.Images with containerd's libraries in
// process: its resolver talks to registries, its content store and bolt
// metadata keep what came, with leases and garbage collection; package erofs
// makes the disks.
//
// Under the root: content/ (manifests and configs), layers/ (a data blob and an
// index a layer), disks/ (an EROFS file of metadata an image, and the VMDK
// descriptor that shows it with the blobs as one disk) and images.db. The
// database is the one record of what is there; a file without a record is
// erased at Open.
package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/erofs"
)

// Config of a Store.
type Config struct {
	// Root is the directory of everything; made if need be (0711, so that
	// QEMU as another user can open the disk that it is told of). Required.
	Root string
	// HostsDir has hosts.toml files, one directory a registry, as containerd
	// reads them from /etc/containerd/certs.d. Empty: none.
	HostsDir string
	// MaxConcurrentDownloads of layers within one pull; default 3.
	MaxConcurrentDownloads int
	// Pinned references are reported as such: the kubelet does not collect
	// them.
	Pinned []string
	// Limits of what an image may unpack to.
	Limits erofs.Limits
	// ScrubEvery is how often all layers are read to find what the host's disk
	// has lost; default 7 days.
	ScrubEvery time.Duration
	// Timeouts of talking to registries.
	Timeouts Timeouts
	// Logger; default slog.Default().
	Logger *slog.Logger

	sealer sealer // default fsVerity
}

// Store implements storage.Images.
type Store struct {
	root, hostsDir string
	downloads      int
	pinned         []string
	limits         erofs.Limits
	scrubEvery     time.Duration
	timeouts       Timeouts
	log            *slog.Logger
	bootID         string
	sealer         sealer // nil: files have no seals

	bolt    *bolt.DB
	meta    *metadata.DB
	blobs   content.Store // the directory below content
	content content.Store
	images  images.Store
	leases  leases.Manager

	ctx                context.Context // of all pulls; ends with Close
	cancel             context.CancelFunc
	pulling, scrubbing sync.WaitGroup
	scrubbed           chan struct{} // closed when the first scrub has ended
	fetches            sync.RWMutex  // read-locked by what may write to content/ingest
	locks              locks         // by image ID: making and erasing disks; by diff ID: checking and keeping layers

	mu           sync.Mutex
	flights      map[flightKey]*flight
	layerFlights map[digest.Digest]*layerFlight // by diff ID
	details      map[string]*detail             // by image ID; content never changes
	damages      damages

	collecting sync.Mutex // of layers; goes before mu
	pins       map[digest.Digest]int

	converted, damagedLayers, damagedMetadata atomic.Int64
}

// Converted is how many bytes this process has written to make disks of
// images.
func (s *Store) Converted() int64 { return s.converted.Load() }

// Counts are of this process.
type Counts struct {
	Converted                      int64 // bytes, as of Converted
	DamagedLayers, DamagedMetadata int64 // times that such a part of a disk was found damaged
}

// Counts returns what this process has done so far.
func (s *Store) Counts() Counts {
	return Counts{s.converted.Load(), s.damagedLayers.Load(), s.damagedMetadata.Load()}
}

var _ storage.Images = (*Store)(nil)

// namespace of containerd's metadata; there is one.
const namespace = "atoll"

// Open opens the store in cfg.Root, or makes one. What pulls and conversions
// that died left is erased. Only one process may have it open: another gets
// ErrUnavailable after 5 s. Open sets the level of containerd's own log, which
// goes beside slog to stderr, to errors.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Root == "" {
		return nil, fmt.Errorf("image store without a root directory: %w", errdefs.ErrInvalidArgument)
	}
	s := &Store{
		root: cfg.Root, hostsDir: cfg.HostsDir, downloads: cfg.MaxConcurrentDownloads,
		limits: cfg.Limits, timeouts: cfg.Timeouts.withDefaults(), log: cfg.Logger,
		scrubEvery: cfg.ScrubEvery, sealer: cfg.sealer,
		flights: map[flightKey]*flight{}, layerFlights: map[digest.Digest]*layerFlight{}, details: map[string]*detail{},
		scrubbed: make(chan struct{}),
		pins:     map[digest.Digest]int{}, damages: damages{told: map[digest.Digest]bool{}, checks: map[string]bool{}},
	}
	if s.sealer == nil {
		s.sealer = fsVerity{}
	}
	if s.scrubEvery <= 0 {
		s.scrubEvery = 7 * 24 * time.Hour
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if s.downloads <= 0 {
		s.downloads = 3
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	for _, pinned := range cfg.Pinned {
		r, err := parseRef(pinned)
		if err != nil {
			return nil, fmt.Errorf("pinned image: %w", err)
		}
		s.pinned = append(s.pinned, r.String())
	}
	if err := s.open(ctx); err != nil {
		return nil, fmt.Errorf("image store %s: %w", s.root, err)
	}
	s.scrubbing.Go(func() { s.scrub(s.ctx) })
	return s, nil
}

func (s *Store) open(ctx context.Context) error {
	for _, dir := range []string{s.diskDir(), s.layerDir()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	if err := log.SetLevel("error"); err != nil {
		return err
	}
	s.bootID = strings.TrimSpace(string(boot))
	s.bolt, err = bolt.Open(filepath.Join(s.root, "images.db"), 0o600, &bolt.Options{Timeout: 5 * time.Second})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return fmt.Errorf("another process uses it: stop that, or choose another data directory: %w", errdefs.ErrUnavailable)
	}
	if err != nil {
		return fmt.Errorf("images.db: %w", err)
	}
	s.blobs, err = local.NewStore(filepath.Join(s.root, "content"))
	if err != nil {
		return errors.Join(err, s.bolt.Close())
	}
	s.meta = metadata.NewDB(s.bolt, s.blobs, nil)
	s.content = s.meta.ContentStore()
	s.images = metadata.NewImageStore(s.meta)
	s.leases = metadata.NewLeaseManager(s.meta)
	if err := s.recover(s.in(ctx)); err != nil {
		return errors.Join(err, s.bolt.Close())
	}
	s.sealer = s.probeSealer(s.sealer)
	return nil
}

// recover erases what a process that died has left.
func (s *Store) recover(ctx context.Context) error {
	if err := s.meta.Init(ctx); err != nil {
		return err
	}
	if err := s.initRecords(); err != nil {
		return err
	}
	old, err := s.leases.List(ctx)
	if err != nil {
		return err
	}
	for _, lease := range old {
		if err := s.leases.Delete(ctx, lease); err != nil {
			return err
		}
	}
	if _, err := s.meta.GarbageCollect(ctx); err != nil {
		return err
	}
	if err := s.sweepIngests(ctx); err != nil {
		return err
	}
	if err := s.sweepDisks(ctx); err != nil {
		return err
	}
	return s.sweepLayers(ctx)
}

// sweepIngests erases what was half fetched. The metadata's collector misses
// what it has no record of, such as content that was not what it should be.
func (s *Store) sweepIngests(ctx context.Context) error {
	statuses, err := s.blobs.ListStatuses(ctx)
	if err != nil {
		return err
	}
	for _, st := range statuses {
		if err := s.blobs.Abort(ctx, st.Ref); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// Close ends pulls under way and the use of the store.
func (s *Store) Close() error {
	s.cancel()
	s.pulling.Wait()
	s.scrubbing.Wait()
	return s.bolt.Close()
}

// in gives ctx the metadata's namespace.
func (s *Store) in(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, namespace)
}

// labelID is on each record of the images bucket: the image's ID.
const labelID = "atoll.dev/image-id"

// Get implements storage.Images. ref is a tag, a digest, an ID with or without
// "sha256:", or the start of one (at least 3 digits).
func (s *Store) Get(ctx context.Context, ref string) (storage.Image, error) {
	ctx = s.in(ctx)
	id, err := s.lookup(ctx, ref)
	if err != nil {
		return storage.Image{}, err
	}
	records, err := s.records(ctx)
	if err != nil {
		return storage.Image{}, err
	}
	return s.image(ctx, id, records[id])
}

// lookup finds the ID of an image that is here.
func (s *Store) lookup(ctx context.Context, name string) (string, error) {
	r, refErr := parseRef(name)
	if refErr == nil {
		img, err := s.images.Get(ctx, r.String())
		if err == nil {
			return img.Labels[labelID], nil
		}
		if !errdefs.IsNotFound(err) {
			return "", fmt.Errorf("image %s: %w", r, err)
		}
	}
	records, err := s.records(ctx)
	if err != nil {
		return "", err
	}
	var ids []string
	for id := range records {
		ids = append(ids, id)
	}
	id, err := matchID(ids, name)
	if err != nil || id != "" {
		return id, err
	}
	if refErr != nil && !idPattern.MatchString(name) {
		return "", refErr
	}
	return "", classed(errdefs.ErrNotFound, "image %s is not on this node: pull it first", name)
}

// records returns all records, by image ID.
func (s *Store) records(ctx context.Context) (map[string][]images.Image, error) {
	all, err := s.images.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	byID := map[string][]images.Image{}
	for _, img := range all {
		byID[img.Labels[labelID]] = append(byID[img.Labels[labelID]], img)
	}
	return byID, nil
}

// image puts together what is known of an image.
func (s *Store) image(ctx context.Context, id string, records []images.Image) (storage.Image, error) {
	if len(records) == 0 {
		return storage.Image{}, classed(errdefs.ErrNotFound, "image %s is not on this node: pull it first", id)
	}
	d, err := s.detail(ctx, id, records[0])
	if err != nil {
		return storage.Image{}, err
	}
	for _, layer := range d.config.RootFS.DiffIDs {
		if rec, err := s.layerRecord(layer); err == nil && rec.Damaged != "" {
			return storage.Image{}, classed(errdefs.ErrNotFound, "image %s is on this node, but a layer of it is damaged: pull it again: %s: %s", records[0].Name, layer, rec.Damaged)
		}
	}
	img := storage.Image{ID: id, Size: d.documents + s.diskUsage(id, d.config.RootFS.DiffIDs), Config: d.config}
	for _, rec := range records {
		if strings.Contains(rec.Name, "@") {
			img.Digests = append(img.Digests, rec.Name)
		} else {
			img.Tags = append(img.Tags, rec.Name)
		}
		img.Pinned = img.Pinned || slices.Contains(s.pinned, rec.Name)
	}
	return img, nil
}

// List implements storage.Images; images whose content is damaged are left
// out, so that they get pulled again.
func (s *Store) List(ctx context.Context) ([]storage.Image, error) {
	ctx = s.in(ctx)
	records, err := s.records(ctx)
	if err != nil {
		return nil, err
	}
	var list []storage.Image
	for id, recs := range records {
		img, err := s.image(ctx, id, recs)
		if err != nil {
			s.log.Warn("image left out of the list: its content is damaged", "image", id, "error", err)
			continue
		}
		list = append(list, img)
	}
	slices.SortFunc(list, func(a, b storage.Image) int { return strings.Compare(a.ID, b.ID) })
	return list, nil
}

// atOnce makes one transaction of what change does to the metadata with the
// context that it is given: an image has all of its names or none, or removing
// it by one of them could not be repeated.
func (s *Store) atOnce(ctx context.Context, change func(context.Context) error) error {
	return s.meta.Update(func(tx *bolt.Tx) error { return change(boltutil.WithTransaction(ctx, tx)) })
}

// Remove implements storage.Images.
func (s *Store) Remove(ctx context.Context, ref string) error {
	ctx = s.in(ctx)
	id, err := s.lookup(ctx, ref)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer s.locks.lock(id)()
	records, err := s.records(ctx)
	if err != nil {
		return err
	}
	err = s.atOnce(ctx, func(ctx context.Context) error {
		for _, rec := range records[id] {
			if err := s.images.Delete(ctx, rec.Name); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("remove image %s: %w", rec.Name, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	failpoint.Hit(failpoint.ImageUnnamed)
	s.mu.Lock()
	delete(s.details, id)
	s.mu.Unlock()
	if _, err := s.meta.GarbageCollect(ctx); err != nil {
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	failpoint.Hit(failpoint.ImageCollected)
	return s.dropDisk(ctx, id)
}

// Usage implements storage.Images.
func (s *Store) Usage(context.Context) (storage.Usage, error) {
	u := storage.Usage{Time: time.Now(), Path: s.root}
	var fsStat unix.Statfs_t
	if err := unix.Statfs(s.root, &fsStat); err != nil {
		return u, fmt.Errorf("image store %s: %w", s.root, err)
	}
	u.CapacityBytes = fsStat.Blocks * uint64(fsStat.Bsize)
	u.AvailableBytes = fsStat.Bavail * uint64(fsStat.Bsize)
	err := filepath.WalkDir(s.root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return skipGone(err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return skipGone(err)
		}
		u.Bytes += uint64(st.Blocks) * 512
		u.Inodes++
		return nil
	})
	if err != nil {
		return u, fmt.Errorf("image store %s: %w", s.root, err)
	}
	return u, nil
}

func skipGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// locks is a mutex a key.
type locks struct {
	mu   sync.Mutex
	held map[string]*heldLock
}

type heldLock struct {
	mu    sync.Mutex
	users int
}

// lock waits for key and returns how to unlock it.
func (l *locks) lock(key string) func() {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]*heldLock{}
	}
	h := l.held[key]
	if h == nil {
		h = &heldLock{}
		l.held[key] = h
	}
	h.users++
	l.mu.Unlock()
	h.mu.Lock()
	return func() {
		h.mu.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(l.held, key)
		}
	}
}
