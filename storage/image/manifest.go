package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What an image's documents may have, in bytes.
const (
	MaxManifest = 4 << 20 // also of an index, and of a token server's answer
	MaxConfig   = 8 << 20
	// maxIndexes within indexes.
	maxIndexes = 3
)

// A manifest is an image, once its config has come.
type manifest struct {
	desc ocispec.Descriptor
	ocispec.Manifest
	config ocispec.Image
}

func (m *manifest) id() string { return m.Config.Digest.String() }

// layerTypes are those of tar layers, packed in a way that package erofs knows.
var layerTypes = []string{
	ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
	images.MediaTypeDockerSchema2Layer, images.MediaTypeDockerSchema2LayerGzip, images.MediaTypeDockerSchema2LayerZstd,
}

// platform is the one that pod VMs run.
var platform = platforms.Only(ocispec.Platform{OS: "linux", Architecture: "amd64"})

// refuse is about an image that this node cannot or will not use.
func (p *puller) refuse(format string, args ...any) error {
	return classed(errdefs.ErrFailedPrecondition, "image %s cannot be used: %s", p.ref, fmt.Sprintf(format, args...))
}

// nonsense is about an answer that no registry should give.
func (p *puller) nonsense(format string, args ...any) error {
	return classed(errdefs.ErrDataLoss, "image %s: what registry %s sent is not an image: %s: check the reference, and push the image again",
		p.ref, p.ref.host(), fmt.Sprintf(format, args...))
}

// manifest fetches what desc describes and, through indexes, the manifest of
// the platform's image.
func (p *puller) manifest(ctx context.Context, desc ocispec.Descriptor, depth int) (*manifest, error) {
	if !images.IsManifestType(desc.MediaType) && !images.IsIndexType(desc.MediaType) {
		return nil, p.nonsense("a document of type %.100q", desc.MediaType)
	}
	if err := p.blob(ctx, desc, MaxManifest); err != nil {
		return nil, err
	}
	data, err := content.ReadBlob(ctx, p.store.content, desc)
	if err != nil {
		return nil, err
	}
	var doc struct {
		ocispec.Manifest
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, p.nonsense("%v", err)
	}
	if images.IsManifestType(desc.MediaType) {
		if len(doc.Manifests) > 0 {
			return nil, p.nonsense("a manifest that is an index as well")
		}
		return &manifest{desc: desc, Manifest: doc.Manifest}, nil
	}
	if len(doc.Layers) > 0 || doc.Config.Digest != "" {
		return nil, p.nonsense("an index that is a manifest as well")
	}
	if depth++; depth > maxIndexes {
		return nil, p.nonsense("indexes within indexes, %d deep", depth)
	}
	child, err := p.choose(doc.Manifests)
	if err != nil {
		return nil, err
	}
	m, err := p.manifest(ctx, child, depth)
	if err != nil {
		return nil, err
	}
	return m, p.store.link(ctx, desc.Digest, []ocispec.Descriptor{child})
}

// choose picks the platform's best manifest; one that does not say its
// platform is tried when there is no other (its config will tell).
func (p *puller) choose(list []ocispec.Descriptor) (ocispec.Descriptor, error) {
	var fits, silent []ocispec.Descriptor
	var have []string
	for _, desc := range list {
		switch {
		case desc.Platform == nil:
			silent = append(silent, desc)
		case platform.Match(*desc.Platform):
			fits = append(fits, desc)
		default:
			have = append(have, platforms.Format(*desc.Platform))
		}
	}
	if len(fits) == 0 {
		fits = silent
	} else {
		slices.SortStableFunc(fits, func(a, b ocispec.Descriptor) int {
			switch {
			case platform.Less(*a.Platform, *b.Platform):
				return -1
			case platform.Less(*b.Platform, *a.Platform):
				return 1
			}
			return 0
		})
	}
	if len(fits) == 0 {
		return ocispec.Descriptor{}, p.wrongPlatform(have)
	}
	return fits[0], nil
}

func (p *puller) wrongPlatform(have []string) error {
	slices.Sort(have)
	return classed(errdefs.ErrNotFound, "image %s has no variant for linux/amd64 (it has %.300q): choose an image that has, or build one", p.ref, slices.Compact(have))
}

