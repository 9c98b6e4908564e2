package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/uuid"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/netplugin/tap"
	"github.com/openatoll/atoll/supervisor/registry"
)

// benchImage is the demo busybox with cmd/bench/inguest in it.
const benchImage = "atoll.local/bench"

// nameAnnotation holds an image's name in an OCI layout.
const nameAnnotation = "org.opencontainers.image.ref.name"

// A criBench is `spherelet cri` on directories of its own, in a process of its
// own, so that what it costs can be told from what the bench does.
type criBench struct {
	dir, config, run string
	spherelet        string
	guest, hosts     string
	cmd              *exec.Cmd
	ended            chan error
	log              *os.File
	conn             *grpc.ClientConn
	rt               runtimeapi.RuntimeServiceClient
	images           runtimeapi.ImageServiceClient
}

// measureRuntime runs the parts that want the runtime alone; it is in a new
// network namespace.
func measureRuntime(ctx context.Context, o options, all *results) (err error) {
	b := &criBench{ended: make(chan error, 1)}
	if b.dir, err = os.MkdirTemp("/var/tmp", "atoll-bench-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if err := b.start(ctx, o); err != nil {
		return err
	}
	for _, p := range []struct {
		name string
		run  func(context.Context, *results) error
	}{{"lists", b.lists}, {"containers", b.containers}, {"execsync", b.execSync}, {"logs", b.logs}, {"memory", b.memory}, {"imageread", b.imageRead}} {
		if !o.wanted(p.name) {
			continue
		}
		if err := p.run(ctx, all); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

func (b *criBench) start(ctx context.Context, o options) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	if err := tap.EnsureNodeLink(ctx, "atoll0", []netip.Prefix{netip.MustParsePrefix("198.18.0.1/32")}); err != nil {
		return err
	}
	if err := os.Chmod(b.dir, 0o711); err != nil { // QEMU runs as another user
		return err
	}
	var err error
	if b.hosts, err = b.serveImages(ctx); err != nil {
		return fmt.Errorf("images: %w", err)
	}
	if b.guest, err = filepath.Abs(o.guest); err != nil {
		return err
	}
	if b.spherelet, err = filepath.Abs(o.spherelet); err != nil {
		return err
	}
	b.run = fmt.Sprintf("/run/atoll/bench-%d", os.Getpid()) // sockets' paths are short
	b.config = filepath.Join(b.dir, "config.json")
	if b.log, err = os.Create(filepath.Join(b.dir, "spherelet.log")); err != nil {
		return err
	}
	return b.spawn(ctx, nil)
}

// spawn starts the runtime, with settings beside the usual.
func (b *criBench) spawn(ctx context.Context, settings map[string]any) error {
	config := map[string]any{
		"apiVersion": "atoll.dev/v1alpha1", "kind": "SphereletConfiguration", "nodeName": "bench", "nodeIP": "198.18.0.1",
		"dataDir": filepath.Join(b.dir, "data"), "runDir": b.run, "kubeProxy": false, "clusterCIDR": "198.19.0.0/16", "logLevel": "debug",
		"hypervisor": map[string]any{"guest": b.guest, "ephemeralDefault": "2Gi"}, "images": map[string]any{"hostsDir": b.hosts},
	}
	maps.Copy(config, settings)
	text, err := json.Marshal(config)
	if err != nil {
		return err
	}
	if err := os.WriteFile(b.config, text, 0o600); err != nil {
		return err
	}
	cmd := exec.Command(b.spherelet, "cri", "--config", b.config, "--pod-cidr", "198.19.0.0/24")
	cmd.Stdout, cmd.Stderr = b.log, b.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	b.cmd = cmd
	go func() { b.ended <- cmd.Wait() }()
	return b.connect(ctx)
}

func (b *criBench) connect(ctx context.Context) (err error) {
	b.conn, err = grpc.NewClient("unix://"+filepath.Join(b.run, "cri.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return err
	}
	b.rt, b.images = runtimeapi.NewRuntimeServiceClient(b.conn), runtimeapi.NewImageServiceClient(b.conn)
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if _, err = b.rt.Version(ctx, &runtimeapi.VersionRequest{}, grpc.WaitForReady(true)); err == nil {
			break
		}
		if ctx.Err() != nil {
			return fmt.Errorf("spherelet cri does not answer: %w%s", err, b.said())
		}
	}
	for _, image := range []string{pauseImage, benchImage} {
		if _, err := b.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: image}}); err != nil {
			return fmt.Errorf("pull %s: %w", image, err)
		}
	}
	return nil
}

// said is the end of spherelet's log, for errors.
func (b *criBench) said() string {
	text, _ := os.ReadFile(b.log.Name())
	return "; it said:\n" + string(text[max(0, len(text)-4096):])
}

// end ends the runtime.
func (b *criBench) end() error {
	var errs []error
	if b.conn != nil {
		errs = append(errs, b.conn.Close())
		b.conn = nil
	}
	if b.cmd == nil {
		return errors.Join(errs...)
	}
	_ = b.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-b.ended:
		errs = append(errs, err)
	case <-time.After(30 * time.Second):
		errs = append(errs, errors.New("spherelet cri did not end"), b.cmd.Process.Kill())
		<-b.ended
	}
	b.cmd = nil
	return errors.Join(errs...)
}

