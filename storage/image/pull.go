package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/internal/failpoint"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/erofs"
)

// A flightKey is what pulls must have in common to be one. The credentials
// belong to it: who has none must not get in beside somebody who has.
type flightKey struct {
	ref  string
	auth storage.Auth
}

// A flight is a pull under way and those who wait for it. It goes on until it
// is done or nobody waits any more.
type flight struct {
	cancel context.CancelFunc
	done   chan struct{}
	image  storage.Image
	err    error

	mu       sync.Mutex
	waiting  int
	last     storage.Progress
	watchers map[int]func(storage.Progress)
}

// Pull implements storage.Images. Progress is called from several goroutines,
// one call at a time, and must not block.
func (s *Store) Pull(ctx context.Context, name string, auth *storage.Auth, progress func(storage.Progress)) (storage.Image, error) {
	r, err := parseRef(name)
	if err != nil {
		return storage.Image{}, err
	}
	key := flightKey{ref: r.String()}
	if auth != nil {
		key.auth = *auth
	}
	f, leave := s.board(key, r, auth, progress)
	defer leave()
	select {
	case <-f.done:
		return f.image, f.err
	case <-ctx.Done():
		return storage.Image{}, fmt.Errorf("pull image %s: %w", r, ctx.Err())
	}
}

// board joins the flight of key, or starts it.
func (s *Store) board(key flightKey, r ref, auth *storage.Auth, progress func(storage.Progress)) (*flight, func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.flights[key]
	if f == nil {
		ctx, cancel := context.WithCancel(s.ctx)
		f = &flight{cancel: cancel, done: make(chan struct{}), watchers: map[int]func(storage.Progress){}}
		s.flights[key] = f
		s.pulling.Go(func() {
			f.image, f.err = s.pull(s.in(ctx), r, auth, f.report)
			cancel()
			s.mu.Lock()
			if s.flights[key] == f {
				delete(s.flights, key)
			}
			s.mu.Unlock()
			close(f.done)
		})
	}
	id := f.join(progress)
	return f, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if f.leave(id) && s.flights[key] == f {
			delete(s.flights, key) // the next pull must not join a cancelled one
		}
	}
}

func (f *flight) join(progress func(storage.Progress)) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := len(f.watchers)
	for f.watchers[id] != nil {
		id++
	}
	f.waiting++
	if progress == nil {
		progress = func(storage.Progress) {}
	}
	f.watchers[id] = progress
	if f.last.Stage != "" {
		progress(f.last)
	}
	return id
}

// leave reports whether nobody is left.
func (f *flight) leave(id int) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.watchers, id)
	if f.waiting--; f.waiting > 0 {
		return false
	}
	f.cancel()
	return true
}

func (f *flight) report(change func(*storage.Progress)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.last)
	for _, watch := range f.watchers {
		watch(f.last)
	}
}

type reporter func(change func(*storage.Progress))

func (rep reporter) stage(stage string) { rep(func(p *storage.Progress) { p.Stage = stage }) }

// leaseTime outlasts every pull; a lease ends with its pull, or at the next
// Open.
const leaseTime = 24 * time.Hour

