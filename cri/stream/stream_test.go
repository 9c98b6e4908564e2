package stream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gorilla "github.com/gorilla/websocket"
	"golang.org/x/net/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	utilexec "k8s.io/utils/exec"
)

// limit bounds every wait; nothing here takes long.
const limit = 30 * time.Second

// A fakeRuntime's commands: "cat" copies its input, "listen" says hello and
// waits for its client to go, "exit" ends with 7, "size" prints the next
// terminal size.
type fakeRuntime struct {
	left chan error // why a "listen" ended
}

func (r *fakeRuntime) Exec(ctx context.Context, _ string, cmd []string, in io.Reader, out, _ io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	switch cmd[0] {
	case "cat":
		_, err := io.Copy(out, in)
		return err
	case "listen":
		io.WriteString(out, "hello")
		<-ctx.Done()
		r.left <- ctx.Err()
		return ctx.Err()
	case "exit":
		return utilexec.CodeExitError{Err: errors.New("exit status 7"), Code: 7}
	case "size":
		size := <-resize
		fmt.Fprintf(out, "%dx%d", size.Width, size.Height)
	}
	return nil
}

func (r *fakeRuntime) Attach(ctx context.Context, id string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return r.Exec(ctx, id, []string{"listen"}, in, out, errOut, tty, resize)
}

// PortForward answers with the port and then copies.
func (r *fakeRuntime) PortForward(_ context.Context, _ string, port int32, s io.ReadWriteCloser) error {
	fmt.Fprintf(s, "%d:", port)
	_, err := io.Copy(s, s)
	return err
}

func start(t *testing.T, o Options) (*Server, *fakeRuntime) {
	t.Helper()
	r := &fakeRuntime{left: make(chan error, 10)}
	o.Addr = "127.0.0.1:0"
	s, err := New(o, r, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, r
}

func (s *Server) url(t *testing.T, cmd string, tty bool) string {
	t.Helper()
	resp, err := s.GetExec(&runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{cmd}, Stdin: true, Stdout: true, Tty: tty})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Url
}

// A client is one exec over one of the two protocols.
type client struct {
	in       io.Writer
	out      io.Reader
	halfShut func() // nil: the protocol cannot
	status   func() string
	resize   func(string)
	leave    func()
}

func overSPDY(t *testing.T, url string, tty bool, roots *tls.Config) *client {
	t.Helper()
	conn := upgrade(t, url, remotecommand.StreamProtocolV4Name, roots)
	streams := map[string]httpstream.Stream{}
	kinds := []string{remotecommand.StreamTypeError, remotecommand.StreamTypeStdin, remotecommand.StreamTypeStdout}
	if tty {
		kinds = append(kinds, remotecommand.StreamTypeResize)
	}
	for _, kind := range kinds {
		s, err := conn.CreateStream(http.Header{remotecommand.StreamType: {kind}})
		if err != nil {
			t.Fatal(err)
		}
		streams[kind] = s
	}
	return &client{
		in: streams[remotecommand.StreamTypeStdin], out: streams[remotecommand.StreamTypeStdout],
		halfShut: func() { streams[remotecommand.StreamTypeStdin].Close() },
		status: func() string {
			b, _ := io.ReadAll(streams[remotecommand.StreamTypeError])
			return string(b)
		},
		resize: func(json string) { io.WriteString(streams[remotecommand.StreamTypeResize], json) },
		leave:  func() { conn.Close() },
	}
}

