package agentapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
)

// A Handler is the guest's side of the contract.
type Handler interface {
	AgentService
	// ServeStream serves one stream of a kind other than RPC and returns when
	// it is done with it; the stream is closed then. It calls s.Accept before
	// any data. An error returned before that is the host's answer; later ones
	// are for the log. ctx ends with the session.
	ServeStream(ctx context.Context, h *StreamHeader, s *Stream) error
}

// A Rester is a Handler that is told when a session has ended.
type Rester interface{ Rest() }

// Serve serves one session after another on rw, until reading fails or ctx
// ends. Each attach marker ends the session before and begins a new one; a
// host that goes away without a word leaves its session idle until then, and
// costs nothing. Reads of rw block while there is no host. logf is told what
// went wrong in a session, for people.
func Serve(ctx context.Context, rw io.ReadWriter, h Handler, logf func(format string, args ...any)) error {
	srv := &server{rw: rw, handler: h, logf: logf}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		sc  scanner
		buf = make([]byte, 64<<10)
	)
	defer srv.end(errors.New("serving ended"))
	for {
		n, err := rw.Read(buf)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		sc.feed(buf[:n], srv.data, func(id sessionID) { srv.begin(ctx, id) }, srv.garbled)
		if err != nil {
			return fmt.Errorf("agent channel: %w", err)
		}
	}
}

// server is what Serve knows: the channel and the session on it.
type server struct {
	rw      io.ReadWriter
	handler Handler
	logf    func(string, ...any)
	wmu     sync.Mutex // one writer on rw
	cur     *guestConn // touched by Serve's goroutine alone
}

// data gives payload to the session; without one it is stale and dropped.
func (s *server) data(p []byte) {
	if s.cur != nil {
		_, _ = s.cur.pw.Write(p) // fails when the session is over
	}
}

// garbled ends the session in which the byte stream made no sense.
func (s *server) garbled() { s.end(errors.New("garbled bytes from the host")) }

func (s *server) end(why error) {
	if s.cur != nil {
		s.cur.shut(why)
		s.cur = nil
	}
}

// begin starts the session id, unless it is the one that runs: the host
// repeats its marker until the echo reaches it.
func (s *server) begin(ctx context.Context, id sessionID) {
	if s.cur != nil && s.cur.id == id {
		return
	}
	s.end(errors.New("a new session began"))
	pr, pw := io.Pipe()
	c := &guestConn{srv: s, id: id, pr: pr, pw: pw}
	s.cur = c
	go s.session(ctx, c)
}

// guestConn is the channel as one session's yamux sees it.
type guestConn struct {
	srv *server
	id  sessionID
	pr  *io.PipeReader
	pw  *io.PipeWriter
	fj  frameJoiner

	mu   sync.Mutex
	over error
}

func (c *guestConn) shut(why error) {
	c.mu.Lock()
	if c.over == nil {
		c.over = why
	}
	c.mu.Unlock()
	c.pr.CloseWithError(why)
	c.pw.CloseWithError(io.EOF)
}

func (c *guestConn) ended() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.over
}

func (c *guestConn) Read(p []byte) (int, error) { return c.pr.Read(p) }

// Write waits for its turn, as long as the host reads nothing; a session that
// is over writes no more. yamux's one sending goroutine alone calls it.
func (c *guestConn) Write(p []byte) (int, error) {
	frame := c.fj.join(p)
	if len(frame) == 0 {
		return len(p), nil
	}
	c.srv.wmu.Lock()
	defer c.srv.wmu.Unlock()
	if err := c.ended(); err != nil {
		return 0, err
	}
	if _, err := c.srv.rw.Write(frame); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *guestConn) Close() error {
	c.shut(io.ErrClosedPipe)
	return nil
}

// session runs one session to its end.
func (s *server) session(ctx context.Context, c *guestConn) {
	if _, err := c.Write(appendMarker(nil, kindEcho, c.id)); err != nil {
		return
	}
	mux, err := yamux.Server(c, muxConfig())
	if err != nil {
		s.logf("agent session: %v", err)
		return
	}
	if r, ok := s.handler.(Rester); ok {
		defer r.Rest()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.shut(context.Canceled) })
	defer stop()
	cause := func() error {
		if mux.IsClosed() {
			return io.EOF
		}
		return nil
	}
	for {
		raw, err := mux.AcceptStream()
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, yamux.ErrSessionShutdown) && c.ended() == nil {
				s.logf("agent session: %v", err)
			}
			c.shut(io.EOF)
			return
		}
		go s.stream(ctx, raw, cause)
	}
}

// stream serves one stream of a session.
func (s *server) stream(ctx context.Context, raw *yamux.Stream, cause func() error) {
	defer raw.Close()
	var h StreamHeader
	raw.SetReadDeadline(time.Now().Add(replyTimeout))
	if err := ReadMessage(raw, &h); err != nil {
		return
	}
	raw.SetReadDeadline(time.Time{})
	st := newStream(raw, cause)
	if h.Kind == StreamHeader_RPC {
		if st.Accept() == nil {
			s.rpc(ctx, raw)
		}
		return
	}
	if _, ok := StreamHeader_Kind_name[int32(h.Kind)]; !ok {
		_ = st.Finish(fmt.Errorf("stream of unknown kind %d: %w", h.Kind, errdefs.ErrNotImplemented))
		return
	}
	if err := s.handler.ServeStream(ctx, &h, st); err != nil && ctx.Err() == nil {
		if !st.accepted {
			_ = st.Finish(err)
			return
		}
		s.logf("agent stream %s %s/%s: %v", h.Kind, h.ContainerId, h.ExecId, err)
	}
}

// rpc serves ttrpc on one stream until it or the session ends.
func (s *server) rpc(ctx context.Context, raw *yamux.Stream) {
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(statusErrors))
	if err != nil {
		s.logf("agent rpc: %v", err)
		return
	}
	RegisterAgentService(srv, s.handler)
	closed := make(chan struct{})
	l := &oneListener{conn: &notedConn{Conn: raw, closed: closed}, done: closed}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	_ = srv.Serve(ctx, l) // returns when the connection is closed
	srv.Close()
}

// statusErrors gives every error of the service the gRPC code of its class.
func statusErrors(ctx context.Context, u ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, m ttrpc.Method) (any, error) {
	resp, err := m(ctx, u)
	return resp, toStatus(err)
}

// oneListener hands out one connection and then waits for its end.
type oneListener struct {
	conn net.Conn
	once sync.Once
	done chan struct{}
}

func (l *oneListener) Accept() (c net.Conn, err error) {
	l.once.Do(func() { c = l.conn })
	if c != nil {
		return c, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneListener) Close() error   { return nil }
func (l *oneListener) Addr() net.Addr { return l.conn.LocalAddr() }

// notedConn says when it was closed.
type notedConn struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (n *notedConn) Close() error {
	err := n.Conn.Close()
	n.once.Do(func() { close(n.closed) })
	return err
}
