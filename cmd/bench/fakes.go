package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A fakeDriver's machines are a guest's agent in this process, which answers at
// once: what is measured on them is the host's own work.
type fakeDriver struct {
	mu       sync.Mutex
	machines map[vmpod.ID]*fakeMachine
}

func newFakeDriver() *fakeDriver { return &fakeDriver{machines: map[vmpod.ID]*fakeMachine{}} }

func (d *fakeDriver) Launch(_ context.Context, spec vmpod.Spec) (vmpod.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m := &fakeMachine{spec: spec, off: make(chan struct{}), guest: &fakeGuest{containers: map[string]bool{}}}
	d.machines[spec.ID] = m
	return m, nil
}

func (d *fakeDriver) Open(_ context.Context, id vmpod.ID) (vmpod.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("machine %s: %w", id, errdefs.ErrNotFound)
}

func (d *fakeDriver) List(context.Context) ([]vmpod.Machine, error) { return nil, nil }

type fakeMachine struct {
	spec  vmpod.Spec
	guest *fakeGuest
	once  sync.Once
	off   chan struct{}
}

func (m *fakeMachine) Spec() vmpod.Spec { return m.spec }

func (m *fakeMachine) Status(context.Context) (vmpod.Status, error) {
	return vmpod.Status{State: vmpod.StateRunning}, nil
}

func (m *fakeMachine) Dial(ctx context.Context) (net.Conn, error) {
	host, guest := net.Pipe()
	go func() { _ = agentapi.Serve(context.WithoutCancel(ctx), guest, m.guest, func(string, ...any) {}) }()
	return host, nil
}

func (m *fakeMachine) Wait(ctx context.Context) (vmpod.Exit, error) {
	select {
	case <-m.off:
		return vmpod.Exit{Reason: vmpod.ExitStopped, At: time.Now()}, nil
	case <-ctx.Done():
		return vmpod.Exit{}, ctx.Err()
	}
}

func (m *fakeMachine) Stop(context.Context, time.Duration) error {
	m.once.Do(func() { close(m.off) })
	return nil
}

func (m *fakeMachine) Remove(ctx context.Context) error                 { return m.Stop(ctx, 0) }
func (m *fakeMachine) Plug(context.Context, vmpod.Device) error         { return nil }
func (m *fakeMachine) Unplug(context.Context, string) error             { return nil }
func (m *fakeMachine) Usage(context.Context) (u vmpod.Usage, err error) { return u, nil }

// A fakeGuest is an agent whose containers do nothing for ever.
type fakeGuest struct {
	agentapi.AgentService // what is not below is not called

	mu         sync.Mutex
	containers map[string]bool
}

func (g *fakeGuest) Hello(context.Context, *agentapi.HelloRequest) (*agentapi.HelloResponse, error) {
	return &agentapi.HelloResponse{Version: "bench", Protocol: agentapi.Protocol, Features: []string{"seccomp"}}, nil
}

func (g *fakeGuest) SetupSandbox(context.Context, *agentapi.SetupSandboxRequest) (*agentapi.SetupSandboxResponse, error) {
	return &agentapi.SetupSandboxResponse{BootId: uuid.NewString(), ClockNs: time.Now().UnixNano()}, nil
}

func (g *fakeGuest) AddVolume(context.Context, *agentapi.AddVolumeRequest) (*agentapi.AddVolumeResponse, error) {
	return &agentapi.AddVolumeResponse{}, nil
}

func (g *fakeGuest) CreateContainer(_ context.Context, r *agentapi.CreateContainerRequest) (*agentapi.CreateContainerResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.containers[r.Id] = true
	return &agentapi.CreateContainerResponse{}, nil
}

func (g *fakeGuest) StartProcess(context.Context, *agentapi.StartProcessRequest) (*agentapi.StartProcessResponse, error) {
	return &agentapi.StartProcessResponse{Pid: 7, StartedNs: time.Now().UnixNano()}, nil
}

