package agentapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/hashicorp/yamux"
)

const (
	// remark is how often Attach repeats its marker until the guest answers.
	remark = 200 * time.Millisecond
	// maxStale bounds what Attach skips of the previous session's output.
	maxStale = 64 << 20
	// replyTimeout bounds the wait for the guest to accept a stream.
	replyTimeout = 30 * time.Second
	// maxAbandoned is how many calls whose callers went away a guest may leave
	// unanswered: each costs memory until its answer. An honest guest answers
	// at the call's deadline, so this is one that hangs, or worse.
	maxAbandoned = 256
)

// A Client is one session with a guest. It is safe for concurrent use and
// good until Done; then Attach again on a new connection. The calls of the
// service return errors of errdefs classes.
type Client struct {
	AgentService

	mux     *yamux.Session
	channel *hostConn
	rpc     *ttrpc.Client
	done    chan struct{}

	abandoned atomic.Int32 // calls that nobody waits for any more
	answered  atomic.Int64 // when a call was answered last, Unix ns

	mu    sync.Mutex
	cause error
}

// Attach begins a session on conn, which it owns from then on (and closes when
// it fails). It waits, as long as ctx allows, until the guest answers: the
// guest may still be booting, or another host may hold the channel. It may
// begin in the middle of what an earlier session left half sent.
func Attach(ctx context.Context, conn net.Conn) (*Client, error) {
	rest, err := resync(ctx, conn)
	if err != nil {
		conn.Close()
		return nil, err
	}
	channel := &hostConn{Conn: conn, rest: rest}
	mux, err := yamux.Client(channel, muxConfig())
	if err != nil {
		conn.Close()
		return nil, err
	}
	c := &Client{mux: mux, channel: channel, done: make(chan struct{})}
	go c.watch()
	s, err := c.open(ctx, &StreamHeader{Kind: StreamHeader_RPC})
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("agent attach: %w", err)
	}
	c.rpc = ttrpc.NewClient(&rpcGuard{Conn: s.raw, fail: c.fail}, ttrpc.WithUnaryClientInterceptor(c.intercept))
	c.AgentService = NewAgentClient(c.rpc)
	return c, nil
}

// muxConfig is what both ends use: no keep-alives (an idle session sends
// nothing), no write time-out (a paused guest is not a dead one).
func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.AcceptBacklog = 128
	c.ConnectionWriteTimeout = 24 * time.Hour
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 30 * time.Second
	c.LogOutput = io.Discard
	return c
}

// resync writes the marker until its echo comes, and returns what was read
// behind the echo.
func resync(ctx context.Context, conn net.Conn) ([]byte, error) {
	id := newSessionID()
	echoed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	wrote := make(chan error, 1)
	go func() {
		wrote <- writeMarkers(conn, appendMarker(nil, kindAttach, id), echoed)
	}()
	rest, err := awaitEcho(conn, appendMarker(nil, kindEcho, id))
	close(echoed)
	if err != nil {
		conn.SetDeadline(time.Unix(1, 0)) // frees the writer
	}
	werr := <-wrote
	if !stop() && ctx.Err() != nil {
		return nil, fmt.Errorf("agent attach: no answer from the guest: %w", ctx.Err())
	}
	if err = errors.Join(err, werr); err != nil {
		return nil, fmt.Errorf("agent attach: %w: %w", err, errdefs.ErrUnavailable)
	}
	return rest, nil
}

func writeMarkers(conn net.Conn, marker []byte, echoed <-chan struct{}) error {
	t := time.NewTimer(remark)
	defer t.Stop()
	for {
		if _, err := conn.Write(marker); err != nil {
			select {
			case <-echoed:
				return nil
			default:
			}
			return err
		}
		select {
		case <-echoed:
			return nil
		case <-t.C:
			t.Reset(remark)
		}
	}
}

// awaitEcho skips everything up to echo and returns what came behind it.
func awaitEcho(r io.Reader, echo []byte) ([]byte, error) {
	buf := make([]byte, 0, 32<<10)
	for skipped := 0; skipped < maxStale; {
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if i := bytes.Index(buf, echo); i >= 0 {
			return bytes.Clone(buf[i+len(echo):]), nil
		}
		if err != nil {
			return nil, err
		}
		if drop := len(buf) - len(echo); drop > 0 {
			buf = buf[:copy(buf, buf[drop:])]
			skipped += drop
		}
	}
	return nil, misbehaved("it sent %d MiB without answering", maxStale>>20)
}

