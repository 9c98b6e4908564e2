package main

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	digest "github.com/opencontainers/go-digest"

	"github.com/openatoll/atoll/storage/erofs"
	"github.com/openatoll/atoll/storage/treesum"
)

// epoch is the time of everything in the images, so that they can be
// reproduced.
var epoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

func checkStatic(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("%s is dynamically linked: apt-get install busybox-static, or name a static one with -busybox", path)
		}
	}
	return nil
}

// A layerTar collects the entries of one layer.
type layerTar struct {
	buf bytes.Buffer
	tw  *tar.Writer
	err error
}

func newLayer() *layerTar {
	l := &layerTar{}
	l.tw = tar.NewWriter(&l.buf)
	return l
}

// add writes an entry with contents; what is zero in hdr gets a default.
func (l *layerTar) add(hdr tar.Header, contents []byte) *layerTar {
	if hdr.Typeflag == 0 {
		hdr.Typeflag = tar.TypeReg
		if strings.HasSuffix(hdr.Name, "/") {
			hdr.Typeflag = tar.TypeDir
		}
	}
	if hdr.ModTime.IsZero() {
		hdr.ModTime = epoch
	}
	hdr.Size = int64(len(contents))
	err := l.tw.WriteHeader(&hdr)
	if err == nil {
		_, err = l.tw.Write(contents)
	}
	l.err = errors.Join(l.err, err)
	return l
}

func (l *layerTar) dir(name string, mode int64) *layerTar {
	return l.add(tar.Header{Name: name + "/", Mode: mode}, nil)
}

func (l *layerTar) file(name string, mode int64, contents []byte) *layerTar {
	return l.add(tar.Header{Name: name, Mode: mode}, contents)
}

func (l *layerTar) symlink(name, target string) *layerTar {
	return l.add(tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, nil)
}

func (l *layerTar) link(name, target string, mode int64) *layerTar {
	return l.add(tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: mode}, nil)
}

// layer ends the tar and packs it the way that media names.
func (l *layerTar) layer(media types.MediaType) (v1.Layer, error) {
	if err := errors.Join(l.err, l.tw.Close()); err != nil {
		return nil, err
	}
	data := l.buf.Bytes()
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	switch media {
	case types.OCIUncompressedLayer:
		return static.NewLayer(data, media), nil
	case types.OCILayerZStd:
		return tarball.LayerFromOpener(open, tarball.WithMediaType(media), tarball.WithCompression(compression.ZStd))
	}
	return tarball.LayerFromOpener(open, tarball.WithMediaType(media))
}

// A demoImage is one of those we make.
type demoImage struct {
	name  string
	image v1.Image
}

func (in *inputs) images() ([]demoImage, error) {
	var images []demoImage
	for _, m := range []struct {
		name   string
		layers func() []packed
		config v1.Config
	}{
		{"web", in.webLayers, v1.Config{
			Entrypoint: []string{"/web"}, User: "65532:65532", WorkingDir: "/",
			Env: []string{"PATH=/"}, ExposedPorts: map[string]struct{}{"8080/tcp": {}}, StopSignal: "SIGTERM",
		}},
		{"busybox", in.busyboxLayers, v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}}},
		{"pause", in.pauseLayers, v1.Config{Entrypoint: []string{"/pause"}, User: "65535:65535"}},
		{"tree", in.treeLayers, v1.Config{Entrypoint: []string{"/bin/treesum"}, Env: []string{"PATH=/bin"}}},
	} {
		img, err := assemble(m.layers(), m.config)
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", m.name, err)
		}
		images = append(images, demoImage{m.name, img})
	}
	return images, nil
}

type packed struct {
	tar   *layerTar
	media types.MediaType
}

func assemble(layers []packed, config v1.Config) (v1.Image, error) {
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, p := range layers {
		l, err := p.tar.layer(p.media)
		if err != nil {
			return nil, err
		}
		img, err = mutate.Append(img, mutate.Addendum{Layer: l, MediaType: p.media, History: v1.History{Created: v1.Time{Time: epoch}, CreatedBy: "mkimages"}})
		if err != nil {
			return nil, err
		}
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Created, cf.Config = "linux", "amd64", v1.Time{Time: epoch}, config
	return mutate.ConfigFile(img, cf)
}

// skeleton is what programs expect of every root.
func skeleton() *layerTar {
	l := newLayer().dir("etc", 0o755).dir("tmp", 0o1777).dir("proc", 0o555).dir("sys", 0o555).dir("dev", 0o755)
	l.file("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nnonroot:x:65532:65532:nonroot:/:/bin/false\n"))
	return l.file("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\nnonroot:x:65532:\n"))
}

func (in *inputs) webLayers() []packed {
	return []packed{{skeleton().file("web", 0o755, in.web), types.OCILayer}}
}

func (in *inputs) pauseLayers() []packed {
	return []packed{{newLayer().file("pause", 0o755, in.pause), types.OCILayer}}
}

func (in *inputs) busyboxLayers() []packed {
	return []packed{{in.busyboxTo(skeleton()), types.OCILayer}}
}

func (in *inputs) busyboxTo(l *layerTar) *layerTar {
	l.dir("bin", 0o755).dir("sbin", 0o755).dir("usr", 0o755).dir("usr/bin", 0o755).dir("usr/sbin", 0o755)
	l.dir("root", 0o700).dir("home", 0o755).dir("run", 0o755).dir("var", 0o755).dir("var/tmp", 0o1777)
	l.file("bin/busybox", 0o755, in.busybox)
	for _, applet := range in.applets {
		l.symlink(applet, "/bin/busybox")
	}
	return l
}

// write makes out the layout of images, as a whole.
func write(out string, images []demoImage, sum string) error {
	if err := os.MkdirAll(filepath.Dir(filepath.Clean(out)), 0o755); err != nil {
		return err
	}
	temp, err := os.MkdirTemp(filepath.Dir(filepath.Clean(out)), ".images-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	if err := os.Chmod(temp, 0o755); err != nil {
		return err
	}
	path, err := layout.Write(temp, empty.Index)
	if err != nil {
		return err
	}
	for _, img := range images {
		ref := "atoll.local/" + img.name + ":latest"
		if err := path.AppendImage(img.image, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": ref})); err != nil {
			return fmt.Errorf("image %s: %w", img.name, err)
		}
		if err := expect(temp, img); err != nil {
			return fmt.Errorf("image %s: %w", img.name, err)
		}
		id, err := img.image.Digest()
		if err != nil {
			return err
		}
		fmt.Println(ref, id)
	}
	if err := os.WriteFile(filepath.Join(temp, "inputs.sha256"), []byte(sum), 0o644); err != nil {
		return err
	}
	if err := os.RemoveAll(out); err != nil {
		return err
	}
	return os.Rename(temp, out)
}

// expect writes what a container of the image should see.
func expect(dir string, img demoImage) error {
	parts, err := img.image.Layers()
	if err != nil {
		return err
	}
	var layers []erofs.Layer
	for _, part := range parts {
		id, err := part.DiffID()
		if err != nil {
			return err
		}
		layers = append(layers, erofs.Layer{
			Name: id.String(), DiffID: digest.Digest(id.String()),
			Open: func(context.Context) (io.ReadCloser, error) { return part.Compressed() },
		})
	}
	entries, err := erofs.Manifest(context.Background(), layers, erofs.Limits{})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "expected"), 0o755); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "expected", img.name+".jsonl"))
	if err != nil {
		return err
	}
	return errors.Join(treesum.Write(f, entries), f.Close())
}