func (g *fakeGuest) Acknowledge(context.Context, *agentapi.AcknowledgeRequest) (*agentapi.AcknowledgeResponse, error) {
	return &agentapi.AcknowledgeResponse{}, nil
}

func (g *fakeGuest) Stats(context.Context, *agentapi.StatsRequest) (*agentapi.StatsResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := &agentapi.StatsResponse{
		TimeNs: time.Now().UnixNano(), MemoryTotal: 512 << 20, MemoryAvailable: 300 << 20,
		Guest:    &agentapi.ContainerStats{CpuUsageNs: 5e9, MemoryCurrent: 100 << 20, MemoryWorkingSet: 90 << 20, MemoryRss: 50 << 20},
		Networks: []*agentapi.NetworkStats{{Name: "eth0", RxBytes: 9, TxBytes: 9}},
	}
	for id := range g.containers {
		r.Containers = append(r.Containers, &agentapi.ContainerStats{
			Id: id, CpuUsageNs: 1e9, MemoryCurrent: 10 << 20, MemoryWorkingSet: 9 << 20, MemoryLimit: 64 << 20, Pids: 2,
			Writable: &agentapi.FilesystemStats{UsedBytes: 4096, UsedInodes: 3},
		})
	}
	return r, nil
}

// ServeStream takes volumes' files, and accepts the journals, in which nothing
// ever comes.
func (g *fakeGuest) ServeStream(_ context.Context, h *agentapi.StreamHeader, s *agentapi.Stream) error {
	if h.Kind == agentapi.StreamHeader_TREE {
		if err := s.Accept(); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, s)
		return s.Finish(err)
	}
	if err := s.Accept(); err != nil {
		return err
	}
	<-s.Gone()
	return nil
}

type fakeNetwork struct{}

func (fakeNetwork) Configure(context.Context, []netip.Prefix) error            { return nil }
func (fakeNetwork) Ready(context.Context) error                                { return nil }
func (fakeNetwork) Detach(context.Context, string) error                       { return nil }
func (fakeNetwork) List(context.Context) (l []netplugin.Attachment, err error) { return nil, nil }
func (fakeNetwork) Attach(_ context.Context, r netplugin.Request) (netplugin.Attachment, error) {
	return netplugin.Attachment{
		Key: r.Key, Tap: "atl1", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500,
		Addresses: []netip.Prefix{netip.MustParsePrefix("198.19.0.2/32")},
	}, nil
}

type fakeImages struct{}

func (fakeImages) image() storage.Image {
	return storage.Image{ID: "sha256:pause", Tags: []string{pauseImage + ":latest"}, Config: ocispec.Image{Config: ocispec.ImageConfig{Entrypoint: []string{"/pause"}}}}
}

func (i fakeImages) Pull(context.Context, string, *storage.Auth, func(storage.Progress)) (storage.Image, error) {
	return i.image(), nil
}
func (i fakeImages) Get(context.Context, string) (storage.Image, error) { return i.image(), nil }
func (i fakeImages) List(context.Context) ([]storage.Image, error) {
	return []storage.Image{i.image()}, nil
}
func (fakeImages) Remove(context.Context, string) error  { return nil }
func (fakeImages) Release(context.Context, string) error { return nil }
func (fakeImages) Disk(context.Context, string, string) (storage.ImageDisk, error) {
	return storage.ImageDisk{ID: "img-pause", Path: "/nowhere", Format: "vmdk", FSType: "erofs"}, nil
}
func (fakeImages) Usage(context.Context) (storage.Usage, error) {
	return storage.Usage{Path: "/"}, nil
}

type fakeEphemeral struct{}

func (fakeEphemeral) Create(_ context.Context, key string, _ int64) (string, error) {
	return "/nowhere/" + key, nil
}
func (fakeEphemeral) Remove(context.Context, string) error   { return nil }
func (fakeEphemeral) List(context.Context) ([]string, error) { return nil, nil }
func (fakeEphemeral) Usage(context.Context, string) (storage.Usage, error) {
	return storage.Usage{Path: "/"}, nil
}
