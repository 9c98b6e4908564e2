package podinit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Exit reasons, as the kubelet knows them.
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOM        = "OOMKilled"
	reasonStartError = "StartError"
	// startErrorCode is what other runtimes report for it.
	startErrorCode = 128
)

// A process is a container's first one or an exec.
type process struct {
	containerID, execID string
	io                  *stdio

	mu      sync.Mutex
	pid     int
	pidfd   int // -1: none
	started int64
	exit    *agentapi.ExitRecord
	done    chan struct{} // closed when exit is set
}

func newProcess(containerID, execID string) *process {
	return &process{containerID: containerID, execID: execID, io: &stdio{}, pidfd: -1, done: make(chan struct{})}
}

func (p *process) name() string {
	if p.execID == "" {
		return "container " + p.containerID
	}
	return "process " + p.execID + " of container " + p.containerID
}

// begin records that the process runs.
func (p *process) begin(pid int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pid, p.started = pid, time.Now().UnixNano()
	// Should it have ended already, there is nothing left to signal.
	if fd, err := unix.PidfdOpen(pid, 0); err == nil {
		p.pidfd = fd
	}
}

// finish records how it ended, once.
func (p *process) finish(j *exitJournal, code int32, reason, message string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exit != nil {
		return
	}
	p.exit = &agentapi.ExitRecord{
		ContainerId: p.containerID, ExecId: p.execID, ExitCode: code, Reason: reason, Message: message, TimeNs: time.Now().UnixNano(),
	}
	if p.pidfd >= 0 {
		unix.Close(p.pidfd)
		p.pidfd = -1
	}
	j.append(p.exit)
	close(p.done)
}

func (p *process) ended() *agentapi.ExitRecord {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

func (p *process) running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid != 0 && p.exit == nil
}

func (p *process) response() *agentapi.StartProcessResponse {
	p.mu.Lock()
	defer p.mu.Unlock()
	return &agentapi.StartProcessResponse{Pid: int32(p.pid), StartedNs: p.started}
}

// signal sends a signal; to a process that has ended it does nothing.
func (p *process) signal(n unix.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pid == 0 {
		return fmt.Errorf("%s is not running: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	if p.pidfd < 0 {
		return nil
	}
	if err := unix.PidfdSendSignal(p.pidfd, n, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("signal %d to %s: %w", n, p.name(), err)
	}
	return nil
}

// WaitProcess waits for an exit.
func (a *agent) WaitProcess(ctx context.Context, r *agentapi.WaitProcessRequest) (*agentapi.WaitProcessResponse, error) {
	p, err := a.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	select {
	case <-p.done:
		return &agentapi.WaitProcessResponse{Exit: p.ended()}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// SignalProcess signals one process, or every process of the container.
func (a *agent) SignalProcess(ctx context.Context, r *agentapi.SignalProcessRequest) (*agentapi.SignalProcessResponse, error) {
	c, err := a.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.Signal == 0 || r.Signal > 64 {
		return nil, fmt.Errorf("signal %d: want 1 to 64: %w", r.Signal, errdefs.ErrInvalidArgument)
	}
	sig := unix.Signal(r.Signal)
	if r.All {
		if err := signalCgroup(c.cgroup, sig); err != nil {
			return nil, fmt.Errorf("signal %d to all of container %s: %w", sig, c.id, err)
		}
		return &agentapi.SignalProcessResponse{}, nil
	}
	p, err := c.process(r.ExecId)
	if err != nil {
		return nil, err
	}
	return &agentapi.SignalProcessResponse{}, p.signal(sig)
}

// ResizeTerminal sets a terminal's size.
func (a *agent) ResizeTerminal(ctx context.Context, r *agentapi.ResizeTerminalRequest) (*agentapi.ResizeTerminalResponse, error) {
	p, err := a.process(r.ContainerId, r.ExecId)
	if err != nil {
		return nil, err
	}
	if err := p.io.resize(r.Width, r.Height); err != nil {
		return nil, fmt.Errorf("%s: %w", p.name(), err)
	}
	return &agentapi.ResizeTerminalResponse{}, nil
}

// StartProcess runs a created container or an exec in a running one.
func (a *agent) StartProcess(_ context.Context, r *agentapi.StartProcessRequest) (*agentapi.StartProcessResponse, error) {
	// A host that goes away in the middle must not leave half a process.
	c, err := a.container(r.ContainerId)
	if err != nil {
		return nil, err
	}
	if r.ExecId == "" {
		return a.startContainer(c)
	}
	return a.startExec(c, r)
}

func (a *agent) startExec(c *container, r *agentapi.StartProcessRequest) (*agentapi.StartProcessResponse, error) {
	if err := checkID("exec", r.ExecId); err != nil {
		return nil, err
	}
	l := a.lockOf("e/" + c.id + "/" + r.ExecId)
	l.Lock()
	defer l.Unlock()
	defer a.dropLock("e/" + c.id + "/" + r.ExecId)
	if p, err := c.process(r.ExecId); err == nil {
		return p.response(), nil
	}
	if !c.main.running() {
		return nil, fmt.Errorf("container %s is not running: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	file, err := c.writeProcess(r)
	if err != nil {
		return nil, err
	}
	defer os.Remove(file)
	p := newProcess(c.id, r.ExecId)
	p.io.stdinEnds = true
	pid, ended, err := a.launch(launch{
		verb: []string{"exec", "--process", file}, id: c.id, dir: c.bundle, tty: r.Tty, stdin: r.Stdin,
	}, p.io)
	if err != nil {
		if c.main.ended() != nil {
			return nil, fmt.Errorf("container %s has ended: %w", c.id, errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	p.begin(pid)
	c.addExec(p)
	go func() {
		ws := <-ended
		code := exitCode(ws)
		p.finish(a.exits, code, reasonOf(code), "")
	}()
	return p.response(), nil
}

// writeProcess writes the OCI process of an exec where crun reads it.
func (c *container) writeProcess(r *agentapi.StartProcessRequest) (string, error) {
	p := &specs.Process{}
	if err := json.Unmarshal(r.Process, p); err != nil {
		return "", fmt.Errorf("OCI process: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if len(p.Args) == 0 {
		return "", fmt.Errorf("OCI process: no command to run: %w", errdefs.ErrInvalidArgument)
	}
	completeProcess(p, r.Tty)
	f, err := os.CreateTemp(c.bundle, "exec-*.json")
	if err != nil {
		return "", err
	}
	err = json.NewEncoder(f).Encode(p)
	return f.Name(), errors.Join(err, f.Close())
}

func reasonOf(code int32) string {
	if code == 0 {
		return reasonCompleted
	}
	return reasonError
}