// close ends the runtime and removes all that it made.
func (b *criBench) close() error {
	errs := []error{b.end()}
	if _, err := os.Stat(b.config); err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if said, err := exec.CommandContext(ctx, b.spherelet, "cleanup", "--config", b.config).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("spherelet cleanup: %w\n%s", err, said))
		}
	}
	if b.log != nil {
		errs = append(errs, b.log.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(b.dir))...)
}

// serveImages offers the demo images and the bench's own on loopback, and
// returns the directory of the hosts.toml that leads there.
func (b *criBench) serveImages(ctx context.Context) (string, error) {
	own := filepath.Join(b.dir, "layout")
	if err := buildImage(ctx, filepath.Join("build", "images"), own); err != nil {
		return "", err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go func() {
		_ = registry.Serve(ctx, registry.Config{
			Dir: filepath.Join(b.dir, "registry"), Listener: l, Seeds: []string{filepath.Join("build", "images"), own},
			Logger: slog.New(slog.DiscardHandler),
		})
	}()
	hosts := filepath.Join(b.dir, "hosts")
	return hosts, registry.WriteHosts(hosts, "atoll.local", "http://"+l.Addr().String())
}

// buildImage puts the guest's program into the demo busybox.
func buildImage(ctx context.Context, from, to string) error {
	program := filepath.Join(to, "..", "inguest")
	cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-ldflags=-s -w", "-o", program, "./cmd/bench/inguest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build ./cmd/bench/inguest: %w\n%s", err, said)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	base, err := imageOf(from, shellImage)
	if err != nil {
		return err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err = w.WriteHeader(&tar.Header{Name: "inguest", Mode: 0o755, Size: int64(len(data)), Typeflag: tar.TypeReg})
	if err == nil {
		_, err = w.Write(data)
	}
	if err = errors.Join(err, w.Close()); err != nil {
		return err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
	if err != nil {
		return err
	}
	img, err := mutate.AppendLayers(base, layer)
	if err != nil {
		return err
	}
	path, err := layout.Write(to, empty.Index)
	if err != nil {
		return err
	}
	return path.AppendImage(img, layout.WithAnnotations(map[string]string{nameAnnotation: benchImage + ":latest"}))
}

func imageOf(dir, name string) (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	for _, d := range manifest.Manifests {
		if strings.TrimSuffix(d.Annotations[nameAnnotation], ":latest") == name {
			return index.Image(d.Digest)
		}
	}
	return nil, fmt.Errorf("%s has no image %s: run `make images`", dir, name)
}

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
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}

// A criPod is one sandbox with one container that runs.
type criPod struct {
	uid, sandbox, container, log string
	config                       *runtimeapi.PodSandboxConfig
}

// pod runs a sandbox and starts one container in it.
func (b *criBench) pod(ctx context.Context, image string, command ...string) (criPod, error) {
	return startPod(ctx, b.rt, filepath.Join(b.dir, "podlogs"), image, command...)
}

// withPods starts so many sandboxes, two at a time, each with a container that
// does nothing, calls f, and removes them.
func (b *criBench) withPods(ctx context.Context, n int, f func([]criPod) error) (err error) {
	pods := make([]criPod, n)
	defer func() {
		var g errgroup.Group
		for _, p := range pods {
			g.Go(func() error { return removePod(ctx, b.rt, p) })
		}
		err = errors.Join(err, g.Wait())
	}()
	say("starting %d pods", n)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i := range pods {
		g.Go(func() (err error) {
			pods[i], err = b.pod(gctx, pauseImage)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return f(pods)
}

func startPod(ctx context.Context, rt runtimeapi.RuntimeServiceClient, logs, image string, command ...string) (criPod, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*bootTimeout)
	defer cancel()
	sandbox := sandboxConfig(logs)
	p := criPod{uid: sandbox.Metadata.Uid, log: filepath.Join(sandbox.LogDirectory, "c/0.log"), config: sandbox}
	s, err := rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: sandbox})
	if err != nil {
		return p, err
	}
	p.sandbox = s.PodSandboxId
	c, err := rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, SandboxConfig: sandbox, Config: containerConfig("c", image, command...)})
	if err != nil {
		return p, err
	}
	p.container = c.ContainerId
	_, err = rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: p.container})
	return p, err
}

func sandboxConfig(logs string) *runtimeapi.PodSandboxConfig {
	uid := uuid.NewString()
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "bench-" + uid, Namespace: "bench", Uid: uid},
		Hostname:     "bench",
		LogDirectory: filepath.Join(logs, uid),
		Labels:       map[string]string{"io.kubernetes.pod.name": "bench-" + uid, "io.kubernetes.pod.namespace": "bench", "app": "bench"},
		Linux:        &runtimeapi.LinuxPodSandboxConfig{},
	}
}

func containerConfig(name, image string, command ...string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: image}, Command: command,
		LogPath: name + "/0.log", Labels: map[string]string{"app": "bench"}, Linux: &runtimeapi.LinuxContainerConfig{},
	}
}

func removePod(ctx context.Context, rt runtimeapi.RuntimeServiceClient, p criPod) error {
	if p.sandbox == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	_, err := rt.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
	return err
}