// hostConn is the channel after the echo: reads are plain, writes stuffed.
type hostConn struct {
	net.Conn
	rest []byte
	in   muxGuard
	// wrong is what the guest did wrong, seen before yamux's own reason is.
	wrong atomic.Pointer[error]
	fj    frameJoiner
	st    stuffer
	buf   []byte
	// ending: the last that is written is that the session is over.
	ending atomic.Bool
}

// endPatience bounds the wait for a guest that does not read.
const endPatience = 5 * time.Second

// Close is called by yamux when nothing more is written. To a guest, the end
// is what any kind of marker is that it does not know.
func (h *hostConn) Close() error {
	if h.ending.Swap(false) {
		h.Conn.SetWriteDeadline(time.Now().Add(endPatience))
		_, err := h.Conn.Write(appendMarker(nil, kindEnd, sessionID{}))
		return errors.Join(err, h.Conn.Close())
	}
	return h.Conn.Close()
}

// Read is called by yamux's one receiving goroutine alone.
func (h *hostConn) Read(p []byte) (n int, err error) {
	if len(h.rest) > 0 {
		n = copy(p, h.rest)
		h.rest = h.rest[n:]
	} else {
		n, err = h.Conn.Read(p)
	}
	if bad := h.in.feed(p[:n]); bad != nil {
		h.wrong.CompareAndSwap(nil, &bad)
		return 0, bad
	}
	return n, err
}

// Write is called by yamux's one sending goroutine alone.
func (h *hostConn) Write(p []byte) (int, error) {
	frame := h.fj.join(p)
	if len(frame) == 0 {
		return len(p), nil
	}
	h.buf = h.st.append(h.buf[:0], frame)
	if _, err := h.Conn.Write(h.buf); err != nil {
		return 0, err
	}
	return len(p), nil
}

// watch ends the session when the guest opens a stream, which it never may,
// and records why the session ended.
func (c *Client) watch() {
	s, err := c.mux.AcceptStream()
	if err == nil {
		s.Close()
		c.fail(misbehaved("it opened a stream"))
	} else if errors.Is(err, yamux.ErrRecvWindowExceeded) {
		c.fail(misbehaved("it sent more than it was given room for"))
	} else if !errors.Is(err, yamux.ErrSessionShutdown) {
		c.fail(err)
	}
	<-c.mux.CloseChan()
	c.fail(io.EOF)
	close(c.done)
}

// fail ends the session; the first cause stays.
func (c *Client) fail(err error) {
	c.mu.Lock()
	if c.cause == nil {
		c.cause = err
	}
	c.mu.Unlock()
	go c.mux.Close() // waits for yamux's goroutines, of which we may be one
}

// Err says why the session ended; nil while it lasts.
func (c *Client) Err() error {
	select {
	case <-c.done:
		return errBroken(c.broken())
	default:
		return nil
	}
}

