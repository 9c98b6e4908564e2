package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/image"
)

const (
	readMiB   = 16 // of each reading, in two files of two layers
	readTurns = 20 // of one exec
	readLots  = 10
)

// imageRead measures reading files of an image in a guest, in order, from the
// image's disk and from the same image as one EROFS file on a raw disk: turn by
// turn in one VM, with the guest's cache dropped before each and the host's
// warm.
func (b *criBench) imageRead(ctx context.Context, all *results) (err error) {
	dir := filepath.Join(b.dir, "read")
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	r, err := newBenchRegistry()
	if err != nil {
		return err
	}
	defer r.close()
	ref, err := b.pushReadImage(r)
	if err != nil {
		return err
	}
	store, err := image.Open(ctx, image.Config{Root: filepath.Join(dir, "images"), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	images, err := flatten(ctx, store, ref, filepath.Join(dir, "flat.erofs"))
	if err != nil {
		return err
	}
	vm, err := newVMBench(dir, b.guest)
	if err != nil {
		return err
	}
	defer vm.close()
	rt, end, err := serveCRI(ctx, vm, images)
	if err != nil {
		return err
	}
	defer end()
	p, err := readingPod(ctx, rt, dir, ref)
	defer func() { err = errors.Join(err, removePod(ctx, rt, p)) }()
	if err != nil {
		return err
	}
	var rates, raw, ratios []float64
	for lot := range readLots + 1 {
		out, err := rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
			ContainerId: p.container, Cmd: []string{"/inguest", "read", fmt.Sprint(readTurns), "/data", "/flat/data"}, Timeout: 300,
		})
		if err != nil {
			return err
		}
		if lot == 0 {
			continue // fills the host's cache
		}
		for line := range strings.Lines(string(out.Stdout)) {
			var us, rawUS float64
			if _, err := fmt.Sscan(line, &us, &rawUS); err != nil || us == 0 || rawUS == 0 {
				return fmt.Errorf("inguest read: %s%s", line, out.Stderr)
			}
			rates, raw, ratios = append(rates, readMiB/us*1e6), append(raw, readMiB/rawUS*1e6), append(ratios, rawUS/us)
		}
	}
	if len(ratios) != readLots*readTurns {
		return fmt.Errorf("%d readings, want %d", len(ratios), readLots*readTurns)
	}
	all.add("raw_read", "MiB/s", raw)
	all.add("image_read_rate", "MiB/s", rates)
	// Of the two readings of a turn, which had the same neighbours.
	all.add("image_read", "x", ratios).least(0.95)
	return nil
}

// readingPod starts a pod of the image, which has the same image once more, as
// a volume, from the other disk.
func readingPod(ctx context.Context, rt runtimeapi.RuntimeServiceClient, dir, ref string) (criPod, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*bootTimeout)
	defer cancel()
	sandbox := sandboxConfig(filepath.Join(dir, "podlogs"))
	sandbox.Linux.SecurityContext = &runtimeapi.LinuxSandboxSecurityContext{Privileged: true}
	p := criPod{uid: sandbox.Metadata.Uid, config: sandbox}
	s, err := rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: sandbox})
	if err != nil {
		return p, err
	}
	p.sandbox = s.PodSandboxId
	config := containerConfig("c", ref, "/inguest", "wait")
	config.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{Privileged: true}
	config.Mounts = []*runtimeapi.Mount{{ContainerPath: "/flat", Image: &runtimeapi.ImageSpec{Image: flatRef}, Readonly: true}}
	c, err := rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, SandboxConfig: sandbox, Config: config})
	if err != nil {
		return p, err
	}
	p.container = c.ContainerId
	_, err = rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: p.container})
	return p, err
}

// pushReadImage makes an image of the guest's program and files of noise.
func (b *criBench) pushReadImage(r *benchRegistry) (string, error) {
	program, err := os.ReadFile(filepath.Join(b.dir, "inguest"))
	if err != nil {
		return "", err
	}
	noise := make([]byte, readMiB<<20/2)
	_, _ = rand.Read(noise)
	var layers []v1.Layer
	for _, f := range []struct {
		name string
		data []byte
	}{{"inguest", program}, {"data/1", noise}, {"data/2", noise}} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		err := w.WriteHeader(&tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.data))})
		if err == nil {
			_, err = w.Write(f.data)
		}
		if err = errors.Join(err, w.Close()); err != nil {
			return "", err
		}
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil })
		if err != nil {
			return "", err
		}
		layers = append(layers, l)
	}
	return r.push("read", layers...)
}

// What the other disk is called.
const (
	flatRef = "bench.invalid/flat:1"
	flatID  = "sha256:f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7f1a7"
)

// flatImages shows one image a second time, as an EROFS file on a raw disk.
type flatImages struct {
	*image.Store
	image storage.Image
	disk  storage.ImageDisk
}

// flatten pulls an image and puts the parts of its disk into one file.
func flatten(ctx context.Context, s *image.Store, ref, path string) (flatImages, error) {
	f := flatImages{Store: s}
	img, err := s.Pull(ctx, ref, nil, nil)
	if err != nil {
		return f, err
	}
	disk, err := s.Disk(ctx, img.ID, "bench")
	if err != nil {
		return f, err
	}
	text, err := os.ReadFile(disk.Path)
	if err != nil {
		return f, err
	}
	var flat []byte
	for line := range strings.Lines(string(text)) {
		_, rest, ok := strings.Cut(line, ` FLAT "`)
		name, _, _ := strings.Cut(rest, `"`)
		if !ok {
			continue
		}
		part, err := os.ReadFile(filepath.Join(filepath.Dir(disk.Path), name))
		if err != nil {
			return f, err
		}
		flat = append(flat, part...)
	}
	if int64(len(flat)) != disk.Bytes {
		return f, fmt.Errorf("the disk of %s has %d bytes, and its parts %d", ref, disk.Bytes, len(flat))
	}
	f.image, f.disk = img, storage.ImageDisk{ID: "img-flat", Path: path, Format: "raw", FSType: "erofs", Bytes: disk.Bytes}
	f.image.ID = flatID
	return f, os.WriteFile(path, flat, 0o444)
}

func (f flatImages) Get(ctx context.Context, ref string) (storage.Image, error) {
	if ref == flatRef || ref == flatID {
		return f.image, nil
	}
	return f.Store.Get(ctx, ref)
}

func (f flatImages) Disk(ctx context.Context, id, user string) (storage.ImageDisk, error) {
	if id == flatID {
		return f.disk, nil
	}
	return f.Store.Disk(ctx, id, user)
}
