package stream

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
)

// watchClients ends the context of a request when its client goes away.
// net/http stops looking as soon as a connection is taken over by SPDY or
// WebSocket, and a client that only listens would be missed with the next
// output, perhaps never.
func watchClients(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		r, v5 := speakV5(r.WithContext(ctx))
		h.ServeHTTP(throughTunnel(&hijacker{w, cancel, v5}, r))
	})
}

// A hijacker hands out connections that tell when reading has failed. Both
// protocols read all the time, as each has frames of its own.
type hijacker struct {
	http.ResponseWriter
	gone func()
	v5   *ending // nil: another protocol
}

var errNoHijack = errors.New("the connection cannot be taken over")

// Hijack implements http.Hijacker.
func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	inner, ok := h.ResponseWriter.(http.Hijacker)
	if !ok {
		return nil, nil, errNoHijack
	}
	conn, rw, err := inner.Hijack()
	if err != nil {
		return nil, nil, err
	}
	// What is buffered has to be read first; the rest comes by way of us.
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	var w net.Conn = &watchedConn{Conn: conn, gone: h.gone}
	r := io.MultiReader(bytes.NewReader(bytes.Clone(early)), w)
	if h.v5 != nil {
		v5 := &v5Conn{Conn: w, ending: h.v5, in: bytes.Clone(early)}
		w, r = v5, v5
	}
	return w, bufio.NewReadWriter(bufio.NewReader(r), bufio.NewWriter(w)), nil
}

// A watchedConn calls gone when nothing more can be read, or will be.
type watchedConn struct {
	net.Conn
	gone func()
}

func (c *watchedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.gone()
	}
	return n, err
}

// Close is also how a protocol answers a client that says goodbye.
func (c *watchedConn) Close() error {
	c.gone()
	return c.Conn.Close()
}
