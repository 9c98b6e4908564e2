package cri

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/netplugin"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A fakeHost stands for everything below cri on one host. It outlives servers,
// as machines outlive processes.
type fakeHost struct {
	newGuest    func(*fakeGuest) // changes those of machines to come
	mu          sync.Mutex
	fail        map[string]error         // by step
	hold        map[string]chan struct{} // steps that wait
	machines    map[vmpod.ID]*fakeMachine
	attachments map[string]netplugin.Attachment
	disks       map[string]int64
	images      map[string]storage.Image
	holds       map[string]int
	launches    int
	began       time.Time
	starved     atomic.Bool // its machines get no CPU
}

func newFakeHost() *fakeHost {
	return &fakeHost{
		began: time.Now(),
		fail:  map[string]error{}, hold: map[string]chan struct{}{},
		machines: map[vmpod.ID]*fakeMachine{}, attachments: map[string]netplugin.Attachment{}, disks: map[string]int64{}, holds: map[string]int{},
		images: map[string]storage.Image{
			"atoll.local/web:1": {
				ID: "sha256:web", Tags: []string{"atoll.local/web:1"}, Digests: []string{"atoll.local/web@sha256:1"}, Size: 5,
				Config: ocispec.Image{Config: ocispec.ImageConfig{Entrypoint: []string{"/web"}, Cmd: []string{"-v"}, Env: []string{"A=image", "B=image"}, User: "65534", WorkingDir: "/srv", StopSignal: "SIGINT"}},
			},
		},
	}
}

// at is called at every step: it fails or waits as the test wants.
func (h *fakeHost) at(ctx context.Context, step string) error {
	h.mu.Lock()
	err, hold := h.fail[step], h.hold[step]
	h.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

func (h *fakeHost) set(step string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail[step] = err
}

// holdAt makes a step wait until release is called.
func (h *fakeHost) holdAt(step string) (release func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := make(chan struct{})
	h.hold[step] = c
	return func() { close(c) }
}

// left lists what is on the host.
func (h *fakeHost) left() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for id := range h.machines {
		out = append(out, "machine "+id.String())
	}
	for k := range h.attachments {
		out = append(out, "attachment "+k)
	}
	for k := range h.disks {
		out = append(out, "disk "+k)
	}
	for k := range h.holds {
		out = append(out, "image hold "+k)
	}
	slices.Sort(out)
	return out
}

func (h *fakeHost) guest(uid string) *fakeGuest {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, m := range h.machines {
		if id.PodUID == uid {
			return m.guest
		}
	}
	return nil
}

// driver

type fakeDriver struct{ *fakeHost }

func (d fakeDriver) Launch(ctx context.Context, spec vmpod.Spec) (vmpod.Machine, error) {
	if err := d.at(ctx, "launch"); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[spec.ID]; m != nil {
		return m, nil
	}
	m := &fakeMachine{host: d.fakeHost, spec: spec, off: make(chan struct{}), guest: newFakeGuest(d.fakeHost)}
	if d.newGuest != nil {
		d.newGuest(m.guest)
	}
	d.machines[spec.ID] = m
	d.launches++
	return m, nil
}

func (d fakeDriver) Open(_ context.Context, id vmpod.ID) (vmpod.Machine, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m := d.machines[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("machine %s: %w", id, errdefs.ErrNotFound)
}

func (d fakeDriver) List(ctx context.Context) ([]vmpod.Machine, error) {
	if err := d.at(ctx, "list"); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []vmpod.Machine
	for _, m := range d.machines {
		out = append(out, m)
	}
	return out, nil
}

type fakeMachine struct {
	host  *fakeHost
	spec  vmpod.Spec
	guest *fakeGuest

	mu   sync.Mutex
	conn net.Conn
	once sync.Once
	off  chan struct{}
	exit vmpod.Exit
}

func (m *fakeMachine) Spec() vmpod.Spec {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.spec
	s.Disks = slices.Clone(s.Disks)
	return s
}

func (m *fakeMachine) Status(ctx context.Context) (vmpod.Status, error) {
	if err := m.host.at(ctx, "status"); err != nil {
		return vmpod.Status{State: vmpod.StateUnknown, Reason: vmpod.ReasonVMMNotResponding, Message: err.Error()}, nil
	}
	return vmpod.Status{State: vmpod.StateRunning}, nil
}

// Progress tells that the machine has waited all the time, if it is starved.
func (m *fakeMachine) Progress(context.Context) (vmpod.Progress, error) {
	p := vmpod.Progress{Waited: map[int]time.Duration{1: 0}}
	if m.host.starved.Load() {
		p.Waited[1] = time.Since(m.host.began)
	}
	return p, nil
}

func (m *fakeMachine) Dial(ctx context.Context) (net.Conn, error) {
	if err := m.host.at(ctx, "dial"); err != nil {
		return nil, err
	}
	host, guest := net.Pipe()
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-m.off:
		return nil, errdefs.ErrUnavailable
	default:
	}
	if m.conn != nil {
		m.conn.Close()
	}
	m.conn = guest
	go agentapi.Serve(context.Background(), guest, m.guest, func(string, ...any) {})
	return host, nil
}

