package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage/image"
)

// The image that is pulled: its layers unpack to that many MiB each. The last
// is all of a second image's own.
var (
	pulledLayers = []int{80, 60, 40, 20}
	secondLayer  = 10
)

// benchPull measures pulling an image into disks, beside `tar -x` of the same
// layers, and what of the work later pods and images need.
//
// Both take gzipped layers from memory (a registry on loopback in this process;
// files in the page cache) to the same file system, into the page cache: tar
// syncs nothing, the store syncs its database and no layer. Between the turns
// everything is synced. tar unpacks one layer after the other, as their order
// demands, with gzip in a process of its own.
func benchPull(ctx context.Context, n int, all *results) (err error) {
	dir, err := os.MkdirTemp("/var/tmp", "atoll-bench-pull-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r, err := newBenchRegistry()
	if err != nil {
		return err
	}
	defer r.close()
	say("making an image")
	var layers []v1.Layer
	for i, mib := range append(pulledLayers, secondLayer) {
		l, err := mixedLayer(uint64(i), mib)
		if err != nil {
			return err
		}
		layers = append(layers, l)
	}
	first, err := r.push("first", layers[:len(pulledLayers)]...)
	if err != nil {
		return err
	}
	second, err := r.push("second", append(layers[:2:2], layers[len(pulledLayers)])...)
	if err != nil {
		return err
	}
	files, err := saveLayers(dir, layers[:len(pulledLayers)])
	if err != nil {
		return err
	}
	var pulls, tars, pullCPU, tarCPU []float64
	for i := range n + 1 {
		t, tc, err := untar(ctx, dir, files)
		if err != nil {
			return err
		}
		p, pc, err := pullOnce(ctx, dir, first)
		if err != nil {
			return err
		}
		say("pull %d of %d: %.0f ms, tar %.0f ms", i, n, p, t)
		if i > 0 {
			pulls, tars, pullCPU, tarCPU = append(pulls, p), append(tars, t), append(pullCPU, pc), append(tarCPU, tc)
		}
	}
	all.add("tar_x", "ms", tars)
	all.add("pull_convert", "ms", pulls).to(*all, "tar_x", 1.5)
	all.add("tar_x_cpu", "ms", tarCPU)
	all.add("pull_convert_cpu", "ms", pullCPU).to(*all, "tar_x_cpu", 0)
	return laterPods(ctx, dir, first, second, all)
}

// laterPods counts the bytes that are converted for the second pod of an image,
// and for another image that shares layers with it.
func laterPods(ctx context.Context, dir, first, second string, all *results) (err error) {
	s, err := image.Open(ctx, image.Config{Root: filepath.Join(dir, "later"), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	img, err := s.Pull(ctx, first, nil, nil)
	if err != nil {
		return err
	}
	if _, err := s.Disk(ctx, img.ID, "first"); err != nil {
		return err
	}
	whole := s.Converted()
	if whole == 0 {
		return errors.New("the store counts nothing")
	}
	// As a kubelet does whose pull policy is Always.
	if _, err := s.Pull(ctx, first, nil, nil); err != nil {
		return err
	}
	var opened []float64
	for i := range 50 {
		start := time.Now()
		if _, err := s.Disk(ctx, img.ID, fmt.Sprint("pod-", i)); err != nil {
			return err
		}
		opened = append(opened, ms(start))
	}
	all.add("second_pod", "bytes", []float64{float64(s.Converted() - whole)}).most(0)
	all.add("image_open", "ms", opened)
	if _, err := s.Pull(ctx, second, nil, nil); err != nil {
		return err
	}
	own := float64(s.Converted()-whole) / (1 << 20)
	// Contents are padded to blocks, and names are metadata.
	all.add("second_image", "MiB", []float64{own}).most(1.25 * float64(secondLayer))
	return nil
}

// A benchRegistry serves images on loopback, from memory.
type benchRegistry struct {
	server *http.Server
	host   string
}

func newBenchRegistry() (*benchRegistry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &benchRegistry{host: l.Addr().String(), server: &http.Server{
		Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0))), ReadHeaderTimeout: time.Minute,
	}}
	go func() { _ = r.server.Serve(l) }()
	return r, nil
}

