package podinit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// ServeStream serves every stream but RPC.
func (a *agent) ServeStream(ctx context.Context, h *agentapi.StreamHeader, s *agentapi.Stream) error {
	if err := a.requireSandbox(); err != nil {
		return err
	}
	switch h.Kind {
	case agentapi.StreamHeader_STDIN:
		return a.serveStdin(h, s)
	case agentapi.StreamHeader_STDOUT, agentapi.StreamHeader_STDERR:
		return a.serveOutput(h, s)
	case agentapi.StreamHeader_TREE:
		return a.serveTree(h, s)
	case agentapi.StreamHeader_FORMAT:
		return a.serveFormat(h, s)
	case agentapi.StreamHeader_COPY_OUT:
		return a.serveCopyOut(h, s)
	case agentapi.StreamHeader_PORT_FORWARD:
		return servePortForward(ctx, h, s)
	case agentapi.StreamHeader_LOGS:
		c, err := a.container(h.ContainerId)
		if err != nil {
			return err
		}
		_ = s.Accept()
		return quiet(c.logs.follow(h.Offset, s.Gone(), s.SendFrames, s.Flush))
	case agentapi.StreamHeader_EXITS:
		_ = s.Accept()
		return quiet(a.exits.follow(h.Offset, s.Gone(), func(r *agentapi.ExitRecord) error { return s.Send(r) }, s.Flush))
	}
	return fmt.Errorf("stream %s: %w", h.Kind, errdefs.ErrNotImplemented)
}

// quiet drops the error of a host that went away, which is no news.
func quiet(err error) error {
	if errdefs.IsUnavailable(err) {
		return nil
	}
	return err
}

// process finds a container's process or one of its execs.
func (a *agent) process(containerID, execID string) (*process, error) {
	c, err := a.container(containerID)
	if err != nil {
		return nil, err
	}
	return c.process(execID)
}

func (a *agent) serveStdin(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	p, err := a.process(h.ContainerId, h.ExecId)
	if err != nil {
		return err
	}
	if !p.io.hasStdin() {
		return fmt.Errorf("%s has no stdin: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	_ = s.Accept()
	_, err = io.Copy(stdinWriter{p.io}, s)
	if p.io.stdinEnds {
		p.io.closeStdin()
	}
	if errors.Is(err, errStdinClosed) {
		return nil
	}
	return quiet(err)
}

func (a *agent) serveOutput(h *agentapi.StreamHeader, s *agentapi.Stream) error {
	p, err := a.process(h.ContainerId, h.ExecId)
	if err != nil {
		return err
	}
	stderr := h.Kind == agentapi.StreamHeader_STDERR
	if stderr && p.io.terminal() {
		return fmt.Errorf("%s has a terminal and so no stderr: %w", p.name(), errdefs.ErrFailedPrecondition)
	}
	if h.ExecId == "" {
		return p.io.attach(stderr, s)
	}
	out, err := p.io.takeOutput(stderr)
	if err != nil {
		return fmt.Errorf("%s: %w", p.name(), err)
	}
	defer out.Close()
	_ = s.Accept()
	gone := s.Gone()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-gone:
			out.Close() // the process gets SIGPIPE instead of a full pipe
		case <-done:
		}
	}()
	if _, err := io.Copy(s, endOfTerminal{out}); err != nil {
		return quiet(err)
	}
	return quiet(s.CloseWrite())
}

// servePortForward connects to the guest's loopback.
func servePortForward(ctx context.Context, h *agentapi.StreamHeader, s *agentapi.Stream) error {
	if h.Port == 0 || h.Port > 65535 {
		return fmt.Errorf("port %d: %w", h.Port, errdefs.ErrInvalidArgument)
	}
	port := strconv.Itoa(int(h.Port))
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		var err6 error
		if conn, err6 = d.DialContext(ctx, "tcp", net.JoinHostPort("::1", port)); err6 != nil {
			return fmt.Errorf("nothing in the pod listens on port %s (%v): %w", port, err, errdefs.ErrUnavailable)
		}
	}
	tcp := conn.(*net.TCPConn)
	defer tcp.Close()
	if err := s.Accept(); err != nil {
		return nil
	}
	up := make(chan error, 1)
	go func() {
		_, err := io.Copy(struct{ io.Writer }{tcp}, struct{ io.Reader }{s})
		if err == nil {
			err = tcp.CloseWrite()
		} else {
			tcp.Close() // cut, not ended
		}
		up <- err
	}()
	_, err = io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{tcp})
	if err == nil {
		err = s.CloseWrite()
	}
	if err == nil {
		err = <-up
	}
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return quiet(err)
}
