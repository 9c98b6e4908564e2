package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"

	"k8s.io/cri-streaming/pkg/streaming"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// Version 5 of the WebSocket protocol is version 4 with one more message from
// the client: "channel N has ended", which is how stdin ends. Upstream's
// server knows version 4 alone, and newer clients, crictl among them, want 5.
// So the server is shown version 4, and the message is taken out on the way.

const webSocketProtocol = "Sec-Websocket-Protocol"

// An ending tells a runtime's call when its stdin has ended, and after how many
// bytes.
type ending struct {
	ended chan struct{}
	once  sync.Once
	total int64 // of stdin; valid once ended is closed
}

type endingKey struct{}

// speakV5 makes a request for version 5 one for version 4, and returns the
// ending; nil for all other requests.
func speakV5(r *http.Request) (*http.Request, *ending) {
	if !wsstream.IsWebSocketRequest(r) {
		return r, nil
	}
	for _, p := range strings.Split(r.Header.Get(webSocketProtocol), ",") {
		switch strings.TrimSpace(p) {
		case remotecommand.StreamProtocolV5Name:
			e := &ending{ended: make(chan struct{})}
			r = r.Clone(context.WithValue(r.Context(), endingKey{}, e))
			r.Header.Set(webSocketProtocol, remotecommand.StreamProtocolV4Name)
			return r, e
		case remotecommand.StreamProtocolV4Name:
			return r, nil
		}
	}
	return r, nil
}

// A v5Conn translates one connection.
type v5Conn struct {
	net.Conn
	ending  *ending
	replied bool
	in      []byte // read and not given on yet
	pass    uint64 // of in and what follows it, to be given on as it is
	stdin   int64
}

// Write puts the version that was asked for into the answer, which is the
// first that is written.
func (c *v5Conn) Write(p []byte) (int, error) {
	if c.replied {
		return c.Conn.Write(p)
	}
	c.replied = true
	if _, err := c.Conn.Write(bytes.Replace(p, []byte(remotecommand.StreamProtocolV4Name), []byte(remotecommand.StreamProtocolV5Name), 1)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Read returns no more than one frame at a time: when the next is asked for,
// the one before has been dealt with.
func (c *v5Conn) Read(p []byte) (int, error) {
	for c.pass == 0 {
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	if err := c.fill(1); err != nil {
		return 0, err
	}
	n := copy(p[:min(uint64(len(p)), c.pass)], c.in)
	c.in, c.pass = c.in[n:], c.pass-uint64(n)
	return n, nil
}

// fill sees to it that in has n bytes.
func (c *v5Conn) fill(n int) error {
	for len(c.in) < n {
		buf := make([]byte, 32<<10)
		got, err := c.Conn.Read(buf)
		c.in = append(c.in, buf[:got]...)
		if err != nil && len(c.in) < n {
			return err
		}
	}
	return nil
}

// next looks at the head of a frame (RFC 6455, 5.2): it is given on, or is the
// end of a channel and dropped.
func (c *v5Conn) next() error {
	if err := c.fill(2); err != nil {
		return err
	}
	head, size := 2, uint64(c.in[1]&0x7f)
	switch size {
	case 126:
		head = 4
	case 127:
		head = 10
	}
	masked := c.in[1]&0x80 != 0
	if masked {
		head += 4
	}
	if err := c.fill(head); err != nil {
		return err
	}
	switch size {
	case 126:
		size = uint64(binary.BigEndian.Uint16(c.in[2:]))
	case 127:
		size = binary.BigEndian.Uint64(c.in[2:]) & (1<<63 - 1)
	}
	c.pass = uint64(head) + size
	const text, binaryData = 1, 2
	if kind := c.in[0] & 0x0f; (kind != text && kind != binaryData) || size == 0 {
		return nil
	}
	if err := c.fill(head + min(int(size), 2)); err != nil {
		return err
	}
	payload := make([]byte, min(size, 2))
	for i := range payload {
		if payload[i] = c.in[head+i]; masked {
			payload[i] ^= c.in[head-4+i]
		}
	}
	switch {
	case payload[0] == remotecommand.StreamClose && size == 2:
		c.in, c.pass = c.in[c.pass:], 0
		if payload[1] == remotecommand.StreamStdIn {
			c.ending.once.Do(func() { c.ending.total = c.stdin; close(c.ending.ended) })
		}
	case payload[0] == remotecommand.StreamStdIn:
		c.stdin += int64(size) - 1
	}
	return nil
}

// v5Runtime ends stdin where the client has said so.
type v5Runtime struct{ streaming.Runtime }

func (r v5Runtime) Exec(ctx context.Context, id string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return r.Runtime.Exec(ctx, id, cmd, untilEnding(ctx, in), out, errOut, tty, resize)
}

func (r v5Runtime) Attach(ctx context.Context, id string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	return r.Runtime.Attach(ctx, id, untilEnding(ctx, in), out, errOut, tty, resize)
}

// untilEnding returns in, which ends when all that was sent before the
// client's end of it has been read.
func untilEnding(ctx context.Context, in io.Reader) io.Reader {
	e, ok := ctx.Value(endingKey{}).(*ending)
	if !ok || in == nil {
		return in
	}
	r, w := io.Pipe()
	var mu sync.Mutex
	var delivered int64
	check := func(n int) {
		mu.Lock()
		defer mu.Unlock()
		delivered += int64(n)
		select {
		case <-e.ended:
			if delivered >= e.total {
				w.Close()
			}
		default:
		}
	}
	go func() {
		buf := make([]byte, 32<<10)
		for {
			n, err := in.Read(buf)
			if n > 0 {
				if _, werr := w.Write(buf[:n]); werr != nil {
					return
				}
				check(n)
			}
			if err != nil {
				w.CloseWithError(err)
				return
			}
		}
	}()
	go func() {
		select {
		case <-e.ended:
			check(0)
		case <-ctx.Done():
			r.CloseWithError(ctx.Err())
		}
	}()
	return r
}
