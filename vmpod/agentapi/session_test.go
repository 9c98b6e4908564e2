package agentapi

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// fakeGuest answers just enough of the contract to judge the session.
type fakeGuest struct {
	AgentService
	mu    sync.Mutex
	trees [][]byte
	over  chan struct{} // a WaitProcess was still there when its session ended
}

func (g *fakeGuest) Hello(ctx context.Context, r *HelloRequest) (*HelloResponse, error) {
	return &HelloResponse{Version: "test " + r.HostVersion}, nil
}

func (g *fakeGuest) AddVolume(ctx context.Context, r *AddVolumeRequest) (*AddVolumeResponse, error) {
	return nil, fmt.Errorf("volume %s: no room: %w", r.Id, errdefs.ErrResourceExhausted)
}

func (g *fakeGuest) WaitProcess(ctx context.Context, r *WaitProcessRequest) (*WaitProcessResponse, error) {
	<-ctx.Done()
	if g.over != nil {
		close(g.over)
	}
	return nil, ctx.Err()
}

func (g *fakeGuest) ServeStream(ctx context.Context, h *StreamHeader, s *Stream) error {
	switch h.Kind {
	case StreamHeader_PORT_FORWARD, StreamHeader_STDOUT:
		if h.Port == 1 {
			return fmt.Errorf("port 1: connection refused: %w", errdefs.ErrUnavailable)
		}
		s.Accept()
		n, err := io.Copy(s, s)
		if err != nil {
			return err
		}
		fmt.Fprintf(s, "%d bytes", n)
		return s.CloseWrite()
	case StreamHeader_TREE:
		s.Accept()
		b, err := io.ReadAll(s)
		if err != nil {
			return err
		}
		g.mu.Lock()
		g.trees = append(g.trees, b)
		g.mu.Unlock()
		return s.Finish(nil)
	case StreamHeader_COPY_OUT:
		s.Accept()
		s.Write(bytes.Repeat([]byte("x"), int(h.Limit)))
		return s.CloseWrite()
	case StreamHeader_LOGS:
		s.Accept()
		for i := h.Offset; i < h.Offset+100; i++ {
			if err := s.Send(&LogRecord{Offset: i, Line: []byte("line")}); err != nil {
				return err
			}
		}
		return s.Flush()
	}
	return fmt.Errorf("%s: %w", h.Kind, errdefs.ErrNotImplemented)
}

// chardev stands for the virtio port and QEMU's socket: the guest's end stays,
// hosts come and go, one at a time, and what one left unread or half sent
// reaches the next.
type chardev struct {
	guest net.Conn // the guest's end
	path  string
	l     net.Listener
}

func newChardev(t *testing.T) *chardev {
	t.Helper()
	guest, port := net.Pipe()
	c := &chardev{guest: guest, path: filepath.Join(t.TempDir(), "agent.sock")}
	var err error
	if c.l, err = net.Listen("unix", c.path); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var host net.Conn
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := port.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			h := host
			mu.Unlock()
			if h != nil {
				h.Write(b[:n]) // without a host it is lost
			}
		}
	}()
	go func() {
		for {
			h, err := c.l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			host = h
			mu.Unlock()
			io.Copy(port, h)
			mu.Lock()
			host = nil
			mu.Unlock()
			h.Close()
		}
	}()
	t.Cleanup(func() { c.l.Close(); port.Close(); guest.Close() })
	return c
}

func (c *chardev) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", c.path)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func serveOn(t *testing.T, rw io.ReadWriter) *fakeGuest {
	g := &fakeGuest{}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go Serve(ctx, rw, g, t.Logf)
	return g
}