func (r *benchRegistry) close() { _ = r.server.Close() }

// push makes an image for linux/amd64 of layers and returns its reference.
func (r *benchRegistry) push(repository string, layers ...v1.Layer) (string, error) {
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return "", err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return "", err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	if img, err = mutate.ConfigFile(img, config); err != nil {
		return "", err
	}
	ref, err := name.ParseReference(r.host+"/"+repository+":1", name.Insecure)
	if err != nil {
		return "", err
	}
	return ref.String(), remote.Write(ref, img)
}

// mixedLayer makes a gzipped layer of files as images have them: many small
// ones, a few large ones (log-normal around 6 KiB), pieces of this program, so
// that they compress as programs do, and some text.
func mixedLayer(seed uint64, mib int) (v1.Layer, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	program, err := os.ReadFile(self)
	if err != nil {
		return nil, err
	}
	rnd := rand.New(rand.NewPCG(seed, 1))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; b.Len() < mib<<20; i++ {
		size := min(int(6000*math.Exp(2*rnd.NormFloat64())), 8<<20, len(program)/2, max(mib<<20-b.Len(), 1))
		from := rnd.IntN(len(program) - size)
		if i%100 == 0 {
			if err := w.WriteHeader(&tar.Header{Name: fmt.Sprintf("l%d/d%d/", seed, i/100), Typeflag: tar.TypeDir, Mode: 0o755}); err != nil {
				return nil, err
			}
		}
		h := &tar.Header{Name: fmt.Sprintf("l%d/d%d/file-%d", seed, i/100, i), Mode: 0o644, Size: int64(size), ModTime: time.Unix(1e9, 0)}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(program[from : from+size]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil }, tarball.WithCompressedCaching)
}

// saveLayers writes gzipped layers to files.
func saveLayers(dir string, layers []v1.Layer) ([]string, error) {
	var files []string
	for i, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(rc)
		if err = errors.Join(err, rc.Close()); err != nil {
			return nil, err
		}
		files = append(files, filepath.Join(dir, fmt.Sprintf("layer-%d.tar.gz", i)))
		if err := os.WriteFile(files[i], data, 0o600); err != nil {
			return nil, err
		}
	}
	return files, nil
}

// untar unpacks layers as tar does it, and returns how long it took and the CPU
// time of tar and gzip, in ms.
func untar(ctx context.Context, dir string, files []string) (took, cpu float64, err error) {
	to := filepath.Join(dir, "tree")
	if err := os.Mkdir(to, 0o755); err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(to)) }()
	unix.Sync()
	start := time.Now()
	for _, f := range files {
		cmd := exec.CommandContext(ctx, "tar", "-x", "-z", "-f", f, "-C", to)
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, 0, fmt.Errorf("tar: %w\n%s", err, out)
		}
		cpu += float64((cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Microseconds()) / 1000
	}
	return ms(start), cpu, nil
}

// pullOnce pulls into a new store. The CPU time is this process's, with the
// registry's.
func pullOnce(ctx context.Context, dir, ref string) (took, cpu float64, err error) {
	root := filepath.Join(dir, "store")
	s, err := image.Open(ctx, image.Config{Root: root, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, s.Close(), os.RemoveAll(root)) }()
	unix.Sync()
	before, err := ownCPU()
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	img, err := s.Pull(ctx, ref, nil, nil)
	if err != nil {
		return 0, 0, err
	}
	if _, err := s.Disk(ctx, img.ID, "pod"); err != nil {
		return 0, 0, err
	}
	took = ms(start)
	after, err := ownCPU()
	return took, after - before, err
}

// ownCPU is the CPU time of this process so far, in ms.
func ownCPU() (float64, error) {
	var u unix.Rusage
	err := unix.Getrusage(unix.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e6, err
}