func upgrade(t *testing.T, url, protocol string, roots *tls.Config) httpstream.Connection {
	t.Helper()
	rt, err := spdy.NewRoundTripper(roots)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// overWebSocket: the first byte of each message is its channel's number.
func overWebSocket(t *testing.T, url, version string, roots *tls.Config) *client {
	t.Helper()
	config, err := websocket.NewConfig(strings.Replace(url, "http", "ws", 1), "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol, config.TlsConfig = []string{version}, roots
	ws, err := config.DialContext(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	ws.PayloadType = websocket.BinaryFrame
	out, w := io.Pipe()
	ended := make(chan string, 1)
	go func() {
		defer w.Close()
		for {
			var m []byte
			if err := websocket.Message.Receive(ws, &m); err != nil || len(m) == 0 {
				ended <- fmt.Sprint(err)
				return
			}
			switch {
			case len(m) == 1: // says that the connection stands; a pipe waits for a reader of nothing
			case m[0] == remotecommand.StreamStdOut:
				w.Write(m[1:])
			case m[0] == remotecommand.StreamErr:
				ended <- string(m[1:])
				return
			}
		}
	}()
	send := func(channel byte, p []byte) { ws.Write(append([]byte{channel}, p...)) }
	c := &client{
		in:     writerFunc(func(p []byte) (int, error) { send(remotecommand.StreamStdIn, p); return len(p), nil }),
		out:    out,
		status: func() string { return <-ended },
		resize: func(json string) { send(remotecommand.StreamResize, []byte(json)) },
		leave:  func() { ws.Close() },
	}
	if version == remotecommand.StreamProtocolV5Name {
		c.halfShut = func() { send(remotecommand.StreamClose, []byte{remotecommand.StreamStdIn}) }
	}
	return c
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// protocols runs a test over both.
func protocols(t *testing.T, test func(t *testing.T, dial func(t *testing.T, url string, tty bool) *client)) {
	t.Run("SPDY", func(t *testing.T) {
		test(t, func(t *testing.T, url string, tty bool) *client { return overSPDY(t, url, tty, nil) })
	})
	for _, version := range []string{remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name} {
		t.Run("WebSocket "+version, func(t *testing.T) {
			test(t, func(t *testing.T, url string, _ bool) *client { return overWebSocket(t, url, version, nil) })
		})
	}
}

func (c *client) expect(t *testing.T, want string) {
	t.Helper()
	got := make([]byte, len(want))
	read := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(c.out, got)
		read <- err
	}()
	select {
	case err := <-read:
		if err != nil || string(got) != want {
			t.Fatalf("read %q (%v), want %q", got, err, want)
		}
	case <-time.After(limit):
		t.Fatalf("%q did not come", want)
	}
}

func TestExec(t *testing.T) {
	s, _ := start(t, Options{})
	protocols(t, func(t *testing.T, dial func(*testing.T, string, bool) *client) {
		c := dial(t, s.url(t, "cat", false), false)
		io.WriteString(c.in, "there and back")
		c.expect(t, "there and back")
		if c.halfShut != nil {
			last := strings.Repeat("all of it ", 20_000)
			go func() {
				for part := range slices.Chunk([]byte(last), 70_000) {
					c.in.Write(part)
				}
				c.halfShut()
			}()
			if rest, err := io.ReadAll(c.out); err != nil || string(rest) != last {
				t.Errorf("up to the end of stdin: %d bytes, want %d; %v", len(rest), len(last), err)
			}
			if got := c.status(); !strings.Contains(got, `"Success"`) {
				t.Errorf("status %s", got)
			}
		}
		if got := dial(t, s.url(t, "exit", false), false).status(); !strings.Contains(got, remotecommand.NonZeroExitCodeReason) || !strings.Contains(got, `"message":"7"`) {
			t.Errorf("status %s", got)
		}
		c = dial(t, s.url(t, "size", true), true)
		c.resize(`{"Width":132,"Height":43}` + "\n")
		c.expect(t, "132x43")
	})
}

// A client that only listens, and goes.
func TestClientLeaves(t *testing.T) {
	s, r := start(t, Options{})
	protocols(t, func(t *testing.T, dial func(*testing.T, string, bool) *client) {
		c := dial(t, s.url(t, "listen", false), false)
		c.expect(t, "hello")
		select {
		case <-r.left:
			t.Fatal("it was taken for gone")
		case <-time.After(100 * time.Millisecond):
		}
		c.leave()
		select {
		case <-r.left:
		case <-time.After(limit):
			t.Fatal("nobody noticed")
		}
	})
}

func TestCloseEndsStreams(t *testing.T) {
	s, r := start(t, Options{})
	c := overSPDY(t, s.url(t, "listen", false), false, nil)
	c.expect(t, "hello")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.left:
	case <-time.After(limit):
		t.Fatal("the stream goes on")
	}
}

// Silence ends a stream where it is to, and nowhere else.
func TestIdle(t *testing.T) {
	const silence = 700 * time.Millisecond
	patient, _ := start(t, Options{})
	strict, r := start(t, Options{IdleTimeout: silence / 3})
	protocols(t, func(t *testing.T, dial func(*testing.T, string, bool) *client) {
		c := dial(t, patient.url(t, "cat", false), false)
		io.WriteString(c.in, "before")
		c.expect(t, "before")
		time.Sleep(silence)
		io.WriteString(c.in, "after")
		c.expect(t, "after")

		c = dial(t, strict.url(t, "listen", false), false)
		c.expect(t, "hello")
		select {
		case <-r.left:
		case <-time.After(limit):
			t.Fatal("a silent stream goes on")
		}
	})
	if o := (Options{}); o.IdleTimeout != 0 || forever < 4*time.Hour {
		t.Errorf("streams end by default after %v", forever)
	}
}

func TestTLS(t *testing.T) {
	web := httptest.NewTLSServer(nil) // for its certificate
	defer web.Close()
	roots := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "example.com"}
	roots.RootCAs.AddCert(web.Certificate())
	s, _ := start(t, Options{TLS: &tls.Config{Certificates: web.TLS.Certificates}})
	url := s.url(t, "cat", false)
	if !strings.HasPrefix(url, "https://127.0.0.1:") {
		t.Fatalf("URL %s", url)
	}
	for name, c := range map[string]*client{"SPDY": overSPDY(t, url, false, roots), "WebSocket": overWebSocket(t, s.url(t, "cat", false), remotecommand.StreamProtocolV5Name, roots)} {
		io.WriteString(c.in, name)
		c.expect(t, name)
	}
	if resp, err := http.Get(strings.Replace(s.url(t, "cat", false), "https", "http", 1)); err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("plain HTTP is answered with %s", resp.Status)
		}
	}
}

