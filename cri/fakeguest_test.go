package cri

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/uuid"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

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
	features   []string
	clock      time.Duration // ahead of the host's
	told       int           // how often it was told that it is wrong
	containers map[string]*fakeContainer
	volumes    map[string]*agentapi.AddVolumeRequest
	trees      map[string]map[string]string
	sent       map[string]int
	subPaths   []string // that were prepared, as VOLUME/SUB
	exits      []*agentapi.ExitRecord
	nextExit   uint64
	online     []*agentapi.OnlineRequest
	statsAsked atomic.Int64
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
	return &fakeGuest{host: h, bootID: uuid.NewString(), protocol: agentapi.Protocol, features: []string{"seccomp", agentapi.FeatureDisks, agentapi.FeatureSubPaths}, changed: make(chan struct{}), containers: map[string]*fakeContainer{}, volumes: map[string]*agentapi.AddVolumeRequest{}, trees: map[string]map[string]string{}, sent: map[string]int{}, nextExit: 1}
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
	r := &agentapi.HelloResponse{Version: "fake", Protocol: g.protocol, BootId: g.bootID, ClockNs: time.Now().Add(g.clock).UnixNano(), SandboxReady: g.setup != nil, Features: g.features}
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
	if blank := g.host.volumes.blank(r); blank != nil {
		return blank, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.volumes[r.Id] = r
	return &agentapi.AddVolumeResponse{}, nil
}

func (g *fakeGuest) PrepareSubPath(ctx context.Context, r *agentapi.PrepareSubPathRequest) (*agentapi.PrepareSubPathResponse, error) {
	if err := g.host.at(ctx, "sub-path"); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.volumes[r.Volume] == nil {
		return nil, fmt.Errorf("volume %s: %w", r.Volume, errdefs.ErrNotFound)
	}
	g.subPaths = append(g.subPaths, r.Volume+"/"+r.SubPath)
	return &agentapi.PrepareSubPathResponse{}, nil
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
	g.statsAsked.Add(1)
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
	case agentapi.StreamHeader_FORMAT:
		return g.serveFormat(h, s)
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
