package stream

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// Newer clients, crictl among them, forward ports through a WebSocket whose
// messages are the bytes of a SPDY connection (KEP-4006). Upstream's server
// knows only plain SPDY there, and an older protocol with a channel a port.
// So the server is shown the request for SPDY, and what it then reads and
// writes goes through the WebSocket.

// tunnelPrefix comes before the name of the protocol that is spoken inside.
const tunnelPrefix = "SPDY/3.1+"

// throughTunnel returns the request and the answer that the server is to see
// for a client that wants a tunnel; all others as they are.
func throughTunnel(w http.ResponseWriter, r *http.Request) (http.ResponseWriter, *http.Request) {
	if !wsstream.IsWebSocketRequest(r) {
		return w, r
	}
	for _, p := range websocket.Subprotocols(r) {
		inner, ok := strings.CutPrefix(p, tunnelPrefix)
		if !ok {
			continue
		}
		plain := r.Clone(r.Context())
		plain.Method = http.MethodPost
		plain.Header.Del(webSocketProtocol)
		plain.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
		plain.Header.Set(httpstream.HeaderProtocolVersion, inner)
		return &tunnelWriter{w, r, p}, plain
	}
	return w, r
}

// A tunnelWriter refuses in plain HTTP, and agrees as a WebSocket does.
type tunnelWriter struct {
	http.ResponseWriter
	request  *http.Request // as the client sent it
	protocol string
}

// WriteHeader leaves the agreement to Hijack, which comes next.
func (t *tunnelWriter) WriteHeader(code int) {
	if code != http.StatusSwitchingProtocols {
		t.ResponseWriter.WriteHeader(code)
	}
}

// Hijack implements http.Hijacker.
func (t *tunnelWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	upgrader := websocket.Upgrader{Subprotocols: []string{t.protocol}}
	ws, err := upgrader.Upgrade(t.ResponseWriter, t.request, nil)
	if err != nil {
		return nil, nil, err
	}
	conn := &tunnelConn{Conn: ws.NetConn(), ws: ws}
	return conn, bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn)), nil
}

// A tunnelConn carries a stream of bytes in a WebSocket's messages, whose
// bounds mean nothing.
type tunnelConn struct {
	net.Conn
	ws      *websocket.Conn
	message io.Reader // what is left of one; nil: none

	mu sync.Mutex // a WebSocket has one writer at a time
}

func (c *tunnelConn) Read(p []byte) (int, error) {
	for {
		if c.message == nil {
			kind, message, err := c.ws.NextReader()
			if websocket.IsCloseError(err, websocket.CloseNormalClosure, websocket.CloseGoingAway) {
				return 0, io.EOF
			}
			if err != nil {
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errNotBinary
			}
			c.message = message
		}
		n, err := c.message.Read(p)
		if errors.Is(err, io.EOF) {
			c.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

var errNotBinary = errors.New("a tunnel's messages are binary")

func (c *tunnelConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ws.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// goodbyeLimit bounds the wait for a write under way to a client that may have
// stopped reading.
const goodbyeLimit = time.Second

// Close is a goodbye without waiting for the other side's.
func (c *tunnelConn) Close() error {
	goodbye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	_ = c.ws.WriteControl(websocket.CloseMessage, goodbye, time.Now().Add(goodbyeLimit))
	return c.Conn.Close()
}