// A URL is good for one client.
func TestTokens(t *testing.T) {
	s, _ := start(t, Options{})
	url := s.url(t, "cat", false)
	overSPDY(t, url, false, nil)
	for _, u := range []string{url, url[:len(url)-1], strings.Replace(url, "exec", "attach", 1)} {
		resp, err := http.Get(u)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", u, resp.Status)
		}
	}
	if _, err := New(Options{Addr: "0.0.0.0:0"}, &fakeRuntime{}, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("it listens where the network can reach it")
	}
}

func TestPortForward(t *testing.T) {
	forward := func(t *testing.T) string {
		s, _ := start(t, Options{})
		resp, err := s.GetPortForward(&runtimeapi.PortForwardRequest{PodSandboxId: "p", Port: []int32{80}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Url
	}
	t.Run("SPDY", func(t *testing.T) {
		forwardMany(t, upgrade(t, forward(t), portforward.ProtocolV1Name, nil))
	})
	t.Run("tunnel", func(t *testing.T) {
		url := strings.Replace(forward(t), "http", "ws", 1)
		dialer := gorilla.Dialer{Subprotocols: []string{tunnelPrefix + portforward.ProtocolV1Name}}
		ws, resp, err := dialer.DialContext(t.Context(), url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		conn, err := spdy.NewClientConnection(&tunnelConn{Conn: ws.NetConn(), ws: ws})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		forwardMany(t, conn)
		// Its token worked once; a refusal is plain HTTP.
		_, resp, err = dialer.DialContext(t.Context(), url, nil)
		if err == nil || resp.StatusCode != http.StatusNotFound {
			t.Errorf("the same URL again: %v, %+v", err, resp)
		}
	})
}

// forwardMany makes many connections through one port-forward, at once.
func forwardMany(t *testing.T, conn httpstream.Connection) {
	var wg sync.WaitGroup
	for i := range 50 {
		open := func(kind string) httpstream.Stream {
			s, err := conn.CreateStream(http.Header{
				portforward.StreamType: {kind}, portforward.PortHeader: {fmt.Sprint(1000 + i)}, portforward.PortForwardRequestIDHeader: {fmt.Sprint(i)},
			})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		failure, data := open(portforward.StreamTypeError), open(portforward.StreamTypeData)
		failure.Close()
		wg.Go(func() {
			text := strings.Repeat(fmt.Sprint(i), 10_000)
			go func() {
				io.WriteString(data, text)
				data.Close()
			}()
			got, err := io.ReadAll(data)
			if err != nil || string(got) != fmt.Sprintf("%d:%s", 1000+i, text) {
				t.Errorf("stream %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(limit):
		t.Fatal("not all have ended")
	}
}