func (s *Store) pull(ctx context.Context, r ref, auth *storage.Auth, report reporter) (_ storage.Image, err error) {
	start := time.Now()
	defer func() { err = s.explainPull(ctx, r, auth != nil && *auth != storage.Auth{}, err) }()
	s.fetches.RLock()
	lease, err := s.leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime))
	if err != nil {
		s.fetches.RUnlock()
		return storage.Image{}, err
	}
	failpoint.Hit(failpoint.PullLeased)
	defer s.endPull(context.WithoutCancel(ctx), lease, &err)
	ctx = leases.WithLease(ctx, lease.ID)

	ses, err := s.newSession(ctx, r, auth)
	if err != nil {
		return storage.Image{}, err
	}
	defer ses.close()
	p := &puller{store: s, ref: r, session: ses, report: report}
	root, got, unpin, err := p.fetchAndConvert(ctx)
	if err != nil {
		return storage.Image{}, err
	}
	defer unpin()
	names := []string{r.withDigest(root.Digest)}
	if r.tag != "" {
		names = append(names, r.String())
	}
	err = s.atOnce(ctx, func(ctx context.Context) error {
		for _, name := range names {
			if err := s.record(ctx, name, root, got.id()); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return storage.Image{}, err
	}
	failpoint.Hit(failpoint.PullNamed)
	records, err := s.records(ctx)
	if err != nil {
		return storage.Image{}, err
	}
	img, err := s.image(ctx, got.id(), records[got.id()])
	if err != nil {
		return storage.Image{}, err
	}
	report.stage("done")
	s.log.Info("image pulled", "image", r.String(), "id", img.ID, "bytes", img.Size, "duration", time.Since(start))
	return img, nil
}

// endPull gives up what the pull held; after a failed one, what came goes.
func (s *Store) endPull(ctx context.Context, lease leases.Lease, failed *error) {
	s.fetches.RUnlock()
	if err := s.leases.Delete(ctx, lease); err != nil {
		s.log.Warn("the lease of a pull stays until the next start", "error", err)
	}
	failpoint.Hit(failpoint.PullUnleased)
	if *failed == nil {
		return
	}
	_, err := s.meta.GarbageCollect(ctx)
	err = errors.Join(err, s.collectLayers(ctx))
	if err == nil && s.fetches.TryLock() { // else the last of several does it
		err = s.sweepIngests(ctx)
		s.fetches.Unlock()
	}
	if err != nil {
		s.log.Warn("what a failed pull fetched stays for now", "error", err)
	}
}

func (s *Store) record(ctx context.Context, name string, target ocispec.Descriptor, id string) error {
	img := images.Image{Name: name, Target: target, Labels: map[string]string{labelID: id}}
	_, err := s.images.Create(ctx, img)
	if errdefs.IsAlreadyExists(err) {
		_, err = s.images.Update(ctx, img)
	}
	return err
}

// A puller fetches the content of one image.
type puller struct {
	store   *Store
	ref     ref
	session *session
	report  reporter
	fetcher remotes.Fetcher
}

// fetchAndConvert brings an image here and makes its disk. unpin ends the hold
// on its layers, once the image's name holds them.
func (p *puller) fetchAndConvert(ctx context.Context) (root ocispec.Descriptor, m *manifest, unpin func(), err error) {
	root, m, err = p.documents(ctx)
	if err != nil {
		return root, nil, nil, err
	}
	unpin = p.store.pin(m.config.RootFS.DiffIDs)
	err = p.layersAndDisk(ctx, m)
	if lost := (*lostLayer)(nil); errors.As(err, &lost) { // an index was found damaged when it was read
		err = p.layersAndDisk(ctx, m)
	}
	if err != nil {
		p.store.tellUnmended(ctx, m.config.RootFS.DiffIDs)
		unpin()
		return root, nil, nil, err
	}
	return root, m, unpin, nil
}

func (p *puller) layersAndDisk(ctx context.Context, m *manifest) error {
	if err := p.layers(ctx, m); err != nil {
		return err
	}
	p.report.stage("converting")
	return p.store.convert(ctx, p.ref, m)
}

// documents resolves the reference and brings manifest and config of the
// linux/amd64 image here, linked for the garbage collector. It returns what the
// reference names (an index perhaps) and the image.
func (p *puller) documents(ctx context.Context) (ocispec.Descriptor, *manifest, error) {
	var none ocispec.Descriptor
	p.report.stage("resolving")
	name, root, err := p.session.resolver.Resolve(ctx, p.ref.String())
	if err != nil {
		return none, nil, err
	}
	if p.fetcher, err = p.session.resolver.Fetcher(ctx, name); err != nil {
		return none, nil, err
	}
	m, err := p.manifest(ctx, root, 0)
	if err != nil {
		return none, nil, err
	}
	failpoint.Hit(failpoint.PullManifest)
	if err := p.config(ctx, m); err != nil {
		return none, nil, err
	}
	err = p.store.link(ctx, m.desc.Digest, []ocispec.Descriptor{m.Config})
	failpoint.Hit(failpoint.PullLinked)
	return root, m, err
}

// blob fetches one blob of at most limit bytes, unless it is here.
func (p *puller) blob(ctx context.Context, desc ocispec.Descriptor, limit int64) error {
	if err := checkDescriptor(desc); err != nil {
		return p.nonsense("%v", err)
	}
	if desc.Size > limit {
		return p.refuse("its %s has %d bytes, and may have %d", desc.MediaType, desc.Size, limit)
	}
	if here, err := p.store.hasBlob(ctx, desc); err != nil || here {
		return err
	}
	desc.URLs = nil // a registry must not choose what this node talks to
	ctx = withBodyLimit(ctx, desc.Size+1)
	err := remotes.Fetch(ctx, p.store.content, &meteredFetcher{p.fetcher, p.report}, desc)
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// A missingLayer is one to be fetched; number counts from 0.
type missingLayer struct {
	desc   ocispec.Descriptor
	id     digest.Digest
	number int
}

// layers fetches and converts the layers that are not here or damaged, several
// at once.
func (p *puller) layers(ctx context.Context, m *manifest) error {
	budget := p.store.limits.NewBudget()
	missing, total, err := p.missing(ctx, m, budget)
	if err != nil {
		return err
	}
	if err := p.store.checkSpace(p.ref, total); err != nil {
		return err
	}
	p.report(func(pr *storage.Progress) { pr.Stage, pr.Bytes, pr.Total = "fetching", 0, total })
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(p.store.downloads)
	for _, l := range missing {
		group.Go(func() error {
			err := p.layer(ctx, l, budget)
			failpoint.Hit(failpoint.PullLayer)
			if erofs.IsLayerFault(err) {
				err = fmt.Errorf("layer %d of %d (%s): %w", l.number+1, len(m.Layers), l.desc.Digest, err)
				return p.store.explainDisk(p.ref.String(), err)
			}
			return err
		})
	}
	return group.Wait()
}

// missing tells which layers are to be fetched, and their bytes. What the
// others unpack to is taken off budget.
func (p *puller) missing(ctx context.Context, m *manifest, budget *erofs.Budget) (list []missingLayer, total int64, err error) {
	seen := map[digest.Digest]bool{}
	for i, desc := range m.Layers {
		if err := checkDescriptor(desc); err != nil {
			return nil, 0, p.nonsense("%v", err)
		}
		id := m.config.RootFS.DiffIDs[i]
		if seen[id] {
			continue
		}
		seen[id] = true
		rec, err := p.store.layerRecord(id)
		if err == nil {
			err = p.store.checkLayer(ctx, id)
		}
		switch {
		case err == nil:
			if err := budget.Take(rec.Unpacked); err != nil {
				return nil, 0, p.store.explainDisk(p.ref.String(), err)
			}
		case errdefs.IsNotFound(err), errdefs.IsDataLoss(err):
			list = append(list, missingLayer{desc, id, i})
			total += min(desc.Size, math.MaxInt64-total) // sizes are the registry's words
		default:
			return nil, 0, err
		}
	}
	return list, total, nil
}

// layer fetches one, or waits for another pull that does.
func (p *puller) layer(ctx context.Context, l missingLayer, budget *erofs.Budget) error {
	made, err := p.store.ensureLayer(ctx, l.id, func() error {
		if done, err := p.store.layerFromBlob(ctx, l.desc, l.id, budget); done || err != nil {
			return err
		}
		return p.store.convertLayer(ctx, l.desc, l.id, budget, p.open(l.desc))
	})
	if err == nil && !made {
		p.report(func(pr *storage.Progress) { pr.Bytes = min(pr.Bytes+l.desc.Size, pr.Total) })
	}
	return err
}

// open fetches a layer from the registry.
func (p *puller) open(desc ocispec.Descriptor) layerSource {
	desc.URLs = nil // a registry must not choose what this node talks to
	return func(ctx context.Context) (io.ReadCloser, error) {
		return (&meteredFetcher{p.fetcher, p.report}).Fetch(withBodyLimit(ctx, desc.Size+1), desc)
	}
}

// checkSpace refuses what cannot fit before it fills the disk.
func (s *Store) checkSpace(r ref, bytes int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.root, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; bytes > free {
		return classed(errdefs.ErrResourceExhausted,
			"pull image %s: its layers have %d MiB, and the disk under %s has %d MiB free: remove images that are not needed or free space there",
			r, bytes>>20, s.root, free>>20)
	}
	return nil
}

// link keeps children as long as parent is kept.
func (s *Store) link(ctx context.Context, parent digest.Digest, children []ocispec.Descriptor) error {
	info := content.Info{Digest: parent, Labels: map[string]string{}}
	var fields []string
	for _, child := range children {
		key := "containerd.io/gc.ref.content.atoll." + child.Digest.Encoded()[:12]
		info.Labels[key] = child.Digest.String()
		fields = append(fields, "labels."+key)
	}
	_, err := s.content.Update(ctx, info, fields...)
	return err
}

// A meteredFetcher reports what arrives.
type meteredFetcher struct {
	remotes.Fetcher
	report reporter
}

func (m *meteredFetcher) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	rc, err := m.Fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	return &meteredReader{rc, m.report}, nil
}

type meteredReader struct {
	io.ReadCloser
	report reporter
}

func (m *meteredReader) Read(p []byte) (int, error) {
	n, err := m.ReadCloser.Read(p)
	m.report(func(pr *storage.Progress) {
		if pr.Total > 0 {
			pr.Bytes = min(pr.Bytes+int64(n), pr.Total)
		}
	})
	return n, err
}

// Seek is what a content writer starts over with.
func (m *meteredReader) Seek(offset int64, whence int) (int64, error) {
	seeker, ok := m.ReadCloser.(io.Seeker)
	if !ok {
		return 0, fmt.Errorf("seek: %w", errdefs.ErrNotImplemented)
	}
	return seeker.Seek(offset, whence)
}
