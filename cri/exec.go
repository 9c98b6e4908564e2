package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

const (
	// maxExecOutput caps ExecSync's outputs, as CRI asks (CVE-2022-1708); the
	// rest is read and dropped. It is 16 MiB less the frame of the message,
	// whose limit is 16 MiB on both sides.
	maxExecOutput = maxMessage - 4096
	// outputGrace is how long the output of a process that has ended is
	// waited for: a child that it left behind may hold it open.
	outputGrace = 5 * time.Second
)

// An execution is one process started in a running container.
type execution struct {
	pod     *pod
	session *agentapi.Client
	cid, id string
	stdout  io.ReadCloser
	stderr  io.ReadCloser // nil with a terminal
	stdin   io.WriteCloser
}

// startExec starts a process with the container's environment, user and
// limits, and opens its streams. They belong to one session: an execution does
// not outlive it.
func (s *Server) startExec(ctx context.Context, containerID string, cmd []string, tty, stdin bool) (*execution, error) {
	if len(cmd) == 0 {
		return nil, refuse("cmd", "it is empty")
	}
	if err := checkArguments("cmd", cmd); err != nil {
		return nil, err
	}
	c, p, err := s.runningContainer(containerID)
	if err != nil {
		return nil, err
	}
	var process specs.Process
	if err := json.Unmarshal(c.Process, &process); err != nil {
		return nil, fmt.Errorf("container %s: its process is not readable: %w", c.ID, err)
	}
	process.Args, process.Terminal, process.ConsoleSize = cmd, tty, nil
	if tty {
		process.Env = lastWins(append([]string{"TERM=xterm"}, process.Env...))
	}
	b, err := json.Marshal(process)
	if err != nil {
		return nil, err
	}
	session, err := p.link.session(ctx)
	if err != nil {
		return nil, err
	}
	e := &execution{pod: p, session: session, cid: c.ID, id: newID()[:16]}
	start := &agentapi.StartProcessRequest{ContainerId: e.cid, ExecId: e.id, Process: b, Stdin: stdin, Tty: tty}
	if _, err = session.StartProcess(ctx, start); err != nil {
		if tooLate(ctx, err) {
			go e.abandon(start)
		}
		return nil, fmt.Errorf("exec in container %s: %w", c.ID, err)
	}
	if err := e.open(ctx, tty, stdin); err != nil {
		e.kill()
		e.close()
		return nil, fmt.Errorf("exec in container %s: %w", c.ID, err)
	}
	return e, nil
}

func (e *execution) open(ctx context.Context, tty, stdin bool) (err error) {
	if e.stdout, err = e.session.Stdout(ctx, e.cid, e.id); err != nil {
		return err
	}
	if !tty {
		if e.stderr, err = e.session.Stderr(ctx, e.cid, e.id); err != nil {
			return err
		}
	}
	if stdin {
		e.stdin, err = e.session.Stdin(ctx, e.cid, e.id)
	}
	return err
}

func (e *execution) close() {
	for _, c := range []io.Closer{e.stdin, e.stdout, e.stderr} {
		if c != nil {
			c.Close()
		}
	}
}

// kill ends the process, whatever became of who asked for it. Its container's
// other processes, which All would reach, have done nothing wrong.
func (e *execution) kill() {
	ctx, cancel := context.WithTimeout(e.pod.ctx, 10*time.Second)
	defer cancel()
	_, err := e.session.SignalProcess(ctx, &agentapi.SignalProcessRequest{ContainerId: e.cid, ExecId: e.id, Signal: uint32(syscall.SIGKILL)})
	if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) && e.session.Err() == nil {
		e.pod.log.Debug("killing an exec failed", "container", e.cid, "err", err)
	}
}

// abandonTimeout bounds how long the end of a start that nobody waits for any
// more is waited for, in order to kill what it started.
const abandonTimeout = time.Minute

// abandon kills a process whose start was given up while the guest was at it:
// the guest completes what it has begun. The same start, asked for again,
// returns when the first is over.
func (e *execution) abandon(start *agentapi.StartProcessRequest) {
	ctx, cancel := context.WithTimeout(e.pod.ctx, abandonTimeout)
	defer cancel()
	if _, err := e.session.StartProcess(ctx, start); err == nil {
		e.kill()
	}
}