func attach(t *testing.T, conn net.Conn) *Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := Attach(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func hello(t *testing.T, c *Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	r, err := c.Hello(ctx, &HelloRequest{HostVersion: "1"})
	if err != nil || r.Version != "test 1" {
		t.Fatalf("hello: %v, %v", r, err)
	}
}

func TestSession(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	d := newChardev(t)
	g := serveOn(t, d.guest)
	c := attach(t, d.dial(t))
	hello(t, c)

	if _, err := c.AddVolume(ctx, &AddVolumeRequest{Id: "v"}); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "volume v: no room") {
		t.Errorf("an error of the guest came as %v", err)
	}

	conn, err := c.PortForward(ctx, 80)
	if err != nil {
		t.Fatal(err)
	}
	big := bytes.Repeat([]byte(prefix+"0123456789"), 40_000) // over the windows, full of escapes
	go func() {
		conn.Write(big)
		conn.(*Stream).CloseWrite()
	}()
	got, err := io.ReadAll(conn)
	if want := append(bytes.Clone(big), fmt.Sprintf("%d bytes", len(big))...); err != nil || !bytes.Equal(got, want) {
		t.Errorf("half-close: %d bytes back, want %d, err %v", len(got), len(want), err)
	}
	conn.Close()
	if _, err := c.PortForward(ctx, 1); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "refused") {
		t.Errorf("refused port: %v", err)
	}

	if err := c.PutTree(ctx, "v", bytes.NewReader(big)); err != nil {
		t.Error(err)
	}
	if err := c.PutTree(ctx, "v", io.MultiReader(strings.NewReader("half"), &failing{})); err == nil || !strings.Contains(err.Error(), "disk on fire") {
		t.Errorf("a failing source gave %v", err)
	}
	g.mu.Lock()
	if len(g.trees) != 1 || !bytes.Equal(g.trees[0], big) {
		t.Errorf("the guest took %d trees", len(g.trees))
	}
	g.mu.Unlock()

	if b, err := c.CopyOut(ctx, "c", "/x", 5000); err != nil || len(b) != 5000 {
		t.Errorf("copy out: %d bytes, %v", len(b), err)
	}
	n := uint64(0)
	for rec, err := range c.Logs(ctx, "c", 1) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; rec.Offset != n {
			t.Fatalf("record %d has offset %d", n, rec.Offset)
		}
	}
	if n != 100 {
		t.Errorf("%d records", n)
	}
	for range c.Exits(ctx, 0) {
		break
	}
	if _, err := c.Stdin(ctx, "c", ""); !errdefs.IsNotImplemented(err) {
		t.Errorf("unserved stream: %v", err)
	}
}

type failing struct{}

func (*failing) Read([]byte) (int, error) { return 0, errors.New("disk on fire") }

func TestCallEndsWithItsContext(t *testing.T) {
	d := newChardev(t)
	serveOn(t, d.guest)
	c := attach(t, d.dial(t))
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.WaitProcess(ctx, &WaitProcessRequest{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	hello(t, c)
}

// TestReattach breaks sessions in every way a host can die, each time on the
// same guest channel.
func TestReattach(t *testing.T) {
	d := newChardev(t)
	serveOn(t, d.guest)
	stale := appendMarker(nil, kindAttach, newSessionID())
	for name, leave := range map[string]func(net.Conn){
		"in silence":      func(net.Conn) {},
		"garbage":         func(c net.Conn) { c.Write([]byte("GET / HTTP/1.1\r\n\r\n")) },
		"half a marker":   func(c net.Conn) { c.Write(stale[:20]) },
		"a whole marker":  func(c net.Conn) { c.Write(stale) },
		"marker and junk": func(c net.Conn) { c.Write(append(bytes.Clone(stale), "\x00\x00\x00\x01garbage"...)) },
		"half a frame":    func(c net.Conn) { c.Write(append(bytes.Clone(stale), 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 9)) },
	} {
		t.Run(name, func(t *testing.T) {
			conn := d.dial(t)
			leave(conn)
			conn.Close()
			conn = d.dial(t)
			c := attach(t, conn)
			hello(t, c)
			// Die in the middle of a call and of a stream.
			s, err := c.Stdout(context.Background(), "c", "")
			if err != nil {
				t.Fatal(err)
			}
			called := make(chan error)
			go func() {
				_, err := c.WaitProcess(context.Background(), &WaitProcessRequest{})
				called <- err
			}()
			conn.Close()
			if err := <-called; !errdefs.IsUnavailable(err) {
				t.Errorf("the pending call ended with %v", err)
			}
			if _, err := io.ReadAll(s); !errdefs.IsUnavailable(err) {
				t.Errorf("the open stream ended with %v", err)
			}
			<-c.Done()
			if c.Err() == nil {
				t.Error("no reason is given")
			}
		})
	}
	hello(t, attach(t, d.dial(t)))
}

// TestGuestIsLate attaches before the guest reads, as at boot.
// TestEnd looks at the guest after a session: one that was closed waits there
// for the next, one that was ended is over.
func TestEnd(t *testing.T) {
	dev := newChardev(t)
	g := serveOn(t, dev.guest)
	g.over = make(chan struct{})
	c := attach(t, dev.dial(t))
	hello(t, c)
	waiting, cancel := context.WithCancel(t.Context())
	defer cancel()
	go c.WaitProcess(waiting, &WaitProcessRequest{})
	for c.mux.NumStreams() == 0 {
		time.Sleep(time.Millisecond)
	}
	hello(t, c) // behind the call that waits
	if err := c.End(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-g.over:
	case <-time.After(time.Minute):
		t.Fatal("the guest still serves a session that was ended")
	}
	hello(t, attach(t, dev.dial(t)))
}

func TestGuestIsLate(t *testing.T) {
	d := newChardev(t)
	time.AfterFunc(500*time.Millisecond, func() { serveOn(t, d.guest) })
	hello(t, attach(t, d.dial(t)))
}

func TestAttachHonoursContext(t *testing.T) {
	d := newChardev(t) // nobody serves
	for name, mk := range map[string]func() (context.Context, context.CancelFunc){
		"deadline": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(context.Background(), 50*time.Millisecond)
		},
		"cancel": func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(context.Background())
			time.AfterFunc(50*time.Millisecond, cancel)
			return ctx, cancel
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := mk()
			defer cancel()
			start := time.Now()
			_, err := Attach(ctx, d.dial(t))
			if !errors.Is(err, ctx.Err()) || time.Since(start) > 5*time.Second {
				t.Errorf("after %v: %v", time.Since(start), err)
			}
		})
	}
}

