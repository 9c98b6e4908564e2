package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Seed offers the images of an OCI layout: each manifest of its index that has
// a full reference ("atoll.local/web:latest") as the annotation
// org.opencontainers.image.ref.name. A tag that exists is replaced. Blobs are
// hard links where that goes.
func (r *Registry) Seed(ctx context.Context, layout string) error {
	var index ocispec.Index
	data, err := os.ReadFile(filepath.Join(layout, ocispec.ImageIndexFile))
	if err == nil {
		err = json.Unmarshal(data, &index)
	}
	if err != nil {
		return fmt.Errorf("demo images in %s: %w", layout, err)
	}
	for _, desc := range index.Manifests {
		ref := desc.Annotations[ocispec.AnnotationRefName]
		if ref == "" {
			continue
		}
		name, tag, err := repository(ref)
		if err == nil {
			err = r.seed(ctx, layout, name, tag, desc)
		}
		if err != nil {
			return fmt.Errorf("demo image %s in %s: %w", ref, layout, err)
		}
	}
	return nil
}

func (r *Registry) seed(ctx context.Context, layout, name, ref string, desc ocispec.Descriptor) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	data, err := os.ReadFile(layoutBlob(layout, desc.Digest))
	if err != nil {
		return err
	}
	if digest.FromBytes(data) != desc.Digest {
		return fmt.Errorf("manifest %s is damaged: build the images again", desc.Digest)
	}
	var m struct {
		Config    *ocispec.Descriptor  `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		Manifests []ocispec.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return err
	}
	for _, child := range m.Manifests {
		if err := r.seed(ctx, layout, name, child.Digest.String(), child); err != nil {
			return err
		}
	}
	blobs := m.Layers
	if m.Config != nil {
		blobs = append(blobs, *m.Config)
	}
	for _, blob := range blobs {
		if err := r.adopt(layoutBlob(layout, blob.Digest), blob.Digest); err != nil {
			return err
		}
	}
	return r.putLinked(name, ref, desc.MediaType, data)
}

func layoutBlob(layout string, d digest.Digest) string {
	return filepath.Join(layout, ocispec.ImageBlobsDir, "sha256", d.Encoded())
}

// adopt makes a layout's blob one of the registry's.
func (r *Registry) adopt(path string, d digest.Digest) error {
	if _, err := parseDigest(d.String()); err != nil {
		return err
	}
	if _, err := os.Stat(r.blobPath(d)); err == nil {
		return nil
	}
	if os.Link(path, r.blobPath(d)) == nil {
		return nil
	}
	src, err := os.Open(path)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.CreateTemp(filepath.Join(r.dir, "uploads"), "seed-*")
	if err != nil {
		return err
	}
	defer os.Remove(dst.Name())
	_, err = io.Copy(dst, src)
	if err := errors.Join(err, dst.Close()); err != nil {
		return err
	}
	return os.Rename(dst.Name(), r.blobPath(d))
}

// WriteHosts writes hostsDir/<name>/hosts.toml, by which image stores reach
// the registry called name (as in "atoll.local/web") at url, such as
// "http://127.0.0.1:5000".
func WriteHosts(hostsDir, name, url string) error {
	if strings.ContainsAny(name, "/\\ \"") || name == "" || strings.HasPrefix(name, ".") || strings.ContainsAny(url, "\"\\\n") {
		return fmt.Errorf("hosts.toml of registry %q at %q: not a name or not a URL", name, url)
	}
	dir := filepath.Join(hostsDir, name)
	if host, port, ok := strings.Cut(name, ":"); ok {
		dir = filepath.Join(hostsDir, host+"_"+port+"_") // containerd's way with ports
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("hosts.toml of registry %s: %w", name, err)
	}
	text := fmt.Sprintf("# Written by atoll up: where images of %s come from.\nserver = %q\ncapabilities = [\"pull\", \"resolve\"]\n", name, url)
	path := filepath.Join(dir, "hosts.toml")
	temp := path + ".new"
	if err := os.WriteFile(temp, []byte(text), 0o644); err != nil {
		return fmt.Errorf("hosts.toml of registry %s: %w", name, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("hosts.toml of registry %s: %w", name, err)
	}
	return nil
}