// wait returns the process's exit code. It has no deadline of its own.
func (e *execution) wait(ctx context.Context) (int32, error) {
	resp, err := e.session.WaitProcess(ctx, &agentapi.WaitProcessRequest{ContainerId: e.cid, ExecId: e.id})
	if err != nil {
		return 0, err
	}
	return resp.GetExit().GetExitCode(), nil
}

// ExecSync runs a command and returns what it wrote and its exit code.
func (r *runtimeService) ExecSync(ctx context.Context, req *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	timeout := seconds(req.GetTimeout())
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	e, err := r.startExec(ctx, req.GetContainerId(), req.GetCmd(), false, false)
	if err != nil {
		return nil, err
	}
	defer e.close()
	output := &execOutput{room: maxExecOutput}
	var readers sync.WaitGroup
	readers.Go(func() { io.Copy(output.keep(&output.stdout), e.stdout) })
	readers.Go(func() { io.Copy(output.keep(&output.stderr), e.stderr) })
	code, err := e.wait(ctx)
	if err != nil {
		e.kill()
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("command %q in container %s did not end within %s: %w", req.Cmd[0], e.cid, timeout, err)
		}
		return nil, err
	}
	// What it left behind may hold the outputs open: do not wait for that.
	ended := make(chan struct{})
	go func() {
		readers.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(outputGrace):
	case <-ctx.Done():
	}
	stdout, stderr := output.take()
	return &runtimeapi.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: code}, nil
}

// An execOutput keeps what fits into one message, both outputs together.
type execOutput struct {
	mu     sync.Mutex
	room   int
	stdout bytes.Buffer
	stderr bytes.Buffer
}

// keep returns a writer into buf that takes everything and keeps what fits.
func (o *execOutput) keep(buf *bytes.Buffer) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		o.mu.Lock()
		defer o.mu.Unlock()
		n := min(o.room, len(p))
		o.room -= n
		buf.Write(p[:n])
		return len(p), nil
	})
}

func (o *execOutput) take() (stdout, stderr []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Clone(o.stdout.Bytes()), bytes.Clone(o.stderr.Bytes())
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Exec, Attach and PortForward answer with a URL that works once.
func (r *runtimeService) Exec(_ context.Context, req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	c, _, err := r.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	req.ContainerId = c.ID
	return r.streams.GetExec(req)
}

// Attach: see Exec.
func (r *runtimeService) Attach(_ context.Context, req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	c, _, err := r.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	req.ContainerId = c.ID
	return r.streams.GetAttach(req)
}

// PortForward: see Exec.
func (r *runtimeService) PortForward(_ context.Context, req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	sb, err := r.findSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if _, _, err := r.podOf(sb.ID); err != nil {
		return nil, err
	}
	req.PodSandboxId = sb.ID
	return r.streams.GetPortForward(req)
}

// streamRuntime is what the streaming server runs its requests with. No
// stream has a deadline.
type streamRuntime struct{ *Server }

// Exec runs a command with its streams joined to the client's. A client that
// leaves takes the streams with it, and the process goes on without: it gets
// the end of its input, SIGPIPE as it writes, SIGHUP if it had a terminal; the
// same as with other runtimes, and what nohup is made for.
func (s streamRuntime) Exec(ctx context.Context, containerID string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	e, err := s.startExec(ctx, containerID, cmd, tty, in != nil)
	if err != nil && ctx.Err() != nil {
		return nil // nobody is left to be told
	}
	if err != nil {
		return err
	}
	defer e.close()
	if tty {
		go e.pod.followSize(ctx, e.session, e.cid, e.id, resize)
	}
	if in != nil {
		go func() {
			io.Copy(e.stdin, in)
			e.stdin.Close()
		}()
	}
	outputs := copyOutputs(e.stdout, e.stderr, out, errOut)
	code, err := e.wait(ctx)
	if ctx.Err() != nil {
		return nil // as above
	}
	if err != nil {
		return err
	}
	select {
	case <-outputs:
	case <-time.After(outputGrace):
	case <-ctx.Done():
	}
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("exit status %d", code), Code: int(code)}
	}
	return nil
}

