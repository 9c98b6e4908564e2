package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/openatoll/atoll/storage"
)

var _ storage.DamageTeller = (*Store)(nil)

// maxUntold is how much damage waits for somebody who wants to hear of it.
const maxUntold = 64

// damages are told once each: what was told of a layer that still is damaged
// is not told again.
type damages struct {
	fn     func(storage.Damage)
	untold []storage.Damage // before there is fn
	told   map[digest.Digest]bool
	checks map[string]bool // users whose disks are being read again
}

// Damages implements storage.DamageTeller.
func (s *Store) Damages(fn func(storage.Damage)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.damages.untold {
		fn(d)
	}
	s.damages.fn, s.damages.untold = fn, nil
}

func (s *Store) tell(d storage.Damage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(d.Holds) == 0:
	case s.damages.fn != nil:
		s.damages.fn(d)
	case len(s.damages.untold) < maxUntold:
		s.damages.untold = append(s.damages.untold, d)
	}
}

// tellMended tells that a layer is right again.
func (s *Store) tellMended(ctx context.Context, id digest.Digest) {
	s.mu.Lock()
	delete(s.damages.told, id)
	s.mu.Unlock()
	s.tell(storage.Damage{Layer: id.String(), Mended: true, Holds: s.holdsOf(ctx, hasLayer(id), "")})
}

// tellUnmended tells of those layers that are damaged and stay so for now.
func (s *Store) tellUnmended(ctx context.Context, ids []digest.Digest) {
	for _, id := range ids {
		if rec, err := s.layerRecord(id); err != nil || rec.Damaged == "" {
			continue
		}
		s.mu.Lock()
		told := s.damages.told[id]
		s.damages.told[id] = true
		s.mu.Unlock()
		if !told {
			s.tell(storage.Damage{Layer: id.String(), Holds: s.holdsOf(ctx, hasLayer(id), "")})
		}
	}
}

// lostMetadata is what is wrong with the metadata of an image.
type lostMetadata struct{ error }

func (e lostMetadata) Unwrap() error { return e.error }

// tellMetadata tells all who have the disk, but for the one who asks for it,
// that its metadata was made again, if why says that it had to be.
func (s *Store) tellMetadata(ctx context.Context, image, asks string, why error) {
	if lost := (lostMetadata{}); errors.As(why, &lost) {
		s.tell(storage.Damage{Mended: true, Holds: s.holdsOf(ctx, func(id string, _ diskRecord) bool { return id == image }, asks)})
	}
}

// holdsOf returns who holds the disks that are concerned, but for one.
func (s *Store) holdsOf(ctx context.Context, concerns func(id string, rec diskRecord) bool, but string) []storage.Hold {
	names := map[string]string{}
	records, _ := s.records(s.in(ctx)) // without it, IDs
	_ = s.eachDisk(func(id string, rec diskRecord) error {
		if concerns(id, rec) {
			names[id] = id
			for _, r := range records[id] {
				if names[id] == id || strings.Contains(names[id], "@") {
					names[id] = r.Name
				}
			}
		}
		return nil
	})
	var holds []storage.Hold
	_ = s.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketHolds).ForEach(func(k, _ []byte) error {
			user, id, _ := strings.Cut(string(k), "\x00")
			if name := names[id]; name != "" && user != but {
				holds = append(holds, storage.Hold{User: user, Image: name})
			}
			return nil
		})
	})
	return holds
}

func hasLayer(id digest.Digest) func(string, diskRecord) bool {
	return func(_ string, rec diskRecord) bool {
		return slices.ContainsFunc(rec.Layers, func(l diskLayer) bool { return l.DiffID == id })
	}
}

// damaged notes that a layer is, for the reason why, and returns that.
func (s *Store) damaged(ctx context.Context, id digest.Digest, why error) error {
	s.damagedLayers.Add(1)
	s.logDamage(ctx, "an image layer is damaged and will be fetched again: pods that run keep what they have", why, hasLayer(id), "layer", id)
	err := s.changeLayer(id, func(r *layerRecord) { r.Damaged = why.Error() })
	return errors.Join(fmt.Errorf("layer %s: %w", id, why), err)
}

// logDamage names images and pods that have a part in what is damaged.
func (s *Store) logDamage(ctx context.Context, what string, err error, concerns func(string, diskRecord) bool, keys ...any) {
	var images, pods []string
	_ = s.eachDisk(func(id string, rec diskRecord) error {
		if concerns(id, rec) {
			images = append(images, id)
		}
		return nil
	})
	for _, h := range s.holdsOf(ctx, concerns, "") {
		if !slices.Contains(pods, h.User) {
			pods = append(pods, h.User)
		}
	}
	s.log.Error(what, append(keys, "images", images, "pods", pods, "error", err)...)
}

// Recheck implements storage.DamageTeller.
func (s *Store) Recheck(user string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.damages.checks[user] || s.ctx.Err() != nil {
		return
	}
	s.damages.checks[user] = true
	s.scrubbing.Go(func() {
		if err := s.recheck(s.ctx, user); err != nil && s.ctx.Err() == nil {
			s.log.Warn("not all of a pod's image disks could be looked at", "pod", user, "error", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.damages.checks, user)
	})
}

func (s *Store) recheck(ctx context.Context, user string) error {
	held := map[string]bool{}
	err := s.bolt.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketHolds).ForEach(func(k, _ []byte) error {
			if u, id, _ := strings.Cut(string(k), "\x00"); u == user {
				held[id] = true
			}
			return nil
		})
	})
	layers := map[digest.Digest]bool{}
	err = errors.Join(err, s.eachDisk(func(id string, rec diskRecord) error {
		if !held[id] {
			return nil
		}
		for _, l := range rec.Layers {
			layers[l.DiffID] = true
		}
		return s.scrubDisk(ctx, id, rec)
	}))
	return errors.Join(err, s.scrubLayers(ctx, func(id digest.Digest, _ layerRecord) bool { return layers[id] }))
}

// mend fetches a damaged layer again by the names of an image that has it.
func (s *Store) mend(ctx context.Context, id digest.Digest) {
	var images []string
	_ = s.eachDisk(func(image string, rec diskRecord) error {
		if hasLayer(id)(image, rec) {
			images = append(images, image)
		}
		return nil
	})
	var err error
	for _, image := range images {
		if err = s.refetch(ctx, image); err == nil {
			s.log.Info("a damaged image layer was fetched again", "layer", id, "image", image)
			return
		}
	}
	s.log.Warn("a damaged image layer could not be fetched again without credentials: the next pod has its image pulled", "layer", id, "images", images, "error", err)
	s.tellUnmended(ctx, []digest.Digest{id})
}

// scrubDisk reads the metadata of an image; what is damaged is made again when
// it is wanted.
func (s *Store) scrubDisk(ctx context.Context, id string, rec diskRecord) error {
	if rec.Digest == "" { // damaged, and not wanted since
		return nil
	}
	err := s.readMeta(ctx, id, rec)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if !errdefs.IsDataLoss(err) {
		return err
	}
	s.tellMetadata(ctx, id, "", s.metadataDamaged(ctx, id, err))
	return s.recordDisk(id, diskRecord{Version: rec.Version, Layers: rec.Layers})
}

// metadataDamaged notes that an image's metadata is, for the reason why, and
// returns that.
func (s *Store) metadataDamaged(ctx context.Context, image string, why error) error {
	s.damagedMetadata.Add(1)
	s.logDamage(ctx, "the metadata of an image is damaged and is made again: pods that run keep what they have",
		why, func(id string, _ diskRecord) bool { return id == image }, "image", image)
	return lostMetadata{why}
}