// config fetches and checks the image's config.
func (p *puller) config(ctx context.Context, m *manifest) error {
	if !images.IsConfigType(m.Config.MediaType) {
		return p.nonsense("its config is of type %.100q, so it is an artifact of another kind", m.Config.MediaType)
	}
	if most := p.store.limits.MaxLayers(); len(m.Layers) > most {
		return p.refuse("it has %d layers, and may have %d: build it with fewer", len(m.Layers), most)
	}
	for _, layer := range m.Layers {
		if images.IsNonDistributable(layer.MediaType) {
			return p.refuse("a layer is of type %.100q, which registries do not give: build it on a base whose layers can be distributed", layer.MediaType)
		}
		if !slices.Contains(layerTypes, layer.MediaType) {
			return p.refuse("a layer is of type %.100q, and only tar layers can be unpacked", layer.MediaType)
		}
	}
	if err := p.blob(ctx, m.Config, MaxConfig); err != nil {
		return err
	}
	config, err := p.store.readConfig(ctx, m.Config)
	if err != nil {
		return p.nonsense("%v", err)
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return p.nonsense("%d layers, and a config with %d", len(m.Layers), len(config.RootFS.DiffIDs))
	}
	for _, id := range config.RootFS.DiffIDs {
		if err := id.Validate(); err != nil {
			return p.nonsense("diff ID %.100q: %v", id, err)
		}
	}
	// Very old images do not say; they are what everything was then.
	if config.OS != "" && config.Architecture != "" && !platform.Match(config.Platform) {
		return p.wrongPlatform([]string{platforms.Format(config.Platform)})
	}
	m.config = config
	return nil
}

func (s *Store) readConfig(ctx context.Context, desc ocispec.Descriptor) (ocispec.Image, error) {
	var config ocispec.Image
	data, err := content.ReadBlob(ctx, s.content, desc)
	if err != nil {
		return config, err
	}
	return config, json.Unmarshal(data, &config)
}

func checkDescriptor(desc ocispec.Descriptor) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.100q: %w", desc.Digest, err)
	}
	if desc.Digest.Algorithm() != digest.SHA256 && desc.Digest.Algorithm() != digest.SHA512 {
		return fmt.Errorf("digest %s: want sha256 or sha512", desc.Digest)
	}
	if desc.Size <= 0 {
		return fmt.Errorf("%s of %d bytes", desc.Digest, desc.Size)
	}
	return nil
}

// hasBlob looks whether a blob is here in its full size. One of which the
// database knows more than the disk is forgotten.
func (s *Store) hasBlob(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	_, err := s.content.Info(ctx, desc.Digest)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	ra, err := s.content.ReaderAt(ctx, desc)
	if err == nil {
		size := ra.Size()
		if err := ra.Close(); err != nil {
			return false, err
		}
		if size == desc.Size {
			return true, nil
		}
	}
	return false, s.forgetBlob(ctx, desc)
}

func (s *Store) forgetBlob(ctx context.Context, desc ocispec.Descriptor) error {
	s.log.Warn("a blob in the image store is damaged and is fetched again", "digest", desc.Digest)
	if err := s.content.Delete(ctx, desc.Digest); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	_, err := s.meta.GarbageCollect(ctx) // or the new one would be taken for the old
	return err
}

// A detail is what of an image's documents is asked for often.
type detail struct {
	manifest  *manifest
	config    ocispec.Image
	documents int64 // bytes
}

// detail reads an image's documents from the store.
func (s *Store) detail(ctx context.Context, id string, record images.Image) (*detail, error) {
	s.mu.Lock()
	d := s.details[id]
	s.mu.Unlock()
	if d != nil {
		return d, nil
	}
	m, err := s.readManifest(ctx, record.Target, id, 0)
	if err != nil {
		return nil, classed(errdefs.ErrDataLoss, "image %s: its content on this node is damaged: pull it again: %v", record.Name, err)
	}
	d = &detail{manifest: m, config: m.config, documents: m.desc.Size + m.Config.Size}
	s.mu.Lock()
	s.details[id] = d
	s.mu.Unlock()
	return d, nil
}

// readManifest finds the manifest below desc whose config is id.
func (s *Store) readManifest(ctx context.Context, desc ocispec.Descriptor, id string, depth int) (*manifest, error) {
	data, err := content.ReadBlob(ctx, s.content, desc)
	if err != nil {
		return nil, err
	}
	var doc struct {
		ocispec.Manifest
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	if images.IsManifestType(desc.MediaType) {
		if doc.Config.Digest.String() != id {
			return nil, fmt.Errorf("manifest %s has another config: %w", desc.Digest, errdefs.ErrNotFound)
		}
		config, err := s.readConfig(ctx, doc.Config)
		return &manifest{desc: desc, Manifest: doc.Manifest, config: config}, err
	}
	err = fmt.Errorf("index %s has no manifest with config %s: %w", desc.Digest, id, errdefs.ErrNotFound)
	if depth >= maxIndexes {
		return nil, err
	}
	for _, child := range doc.Manifests {
		m, childErr := s.readManifest(ctx, child, id, depth+1)
		if childErr == nil {
			return m, nil
		}
		err = errors.Join(err, childErr)
	}
	return nil, err
}