func (m *fakeMachine) die(e vmpod.Exit) {
	m.once.Do(func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.exit = e
		m.exit.At = time.Now()
		if m.conn != nil {
			m.conn.Close()
		}
		close(m.off)
	})
}

func (m *fakeMachine) Wait(ctx context.Context) (vmpod.Exit, error) {
	select {
	case <-m.off:
		return m.exit, nil
	case <-ctx.Done():
		return vmpod.Exit{}, ctx.Err()
	}
}

func (m *fakeMachine) Stop(ctx context.Context, _ time.Duration) error {
	if err := m.host.at(ctx, "stop"); err != nil {
		return err
	}
	m.die(vmpod.Exit{Reason: vmpod.ExitStopped, Message: "asked for"})
	return nil
}

func (m *fakeMachine) Remove(ctx context.Context) error {
	if err := m.host.at(ctx, "remove"); err != nil {
		return err
	}
	m.die(vmpod.Exit{Reason: vmpod.ExitStopped, Message: "removed"})
	m.host.mu.Lock()
	defer m.host.mu.Unlock()
	delete(m.host.machines, m.spec.ID)
	return nil
}

func (m *fakeMachine) Plug(ctx context.Context, d vmpod.Device) error {
	if err := m.host.at(ctx, "plug"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.spec.Disks = append(m.spec.Disks, *d.Disk)
	return nil
}

func (m *fakeMachine) Unplug(context.Context, string) error { return nil }

func (m *fakeMachine) Usage(context.Context) (vmpod.Usage, error) {
	return vmpod.Usage{Time: time.Now(), CPU: 5e9, Resident: 1 << 20}, nil
}

// network

type fakeNetwork struct{ *fakeHost }

func (n fakeNetwork) Configure(context.Context, []netip.Prefix) error { return nil }
func (n fakeNetwork) Ready(context.Context) error                     { return nil }
func (n fakeNetwork) Attach(ctx context.Context, r netplugin.Request) (netplugin.Attachment, error) {
	if err := n.at(ctx, "attach"); err != nil {
		return netplugin.Attachment{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	a := netplugin.Attachment{
		Key: r.Key, Tap: "atl1", MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500, HostPorts: r.HostPorts,
		Addresses: []netip.Prefix{netip.MustParsePrefix("198.19.0.2/32")},
		Routes:    []netplugin.Route{{Destination: netip.MustParsePrefix("0.0.0.0/0"), Gateway: netip.MustParseAddr("169.254.1.1")}},
	}
	n.attachments[r.Key] = a
	return a, nil
}
func (n fakeNetwork) Detach(ctx context.Context, key string) error {
	if err := n.at(ctx, "detach"); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.attachments, key)
	return nil
}
func (n fakeNetwork) List(context.Context) ([]netplugin.Attachment, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []netplugin.Attachment
	for _, a := range n.attachments {
		out = append(out, a)
	}
	return out, nil
}

// storage

type fakeImages struct{ *fakeHost }

func (i fakeImages) Pull(ctx context.Context, ref string, _ *storage.Auth, _ func(storage.Progress)) (storage.Image, error) {
	return i.Get(ctx, ref)
}
func (i fakeImages) Get(_ context.Context, ref string) (storage.Image, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for tag, img := range i.images {
		if ref == tag || ref == img.ID || slices.Contains(img.Digests, ref) {
			return img, nil
		}
	}
	return storage.Image{}, fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
}
func (i fakeImages) List(context.Context) ([]storage.Image, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	var out []storage.Image
	for _, img := range i.images {
		out = append(out, img)
	}
	return out, nil
}
func (i fakeImages) Remove(context.Context, string) error { return nil }
func (i fakeImages) Disk(ctx context.Context, id, user string) (storage.ImageDisk, error) {
	if err := i.at(ctx, "image disk"); err != nil {
		return storage.ImageDisk{}, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.holds[user]++
	return storage.ImageDisk{ID: "img-" + strings.TrimPrefix(id, "sha256:"), Path: "/images/" + id, Format: "vmdk", FSType: "erofs"}, nil
}
func (i fakeImages) Release(ctx context.Context, user string) error {
	if err := i.at(ctx, "release"); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.holds, user)
	return nil
}
func (i fakeImages) Usage(context.Context) (storage.Usage, error) {
	return storage.Usage{Path: "/", Bytes: 7, Inodes: 3}, nil
}

type fakeEphemeral struct{ *fakeHost }

func (e fakeEphemeral) Create(ctx context.Context, key string, n int64) (string, error) {
	if err := e.at(ctx, "ephemeral"); err != nil {
		return "", err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.disks[key] = n
	return "/disks/" + key, nil
}
func (e fakeEphemeral) Remove(ctx context.Context, key string) error {
	if err := e.at(ctx, "remove disk"); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.disks, key)
	return nil
}
func (e fakeEphemeral) List(context.Context) ([]string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for k := range e.disks {
		out = append(out, k)
	}
	return out, nil
}
func (e fakeEphemeral) Usage(context.Context, string) (storage.Usage, error) {
	return storage.Usage{Path: "/", Bytes: 11}, nil
}

// guest

// A fakeGuest keeps the contract's journals as podinit does, and runs nothing.
// A main process runs until it is signalled or the test ends it; an exec runs
// `echo WORDS`, `exit N` or `cat`.
type fakeGuest struct {
	host *fakeHost

	mu         sync.Mutex
	changed    chan struct{}
	setup      *agentapi.SetupSandboxRequest
	bootID     string
	protocol   uint32
	clock      time.Duration // ahead of the host's
	told       int           // how often it was told that it is wrong
	containers map[string]*fakeContainer
	volumes    map[string]*agentapi.AddVolumeRequest
	trees      map[string]map[string]string
	sent       map[string]int
	exits      []*agentapi.ExitRecord
	nextExit   uint64
	online     []*agentapi.OnlineRequest
}

type fakeContainer struct {
	req     *agentapi.CreateContainerRequest
	state   *agentapi.ContainerState
	logs    []*agentapi.LogRecord
	next    uint64
	message string
	execs   map[string]*fakeExec
	ignore  bool // signals but SIGKILL
	got     []uint32
	updated *agentapi.UpdateContainerRequest
}

type fakeExec struct {
	args []string
	in   chan string
	done chan struct{}
	code int32
}

func newFakeGuest(h *fakeHost) *fakeGuest {
	return &fakeGuest{host: h, bootID: uuid.NewString(), protocol: agentapi.Protocol, changed: make(chan struct{}), containers: map[string]*fakeContainer{}, volumes: map[string]*agentapi.AddVolumeRequest{}, trees: map[string]map[string]string{}, sent: map[string]int{}, nextExit: 1}
}

func (g *fakeGuest) wake() { close(g.changed); g.changed = make(chan struct{}) }

func (g *fakeGuest) find(id string) (*fakeContainer, error) {
	if c := g.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %q: %w", id, errdefs.ErrNotFound)
}

func (g *fakeGuest) Hello(ctx context.Context, req *agentapi.HelloRequest) (*agentapi.HelloResponse, error) {
	if err := g.host.at(ctx, "hello"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if req.Clock != nil {
		g.clock += time.Duration(req.Clock.HostNs - req.Clock.GuestNs)
		g.told++
	}
	r := &agentapi.HelloResponse{Version: "fake", Protocol: g.protocol, BootId: g.bootID, ClockNs: time.Now().Add(g.clock).UnixNano(), SandboxReady: g.setup != nil, Features: []string{"seccomp"}}
	for _, c := range g.containers {
		r.Containers = append(r.Containers, c.state)
	}
	return r, nil
}

func (g *fakeGuest) SetupSandbox(ctx context.Context, r *agentapi.SetupSandboxRequest) (*agentapi.SetupSandboxResponse, error) {
	if err := g.host.at(ctx, "setup"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.setup = r
	return &agentapi.SetupSandboxResponse{BootId: g.bootID, ClockNs: time.Now().UnixNano()}, nil
}

func (g *fakeGuest) AddVolume(ctx context.Context, r *agentapi.AddVolumeRequest) (*agentapi.AddVolumeResponse, error) {
	if err := g.host.at(ctx, "add volume"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.volumes[r.Id] = r
	return &agentapi.AddVolumeResponse{}, nil
}

func (g *fakeGuest) RemoveVolume(context.Context, *agentapi.RemoveVolumeRequest) (*agentapi.RemoveVolumeResponse, error) {
	return &agentapi.RemoveVolumeResponse{}, nil
}

func (g *fakeGuest) CreateContainer(ctx context.Context, r *agentapi.CreateContainerRequest) (*agentapi.CreateContainerResponse, error) {
	if err := g.host.at(ctx, "create"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.containers[r.Id] = &fakeContainer{req: r, next: 1, execs: map[string]*fakeExec{}, state: &agentapi.ContainerState{Id: r.Id, CreatedNs: time.Now().UnixNano()}}
	return &agentapi.CreateContainerResponse{}, nil
}

func (g *fakeGuest) StartProcess(ctx context.Context, r *agentapi.StartProcessRequest) (*agentapi.StartProcessResponse, error) {
	if err := g.host.at(ctx, "start"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	c, err := g.find(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.ExecId == "" {
		if c.state.Phase == agentapi.ContainerState_CREATED {
			c.state = &agentapi.ContainerState{Id: r.ContainerId, Phase: agentapi.ContainerState_RUNNING, Pid: 7, CreatedNs: c.state.CreatedNs, StartedNs: time.Now().UnixNano()}
		}
		return &agentapi.StartProcessResponse{Pid: 7, StartedNs: c.state.StartedNs}, nil
	}
	var p specs.Process
	if err := json.Unmarshal(r.Process, &p); err != nil {
		return nil, err
	}
	if p.Args[0] == "missing" {
		return nil, fmt.Errorf("exec: %q: no such file: %w", p.Args[0], errdefs.ErrNotFound)
	}
	x := &fakeExec{args: p.Args, in: make(chan string, 1), done: make(chan struct{})}
	c.execs[r.ExecId] = x
	switch p.Args[0] {
	case "exit":
		fmt.Sscan(p.Args[1], &x.code)
		close(x.done)
	case "echo":
		close(x.done)
	}
	return &agentapi.StartProcessResponse{Pid: 8}, nil
}

func (g *fakeGuest) SignalProcess(_ context.Context, r *agentapi.SignalProcessRequest) (*agentapi.SignalProcessResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c, err := g.find(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.ExecId != "" {
		if x := c.execs[r.ExecId]; x != nil {
			select {
			case <-x.done:
			default:
				x.code = 128 + int32(r.Signal)
				close(x.done)
			}
		}
		return &agentapi.SignalProcessResponse{}, nil
	}
	c.got = append(c.got, r.Signal)
	if !c.ignore || r.Signal == 9 {
		g.exitLocked(c, 128+int32(r.Signal), "Error")
	}
	return &agentapi.SignalProcessResponse{}, nil
}

func (g *fakeGuest) ResizeTerminal(context.Context, *agentapi.ResizeTerminalRequest) (*agentapi.ResizeTerminalResponse, error) {
	return &agentapi.ResizeTerminalResponse{}, nil
}

func (g *fakeGuest) WaitProcess(ctx context.Context, r *agentapi.WaitProcessRequest) (*agentapi.WaitProcessResponse, error) {
	g.mu.Lock()
	x := g.containers[r.ContainerId].execs[r.ExecId]
	g.mu.Unlock()
	select {
	case <-x.done:
		return &agentapi.WaitProcessResponse{Exit: &agentapi.ExitRecord{ExitCode: x.code}}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// count is how many containers the guest has.
func (g *fakeGuest) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.containers)
}

func (g *fakeGuest) RemoveContainer(_ context.Context, r *agentapi.RemoveContainerRequest) (*agentapi.RemoveContainerResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.containers, r.Id)
	return &agentapi.RemoveContainerResponse{}, nil
}

func (g *fakeGuest) UpdateContainer(_ context.Context, r *agentapi.UpdateContainerRequest) (*agentapi.UpdateContainerResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.containers[r.Id].updated = r
	return &agentapi.UpdateContainerResponse{}, nil
}

func (g *fakeGuest) Stats(context.Context, *agentapi.StatsRequest) (*agentapi.StatsResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := &agentapi.StatsResponse{MemoryTotal: 512 * mib, Guest: &agentapi.ContainerStats{MemoryCurrent: 150, MemoryWorkingSet: 100}, Networks: []*agentapi.NetworkStats{{Name: "eth0", RxBytes: 9}}}
	for id := range g.containers {
		r.Containers = append(r.Containers, &agentapi.ContainerStats{Id: id, CpuUsageNs: 1e9, MemoryCurrent: 50, MemoryWorkingSet: 42, MemoryLimit: 100, Pids: 2, Writable: &agentapi.FilesystemStats{UsedBytes: 1}})
	}
	for id := range g.volumes {
		r.Volumes = append(r.Volumes, &agentapi.VolumeStats{Id: id, Usage: &agentapi.FilesystemStats{UsedBytes: 77, UsedInodes: 2}})
	}
	return r, nil
}

func (g *fakeGuest) Acknowledge(_ context.Context, r *agentapi.AcknowledgeRequest) (*agentapi.AcknowledgeResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c := g.containers[r.ContainerId]; c != nil {
		c.logs = slices.DeleteFunc(c.logs, func(l *agentapi.LogRecord) bool { return l.Offset <= r.Logs })
	}
	g.exits = slices.DeleteFunc(g.exits, func(e *agentapi.ExitRecord) bool { return e.Offset <= r.Exits })
	return &agentapi.AcknowledgeResponse{}, nil
}

func (g *fakeGuest) Online(ctx context.Context, r *agentapi.OnlineRequest) (*agentapi.OnlineResponse, error) {
	if err := g.host.at(ctx, "online"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.online = append(g.online, r)
	return &agentapi.OnlineResponse{Cpus: r.Cpus, Memory: r.Memory}, nil
}

func (g *fakeGuest) Shutdown(context.Context, *agentapi.ShutdownRequest) (*agentapi.ShutdownResponse, error) {
	return &agentapi.ShutdownResponse{}, nil
}

// log has a container write a line.
func (g *fakeGuest) log(id, line string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	c := g.containers[id]
	c.logs = append(c.logs, &agentapi.LogRecord{Offset: c.next, TimeNs: time.Now().UnixNano(), Line: []byte(line)})
	c.next++
	g.wake()
}

// exit ends a container.
func (g *fakeGuest) exit(id string, code int32, reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.exitLocked(g.containers[id], code, reason)
}

func (g *fakeGuest) exitLocked(c *fakeContainer, code int32, reason string) {
	if c.state.Phase != agentapi.ContainerState_RUNNING {
		return
	}
	c.logs = append(c.logs, &agentapi.LogRecord{Offset: c.next, TimeNs: time.Now().UnixNano(), Eof: true})
	c.next++
	e := &agentapi.ExitRecord{Offset: g.nextExit, ContainerId: c.req.Id, ExitCode: code, Reason: reason, TimeNs: time.Now().UnixNano()}
	g.nextExit++
	c.state = &agentapi.ContainerState{Id: c.req.Id, Phase: agentapi.ContainerState_EXITED, Exit: e, CreatedNs: c.state.CreatedNs, StartedNs: c.state.StartedNs}
	g.exits = append(g.exits, e)
	g.wake()
}

func (g *fakeGuest) ServeStream(ctx context.Context, h *agentapi.StreamHeader, s *agentapi.Stream) error {
	switch h.Kind {
	case agentapi.StreamHeader_LOGS:
		return g.serveLogs(h, s)
	case agentapi.StreamHeader_EXITS:
		return g.serveExits(h, s)
	case agentapi.StreamHeader_TREE:
		return g.serveTree(h, s)
	case agentapi.StreamHeader_COPY_OUT:
		g.mu.Lock()
		c, err := g.find(h.ContainerId)
		g.mu.Unlock()
		if err != nil {
			return err
		}
		s.Accept()
		io.WriteString(s, c.message)
		return s.CloseWrite()
	case agentapi.StreamHeader_STDOUT, agentapi.StreamHeader_STDERR, agentapi.StreamHeader_STDIN:
		return g.serveExecStream(ctx, h, s)
	case agentapi.StreamHeader_PORT_FORWARD:
		if h.Port != 80 {
			return fmt.Errorf("nothing listens: %w", errdefs.ErrUnavailable)
		}
		s.Accept()
		b, _ := io.ReadAll(s)
		fmt.Fprintf(s, "echo %s", b)
		return s.CloseWrite()
	}
	return errors.New("unexpected stream " + h.Kind.String())
}

func (g *fakeGuest) serveExecStream(ctx context.Context, h *agentapi.StreamHeader, s *agentapi.Stream) error {
	g.mu.Lock()
	c, err := g.find(h.ContainerId)
	var x *fakeExec
	if err == nil {
		x = c.execs[h.ExecId]
	}
	g.mu.Unlock()
	if err != nil {
		return err
	}
	s.Accept()
	switch {
	case x == nil && h.Kind == agentapi.StreamHeader_STDOUT:
		io.WriteString(s, "attached\n")
		return s.CloseWrite()
	case x == nil:
		return s.CloseWrite()
	case h.Kind == agentapi.StreamHeader_STDIN:
		b, _ := io.ReadAll(s)
		x.in <- string(b)
		return nil
	case h.Kind == agentapi.StreamHeader_STDERR:
		if x.args[0] == "echo" {
			io.WriteString(s, "to stderr")
		}
		return s.CloseWrite()
	}
	switch x.args[0] {
	case "echo":
		io.WriteString(s, strings.Join(x.args[1:], " "))
	case "cat":
		select {
		case in := <-x.in:
			io.WriteString(s, in)
			x.code = 3
			close(x.done)
		case <-ctx.Done():
		}
	case "sleep":
		select {
		case <-x.done:
		case <-ctx.Done():
		}
	}
	return s.CloseWrite()
}

func (g *fakeGuest) serveLogs(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	if err := s.Accept(); err != nil {
		return err
	}
	gone, from := s.Gone(), h.Offset
	for {
		g.mu.Lock()
		c := g.containers[h.ContainerId]
		changed := g.changed
		var batch []*agentapi.LogRecord
		if c != nil {
			batch = slices.Clone(c.logs)
		}
		g.mu.Unlock()
		if c == nil {
			return nil
		}
		for _, l := range batch {
			if l.Offset < from {
				continue
			}
			if err := s.Send(l); err != nil {
				return err
			}
			from = l.Offset + 1
			if l.Eof {
				return s.Flush()
			}
		}
		if err := s.Flush(); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-gone:
			return nil
		}
	}
}

func (g *fakeGuest) serveExits(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	if err := s.Accept(); err != nil {
		return err
	}
	gone, from := s.Gone(), h.Offset
	for {
		g.mu.Lock()
		batch, changed := slices.Clone(g.exits), g.changed
		g.mu.Unlock()
		for _, e := range batch {
			if e.Offset < from {
				continue
			}
			if err := s.Send(e); err != nil {
				return err
			}
			from = e.Offset + 1
		}
		if err := s.Flush(); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-gone:
			return nil
		}
	}
}

func (g *fakeGuest) serveTree(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	if err := g.host.at(context.Background(), "tree"); err != nil {
		return err
	}
	s.Accept()
	tree := map[string]string{}
	tr := tar.NewReader(s)
	for {
		th, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return s.Finish(err)
		}
		b, _ := io.ReadAll(tr)
		switch th.Typeflag {
		case tar.TypeSymlink:
			tree[th.Name] = "-> " + th.Linkname
		case tar.TypeReg:
			tree[th.Name] = string(b)
		}
	}
	io.Copy(io.Discard, s)
	g.mu.Lock()
	g.trees[h.Volume] = tree
	g.sent[h.Volume]++
	g.mu.Unlock()
	return s.Finish(nil)
}

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
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}
