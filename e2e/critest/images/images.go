// Package images builds what upstream's CRI test suite runs: images under the
// names that they have at public registries, from Debian packages, upstream's
// busybox and Go programs. Nothing is pulled from a registry.
package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// NameAnnotation holds an image's full name, host and tag included, in the
// layout's index.
const NameAnnotation = "org.opencontainers.image.ref.name"

// DigestName is the image that the suite pulls by a digest; the suite's
// binary must be told ours.
const DigestName = staging + "test-image-digest:latest"

const (
	staging = "gcr.io/k8s-staging-cri-tools/"
	e2e     = "registry.k8s.io/e2e-test-images/"
	ecr     = "public.ecr.aws/docker/library/busybox:"
)

// An image has several names when they must be of one digest.
type image struct {
	names  []string
	layers []string
	config v1.Config
}

// markers are layers of one empty file: images that differ upstream must
// differ here.
var markers = []string{"1", "2", "3", "latest", "digest", "tags", "test", "all", "1.35.0-glibc", "b1", "1-uclibc", "1-glibc", "1-musl"}

func images() []image {
	shell := v1.Config{Cmd: []string{"sh"}}
	as := func(user string) v1.Config { return v1.Config{Cmd: []string{"sh"}, User: user} }
	nginx := v1.Config{Cmd: []string{"nginx", "-g", "daemon off;"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}, StopSignal: "SIGTERM"}
	all := []image{
		{[]string{"registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9"}, []string{"pause"}, v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}},
		{[]string{e2e + "busybox:1.29-2"}, []string{"busybox"}, shell},
		{[]string{e2e + "nginx:1.14-2"}, []string{"busybox", "nginx"}, nginx},
		{[]string{staging + "hostnet-nginx-amd64:latest"}, []string{"busybox", "nginx", "hostnet-nginx"}, nginx},
		{[]string{e2e + "httpd:2.4.39-4"}, []string{"debian", "httpd"}, v1.Config{
			Cmd: []string{"httpd-foreground"}, ExposedPorts: map[string]struct{}{"80/tcp": {}}, WorkingDir: "/usr/local/apache2",
			Env: []string{"PATH=/usr/local/apache2/bin:" + path, "HTTPD_PREFIX=/usr/local/apache2"},
		}},
		{[]string{e2e + "nonewprivs:1.3"}, []string{"busybox", "nonewprivs"}, v1.Config{Cmd: []string{"nnp"}}},
		{[]string{staging + "test-image-user-uid:latest"}, []string{"busybox"}, as("1002")},
		{[]string{staging + "test-image-user-username:latest"}, []string{"busybox"}, as("www-data")},
		{[]string{staging + "test-image-user-uid-group:latest"}, []string{"busybox"}, as("1003:1004")},
		{[]string{staging + "test-image-user-username-group:latest"}, []string{"busybox"}, as("www-data:1004")},
		{[]string{staging + "test-image-predefined-group:latest"}, []string{"busybox", "predefined-group"}, as("1000")},
		{[]string{staging + "test-image-tags:1", staging + "test-image-tags:2", staging + "test-image-tags:3"}, []string{"busybox", "marker-tags"}, shell},
	}
	for name, marker := range map[string]string{
		staging + "test-image-1:latest": "1", staging + "test-image-2:latest": "2", staging + "test-image-3:latest": "3",
		staging + "test-image-latest:latest": "latest", DigestName: "digest",
		staging + "test-image-tag:test": "test", staging + "test-image-tag:all": "all",
		ecr + "1.35.0-glibc": "1.35.0-glibc", ecr + "1": "b1", ecr + "1-uclibc": "1-uclibc", ecr + "1-glibc": "1-glibc", ecr + "1-musl": "1-musl",
	} {
		all = append(all, image{[]string{name}, []string{"busybox", "marker-" + marker}, shell})
	}
	return all
}

const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// sources are this package's own: when they change, the images are built
// anew.
//
//go:embed *.go
var sources embed.FS

func key() (string, error) {
	h := sha256.New()
	entries, err := sources.ReadDir(".")
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		text, err := sources.ReadFile(e.Name())
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %d\n%s", e.Name(), len(text), text)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

// Build makes the images in an OCI layout below dir, unless it is there, and
// returns the layout's path. Packages and what was compiled are kept in dir
// too. It needs root, apt-get and a C compiler.
func Build(ctx context.Context, dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	key, err := key()
	if err != nil {
		return "", err
	}
	done := filepath.Join(dir, "oci-"+key)
	if _, err := os.Stat(done); err == nil {
		return done, nil
	}
	d, err := newDebian(dir)
	if err != nil {
		return "", err
	}
	temp, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(temp)
	w := &workshop{debian: d, root: filepath.Join(temp, "layers")}
	if w.busybox, err = busybox(ctx, d); err != nil {
		return "", err
	}
	if err := w.build(ctx); err != nil {
		return "", err
	}
	if err := assemble(filepath.Join(temp, "oci"), w); err != nil {
		return "", err
	}
	old, err := filepath.Glob(filepath.Join(dir, "oci-*"))
	for _, o := range old {
		err = errors.Join(err, os.RemoveAll(o))
	}
	return done, errors.Join(err, os.Rename(filepath.Join(temp, "oci"), done))
}

func assemble(out string, w *workshop) error {
	l, err := layout.Write(out, empty.Index)
	if err != nil {
		return err
	}
	layers := map[string]v1.Layer{}
	for _, im := range images() {
		var stack []v1.Layer
		for _, name := range im.layers {
			if layers[name] == nil {
				if layers[name], err = layer(w.dir(name)); err != nil {
					return fmt.Errorf("layer %s: %w", name, err)
				}
			}
			stack = append(stack, layers[name])
		}
		index, err := compose(im.config, stack)
		if err != nil {
			return fmt.Errorf("image %s: %w", im.names[0], err)
		}
		for _, name := range im.names {
			if err := l.AppendIndex(index, layout.WithAnnotations(map[string]string{NameAnnotation: name})); err != nil {
				return fmt.Errorf("image %s: %w", name, err)
			}
		}
	}
	return nil
}

func layer(dir string) (v1.Layer, error) {
	data, err := archive(dir)
	if err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
}

// compose makes an image and an index around it, as public images have one.
func compose(config v1.Config, layers []v1.Layer) (v1.ImageIndex, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.AppendLayers(img, layers...)
	if err != nil {
		return nil, err
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.Architecture, file.OS, file.Created = "amd64", "linux", v1.Time{Time: time.Unix(0, 0).UTC()}
	if config.Env == nil {
		config.Env = []string{"PATH=" + path}
	}
	file.Config = config
	if img, err = mutate.ConfigFile(img, file); err != nil {
		return nil, err
	}
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex), mutate.IndexAddendum{
		Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}},
	}), nil
}