// TestHostileGuest shows the host every kind of nonsense; each ends the
// session with an error and nothing else.
func TestHostileGuest(t *testing.T) {
	for name, send := range map[string]string{
		"bad version":    "\xff\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00",
		"bad type":       "\x00\x09\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00",
		"a ping":         "\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x07",
		"a 4 GiB frame":  "\x00\x00\x00\x00\x00\x00\x00\x09\xff\xff\xff\xff",
		"over window":    "\x00\x00\x00\x02\x00\x00\x00\x01\x7f\xff\xff\xff",
		"opens a stream": "\x00\x01\x00\x01\x00\x00\x00\x02\x00\x00\x00\x00",
		"huge reply":     "\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x04\xff\xff\xff\xff",
		"bad reply":      "\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x06\x00\x00\x00\x02\x08\xff",
		// accepts the stream, then answers a call that nobody made
		"unasked answer": "\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x04\x00\x00\x00\x00" +
			"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x05\x02\x00",
		"huge answer": "\x00\x00\x00\x02\x00\x00\x00\x01\x00\x00\x00\x04\x00\x00\x00\x00" +
			"\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x0a\x7f\x00\x00\x00\x00\x00\x00\x01\x02\x00",
	} {
		t.Run(name, func(t *testing.T) {
			guest, host := net.Pipe()
			defer guest.Close()
			go func() {
				b := make([]byte, markerLen)
				io.ReadFull(guest, b)
				guest.SetWriteDeadline(time.Now().Add(5 * time.Second))
				id, _ := parseBody(b[len(prefix)+1:])
				guest.Write(appendMarker([]byte("stale"), kindEcho, id))
				io.ReadFull(guest, make([]byte, 24)) // it has opened its stream
				go io.Copy(io.Discard, guest)
				io.WriteString(guest, send)
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			c, err := Attach(ctx, host)
			if err == nil {
				_, err = c.Hello(ctx, &HelloRequest{})
				if err == nil {
					t.Fatal("the host believed it")
				}
				<-c.Done()
			}
			if c != nil {
				err = c.Err()
			}
			if !errors.Is(err, ErrMisbehaved) || ctx.Err() != nil {
				t.Errorf("ended with %v; want ErrMisbehaved", err)
			}
			t.Log(err)
		})
	}
	t.Run("floods before the echo", func(t *testing.T) {
		if testing.Short() {
			t.Skip("64 MiB of garbage")
		}
		guest, host := net.Pipe()
		defer guest.Close()
		go io.Copy(io.Discard, guest)
		go func() {
			zero, _ := os.Open("/dev/zero")
			defer zero.Close()
			io.CopyBuffer(struct{ io.Writer }{guest}, struct{ io.Reader }{zero}, make([]byte, 1<<20))
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if _, err := Attach(ctx, host); err == nil || ctx.Err() != nil {
			t.Errorf("got %v", err)
		}
	})
}

// An error's text crosses the channel whatever is in it: protobuf takes only
// UTF-8, and a cut within a letter is none.
func TestErrorTextIsUTF8(t *testing.T) {
	for _, text := range []string{"x" + strings.Repeat("é", maxErrorText), "\xff", strings.Repeat("é", 10)} {
		if got := clip(text, maxErrorText); !utf8.ValidString(got) || len(got) > maxErrorText+len("…") {
			t.Errorf("clip of %d bytes: %d bytes, valid %v", len(text), len(got), utf8.ValidString(got))
		}
	}
}

// A guest that answers nothing costs the host a session, not memory without
// end; one that answers late costs nothing.
func TestUnansweredCallsAreBounded(t *testing.T) {
	d := newChardev(t)
	serveOn(t, d.guest)
	c := attach(t, d.dial(t))
	call := func(timeout time.Duration) {
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(timeout, cancel)
		if _, err := c.WaitProcess(ctx, &WaitProcessRequest{}); err == nil {
			t.Error("a call that is never answered succeeded")
		}
	}
	var calls sync.WaitGroup
	for range maxAbandoned {
		calls.Go(func() { call(100 * time.Millisecond) })
	}
	calls.Wait()
	hello(t, c)
	call(10 * time.Millisecond)
	select {
	case <-c.Done():
	case <-time.After(time.Minute):
		t.Fatalf("the session goes on with %d calls unanswered", c.abandoned.Load())
	}
}
