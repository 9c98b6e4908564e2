package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/e2e/critest/images"
)

// A mirror serves, on loopback, the images of several public registries; a
// host's repositories are below its name.
type mirror struct {
	listener net.Listener
	hosts    []string
}

// serveImages starts the mirror, which is up when it returns.
func serveImages(dir string) (*mirror, error) {
	if err := loopbackUp(); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	m := &mirror{listener: l}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	go func() { _ = http.Serve(l, handler) }() // #nosec G114 -- ends with this program
	if err := m.push(dir); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return m, nil
}

func (m *mirror) push(dir string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range manifest.Manifests {
		full := d.Annotations[images.NameAnnotation]
		host, _, _ := strings.Cut(full, "/")
		if !slices.Contains(m.hosts, host) {
			m.hosts = append(m.hosts, host)
		}
		ref, err := name.ParseReference(m.listener.Addr().String()+"/"+full, name.Insecure)
		if err != nil {
			return err
		}
		image, err := index.ImageIndex(d.Digest)
		if err != nil {
			return err
		}
		if err := remote.WriteIndex(ref, image); err != nil {
			return fmt.Errorf("push %s: %w", full, err)
		}
	}
	return nil
}

// writeHosts writes a hosts.toml for every registry: nothing is asked of the
// real one.
func (m *mirror) writeHosts(dir string) error {
	for _, host := range m.hosts {
		url := fmt.Sprintf("http://%s/v2/%s", m.listener.Addr(), host)
		text := fmt.Sprintf("server = %q\noverride_path = true\n\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n  override_path = true\n", url, url)
		if err := os.MkdirAll(filepath.Join(dir, host), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Close ends the mirror.
func (m *mirror) Close() error { return m.listener.Close() }

// loopbackUp brings up the interface that a new network namespace has down.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}

// pinned is the one digest that critest v1.36.0 has in its code. It is of an
// image that cannot be built again, so a copy of the suite gets ours.
const pinned = "9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"

func patchDigest(from, to, dir string) error {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	ours := ""
	for _, d := range manifest.Manifests {
		if d.Annotations[images.NameAnnotation] == images.DigestName {
			ours = d.Digest.Hex
		}
	}
	program, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if n := bytes.Count(program, []byte(pinned)); n != 1 || len(ours) != len(pinned) {
		return fmt.Errorf("%s has the digest of test-image-digest %d times, must be once, and ours is %q: this is for critest v1.36.0", from, n, ours)
	}
	program = bytes.Replace(program, []byte(pinned), []byte(ours), 1)
	return os.WriteFile(to, program, 0o755)
}
