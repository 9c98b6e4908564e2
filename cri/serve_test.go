package cri

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A testServer is a Server on a socket, with clients.
type testServer struct {
	*Server
	t    *testing.T
	rt   runtimeapi.RuntimeServiceClient
	img  runtimeapi.ImageServiceClient
	dir  string
	stop func()
}

// serve starts a server over the host; dir is its data directory.
func serve(t *testing.T, h *fakeHost, dir string, change ...func(*Config)) *testServer {
	t.Helper()
	cfg := Config{
		Driver: fakeDriver{h}, Network: fakeNetwork{h}, Images: fakeImages{h}, Ephemeral: fakeEphemeral{h},
		StateDir: filepath.Join(dir, "cri"), SecretsDir: filepath.Join(dir, "run"), KubeletRoot: filepath.Join(dir, "kubelet"), Version: "test",
		Disks: fakeDisks{h}, Formatter: fakeDisks{h}, NodeName: "node-1",
		Logger: slog.New(slog.DiscardHandler),
	}
	if testing.Verbose() {
		cfg.Logger = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	for _, c := range change {
		c(&cfg)
	}
	s, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(t.TempDir(), "s")
	l, err := Listen(sock)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	conn, err := grpc.NewClient("unix://"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ts := &testServer{Server: s, t: t, rt: runtimeapi.NewRuntimeServiceClient(conn), img: runtimeapi.NewImageServiceClient(conn), dir: dir}
	ts.stop = sync.OnceFunc(func() {
		conn.Close()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(ts.stop)
	return ts
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	defer func() { _ = recover() }() // the test may be over
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

const podUID = "6b1a6e34-2c9f-4a63-a1a0-b2d1cbf5ddaa"

func podConfig(dir string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: podUID},
		Hostname:     "web",
		LogDirectory: filepath.Join(dir, "logs", "default_web_"+podUID),
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"198.18.64.10"}},
		Labels:       map[string]string{kubeletUIDLabel: podUID, "app": "web"},
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

func ctrConfig(name string) *runtimeapi.ContainerConfig {
	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: "atoll.local/web:1"},
		LogPath:  name + "/0.log",
		Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
			NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
		}},
	}
}

func (s *testServer) run(t *testing.T) string {
	t.Helper()
	r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
	if err != nil {
		t.Fatal(err)
	}
	return r.PodSandboxId
}

func (s *testServer) create(t *testing.T, sandbox string, c *runtimeapi.ContainerConfig) string {
	t.Helper()
	r, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sandbox, Config: c, SandboxConfig: podConfig(s.dir)})
	if err != nil {
		t.Fatal(err)
	}
	return r.ContainerId
}

func (s *testServer) start(t *testing.T, id string) {
	t.Helper()
	if _, err := s.rt.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
}

func (s *testServer) status(t *testing.T, id string) *runtimeapi.ContainerStatus {
	t.Helper()
	r, err := s.rt.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return r.Status
}

func (s *testServer) remove(t *testing.T, sandbox string) {
	t.Helper()
	if _, err := s.rt.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandbox}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.rt.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox}); err != nil {
		t.Fatal(err)
	}
}

// eventually waits for something that happens behind the caller's back.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}