func (c *Client) broken() error {
	if !c.mux.IsClosed() {
		return nil
	}
	if wrong := c.channel.wrong.Load(); wrong != nil {
		return *wrong
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cause == nil {
		return io.EOF
	}
	return c.cause
}

// Answered returns when the guest has answered a call of the service last, the
// zero time if it has not.
func (c *Client) Answered() time.Time {
	if ns := c.answered.Load(); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

// Done is closed when the session has ended, for whatever reason.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close ends the session and the connection. The guest goes on.
func (c *Client) Close() error {
	c.fail(errors.New("closed by the host"))
	<-c.done
	return nil
}

// End ends the session as Close does, and tells the guest so: nothing of the
// session is left in it, where Close leaves it idle until the next one. For a
// guest that is saved and copied, after calls that have all been answered.
func (c *Client) End() error {
	c.channel.ending.Store(true)
	return c.Close()
}

// intercept lets a call end with its ctx even when the guest takes nothing,
// and gives its error an errdefs class.
func (c *Client) intercept(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	out := make(chan error, 1)
	own := &ttrpc.Response{}
	// The request carries the deadline to the guest already. The call itself
	// stays until its answer is here: ttrpc would log one that comes late.
	var settled atomic.Bool // answered or abandoned, whichever was first
	go func() {
		err := invoke(context.WithoutCancel(ctx), req, own)
		if err == nil {
			c.answered.Store(time.Now().UnixNano())
		}
		if !settled.CompareAndSwap(false, true) {
			c.abandoned.Add(-1)
		}
		out <- err
	}()
	select {
	case err := <-out:
		if err != nil {
			if cause := c.broken(); cause != nil || errors.Is(err, ttrpc.ErrClosed) {
				return fmt.Errorf("agent %s: %w", req.Method, errBroken(cause))
			}
			return fmt.Errorf("agent %s: %w", req.Method, err)
		}
	case <-ctx.Done():
		if settled.CompareAndSwap(false, true) && c.abandoned.Add(1) > maxAbandoned {
			c.fail(fmt.Errorf("the guest left %d calls unanswered", maxAbandoned))
		}
		return fmt.Errorf("agent %s: %w", req.Method, ctx.Err())
	}
	if s := own.Status; s != nil && s.Code != 0 {
		return fromStatusProto(req.Method, s)
	}
	resp.Payload = own.Payload
	return nil
}

// open opens a typed stream and waits until the guest has accepted it.
func (c *Client) open(ctx context.Context, h *StreamHeader) (*Stream, error) {
	type result struct {
		s   *Stream
		err error
	}
	out := make(chan result, 1)
	ctx, cancel := context.WithTimeout(ctx, replyTimeout)
	defer cancel()
	go func() {
		s, err := c.openWait(h)
		if err == nil && ctx.Err() != nil {
			s.Close()
		}
		out <- result{s, err}
	}()
	select {
	case r := <-out:
		return r.s, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("agent stream %s: %w", h.Kind, ctx.Err())
	}
}

func (c *Client) openWait(h *StreamHeader) (*Stream, error) {
	raw, err := c.mux.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("agent stream %s: %w", h.Kind, errBroken(c.broken()))
	}
	s := newStream(raw, c.broken)
	s.fail = c.fail
	raw.SetReadDeadline(time.Now().Add(replyTimeout))
	if err = WriteMessage(raw, h); err == nil {
		err = s.reply()
	}
	if err != nil {
		raw.Close()
		return nil, fmt.Errorf("agent stream %s: %w", h.Kind, s.explain(err))
	}
	raw.SetReadDeadline(time.Time{})
	return s, nil
}

// Stdin opens the standard input of a container (execID empty) or of an exec.
// Close ends the process's input (unless the container keeps its stdin open,
// see stdin_once); a session that breaks does the same.
func (c *Client) Stdin(ctx context.Context, containerID, execID string) (io.WriteCloser, error) {
	s, err := c.open(ctx, &StreamHeader{Kind: StreamHeader_STDIN, ContainerId: containerID, ExecId: execID})
	if err != nil {
		return nil, err
	}
	return &stdin{s}, nil
}

type stdin struct{ s *Stream }

func (i *stdin) Write(p []byte) (int, error) { return i.s.Write(p) }

func (i *stdin) Close() error {
	err := i.s.CloseWrite()
	return errors.Join(err, i.s.Close())
}

// Stdout opens the output of a container, from now on (attach), or of an
// exec, from its start. With a terminal it carries everything. Read returns
// io.EOF when the process's output has ended.
func (c *Client) Stdout(ctx context.Context, containerID, execID string) (io.ReadCloser, error) {
	return c.output(ctx, StreamHeader_STDOUT, containerID, execID)
}

// Stderr is Stdout's sister. The host of an exec without a terminal must read
// both, or the process stops when a pipe is full.
func (c *Client) Stderr(ctx context.Context, containerID, execID string) (io.ReadCloser, error) {
	return c.output(ctx, StreamHeader_STDERR, containerID, execID)
}

func (c *Client) output(ctx context.Context, k StreamHeader_Kind, containerID, execID string) (io.ReadCloser, error) {
	s, err := c.open(ctx, &StreamHeader{Kind: k, ContainerId: containerID, ExecId: execID})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// PutTree replaces the content of a TREE volume by the tar in r, atomically as
// far as a `..data` link in it allows. It returns when the guest has it; on
// any error the volume is as it was, or the same call mends it.
func (c *Client) PutTree(ctx context.Context, volume string, r io.Reader) error {
	return c.put(ctx, &StreamHeader{Kind: StreamHeader_TREE, Volume: volume}, r)
}

// Format writes an empty file system onto the DISK of a volume that AddVolume
// found blank: extents, as WriteExtent writes them. It returns when the disk
// has it; on any error the disk is still blank, and the same call mends it.
// ErrFailedPrecondition if the disk is not blank after all.
func (c *Client) Format(ctx context.Context, volume string, extents io.Reader) error {
	return c.put(ctx, &StreamHeader{Kind: StreamHeader_FORMAT, Volume: volume}, extents)
}

// put sends a stream to its end and waits for what became of it.
func (c *Client) put(ctx context.Context, h *StreamHeader, r io.Reader) error {
	s, err := c.open(ctx, h)
	if err != nil {
		return err
	}
	defer s.Close()
	defer context.AfterFunc(ctx, func() { s.SetDeadline(time.Unix(1, 0)) })()
	sent := &sender{s: s}
	_, err = io.CopyBuffer(sent, struct{ io.Reader }{r}, make([]byte, MaxChunk))
	if err == nil {
		err = s.CloseWrite()
	}
	if err == nil || sent.failed {
		// The guest may have refused in the middle: its reason is better.
		if rerr := s.reply(); rerr != nil || err == nil {
			err = rerr
		}
	}
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("send volume %s: %w", h.Volume, err)
	}
	return nil
}

// A sender remembers whether it was writing that failed.
type sender struct {
	s      *Stream
	failed bool
}

func (w *sender) Write(p []byte) (int, error) {
	n, err := w.s.Write(p)
	w.failed = w.failed || err != nil
	return n, err
}

// CopyOut returns the last limit bytes (at most MaxCopyOut) of a file, named by
// its path inside the container. ErrNotFound if there is no such regular file.
func (c *Client) CopyOut(ctx context.Context, containerID, path string, limit int64) ([]byte, error) {
	if limit <= 0 || limit > MaxCopyOut {
		return nil, fmt.Errorf("copy %s out of container %s: limit %d is not in 1…%d: %w", path, containerID, limit, MaxCopyOut, errdefs.ErrInvalidArgument)
	}
	s, err := c.open(ctx, &StreamHeader{Kind: StreamHeader_COPY_OUT, ContainerId: containerID, Path: path, Limit: limit})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	defer context.AfterFunc(ctx, func() { s.SetDeadline(time.Unix(1, 0)) })()
	b, err := io.ReadAll(io.LimitReader(s, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("the guest sent more than %d bytes: %w", limit, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, fmt.Errorf("copy %s out of container %s: %w", path, containerID, err)
	}
	return b, nil
}

// PortForward connects to a TCP port of the guest's loopback, 127.0.0.1 and
// then ::1. The connection is a *Stream and so has CloseWrite.
func (c *Client) PortForward(ctx context.Context, port uint16) (net.Conn, error) {
	s, err := c.open(ctx, &StreamHeader{Kind: StreamHeader_PORT_FORWARD, Port: uint32(port)})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Logs follows a container's log journal from a record on (the first is 1; 0
// means the oldest kept). It ends without an error behind the record with eof
// set. Records that were acknowledged are gone.
func (c *Client) Logs(ctx context.Context, containerID string, from uint64) iter.Seq2[*LogRecord, error] {
	return follow[LogRecord](ctx, c, &StreamHeader{Kind: StreamHeader_LOGS, ContainerId: containerID, Offset: from})
}

// Exits follows the exit journal of the whole VM from a record on. It ends
// only with ctx or the session.
func (c *Client) Exits(ctx context.Context, from uint64) iter.Seq2[*ExitRecord, error] {
	return follow[ExitRecord](ctx, c, &StreamHeader{Kind: StreamHeader_EXITS, Offset: from})
}