// copyOutputs copies what the process writes to those who want it, and drops
// what nobody does; the channel is closed when both have ended.
func copyOutputs(stdout, stderr io.Reader, out, errOut io.Writer) <-chan struct{} {
	done := make(chan struct{})
	var wg sync.WaitGroup
	for _, pair := range []struct {
		from io.Reader
		to   io.Writer
	}{{stdout, out}, {stderr, errOut}} {
		if pair.from == nil {
			continue
		}
		to := pair.to
		if to == nil {
			to = io.Discard
		}
		wg.Go(func() {
			if _, err := io.Copy(to, pair.from); err != nil {
				io.Copy(io.Discard, pair.from)
			}
		})
	}
	go func() {
		wg.Wait()
		close(done)
	}()
	return done
}

// followSize passes the client's terminal size on.
func (p *pod) followSize(ctx context.Context, session *agentapi.Client, containerID, execID string, resize <-chan remotecommand.TerminalSize) {
	for {
		select {
		case size, ok := <-resize:
			if !ok {
				return
			}
			_, err := session.ResizeTerminal(ctx, &agentapi.ResizeTerminalRequest{ContainerId: containerID, ExecId: execID, Width: uint32(size.Width), Height: uint32(size.Height)})
			if err != nil && ctx.Err() == nil {
				p.log.Debug("resizing a terminal failed", "container", containerID, "err", err)
			}
		case <-ctx.Done():
			return
		}
	}
}

// Attach joins a client to a container's own streams. It returns when the
// output ends or the client leaves; the container goes on.
func (s streamRuntime) Attach(ctx context.Context, containerID string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	c, p, err := s.runningContainer(containerID)
	if err != nil {
		return err
	}
	if in != nil && !c.Config.GetStdin() {
		return fmt.Errorf("container %s has no stdin: start it with stdin: true, or attach without: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	session, err := p.link.session(ctx)
	if err != nil {
		return err
	}
	if c.Config.GetTty() {
		go p.followSize(ctx, session, c.ID, "", resize)
	}
	stdout, err := session.Stdout(ctx, c.ID, "")
	if err != nil {
		return err
	}
	defer stdout.Close()
	var stderr io.Reader
	if !c.Config.GetTty() {
		r, err := session.Stderr(ctx, c.ID, "")
		if err != nil {
			return err
		}
		defer r.Close()
		stderr = r
	}
	left := make(chan struct{})
	if in != nil {
		w, err := session.Stdin(ctx, c.ID, "")
		if err != nil {
			return err
		}
		defer w.Close()
		go func() {
			io.Copy(w, in)
			if c.Config.GetStdinOnce() {
				w.Close()
			}
			if out == nil && errOut == nil {
				close(left)
			}
		}()
	}
	select {
	case <-copyOutputs(stdout, stderr, out, errOut):
	case <-left:
	case <-ctx.Done():
	case <-p.process(c.ID).exited:
		time.Sleep(50 * time.Millisecond) // the last bytes are on their way
	}
	return nil
}

// PortForward joins a client to a port on the guest's loopback; either
// direction may end before the other.
func (s streamRuntime) PortForward(ctx context.Context, sandboxID string, port int32, client io.ReadWriteCloser) error {
	defer client.Close()
	p, _, err := s.podOf(sandboxID)
	if err != nil {
		return err
	}
	if port <= 0 || port > 65535 {
		return refuse("port", fmt.Sprintf("%d is not a port", port))
	}
	session, err := p.link.session(ctx)
	if err != nil {
		return err
	}
	conn, err := session.PortForward(ctx, uint16(port))
	if err != nil {
		return fmt.Errorf("port %d of sandbox %s: %w", port, sandboxID, err)
	}
	defer conn.Close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		io.Copy(conn, client)
		if w, ok := conn.(interface{ CloseWrite() error }); ok {
			w.CloseWrite()
		}
	}()
	received := make(chan error, 1)
	go func() {
		_, err := io.Copy(client, conn)
		received <- err
	}()
	select {
	case err := <-received:
		return err
	case <-ctx.Done():
		return nil
	}
}
