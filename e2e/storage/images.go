package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// repositories are those of the suite's images, with the tags of Kubernetes
// v1.36.3. Of nginx and glibc-dns-testing the specs run the shell alone, so
// those two are busybox.
var repositories = map[string]string{
	"busybox": "1.37.0-1", "agnhost": "2.63.0", "nginx": "1.15-4", "glibc-dns-testing": "2.0.0",
}

// buildSuite compiles, from this module, the suite, ginkgo's runner and agnhost.
func buildSuite(ctx context.Context, dir string) error {
	for _, b := range []struct {
		env  string
		args []string
	}{
		{"", []string{"test", "-c", "-tags", "e2estorage", "-o", filepath.Join(dir, "storage.test"), "./e2e/storage/suite"}},
		{"", []string{"build", "-o", filepath.Join(dir, "ginkgo"), "github.com/onsi/ginkgo/v2/ginkgo"}},
		{"CGO_ENABLED=0", []string{"build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "agnhost"), "./e2e/storage/agnhost"}},
	} {
		cmd := exec.CommandContext(ctx, "go", b.args...)
		cmd.Env = os.Environ()
		if b.env != "" {
			cmd.Env = append(cmd.Env, b.env)
		}
		if said, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w:\n%s", strings.Join(b.args, " "), err, said)
		}
	}
	return nil
}

// serveImages makes the images and serves them on loopback until this program
// ends. It returns the registry's address.
func serveImages(o options) (string, error) {
	base, err := busyboxLayer(o.busybox)
	if err != nil {
		return "", err
	}
	program, err := os.ReadFile(filepath.Join(o.build, "agnhost"))
	if err != nil {
		return "", err
	}
	agnhost, err := layer(func(w *tar.Writer) error { return file(w, "agnhost", 0o755, program) })
	if err != nil {
		return "", err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	go func() { _ = http.Serve(l, handler) }() // #nosec G114 -- ends with this program
	for repository, tag := range repositories {
		layers, config := []v1.Layer{base}, v1.Config{Cmd: []string{"sh"}}
		if repository == "agnhost" {
			layers, config = append(layers, agnhost), v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}}
		}
		if err := push(fmt.Sprintf("%s/%s:%s", l.Addr(), repository, tag), config, layers); err != nil {
			return "", err
		}
	}
	return l.Addr().String(), nil
}

func push(reference string, config v1.Config, layers []v1.Layer) error {
	ref, err := name.ParseReference(reference, name.Insecure)
	if err != nil {
		return err
	}
	config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{Architecture: "amd64", OS: "linux", Config: config})
	if err != nil {
		return err
	}
	if image, err = mutate.AppendLayers(image, layers...); err != nil {
		return err
	}
	return remote.Write(ref, image)
}

// busyboxLayer is a root file system of a static busybox and its applets.
func busyboxLayer(path string) (v1.Layer, error) {
	program, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: apt-get install busybox-static", err)
	}
	applets, err := exec.Command(path, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", path, err)
	}
	return layer(func(w *tar.Writer) error {
		for _, dir := range []string{"bin/", "dev/", "etc/", "home/", "mnt/", "proc/", "root/", "sys/", "usr/", "usr/bin/", "usr/sbin/", "var/"} {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
				return err
			}
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}); err != nil {
			return err
		}
		if err := file(w, "bin/busybox", 0o755, program); err != nil {
			return err
		}
		for _, applet := range strings.Fields(string(applets)) {
			if applet == "busybox" {
				continue
			}
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777}); err != nil {
				return err
			}
		}
		if err := file(w, "etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n")); err != nil {
			return err
		}
		return file(w, "etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	})
}

func file(w *tar.Writer, path string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: mode, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

func layer(fill func(*tar.Writer) error) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := fill(w); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
}
