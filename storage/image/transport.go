package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// Timeouts of talking to registries. None bounds a transfer as long as bytes
// arrive.
type Timeouts struct {
	// Connect bounds a TCP connection's set-up; default 15 s. hosts.toml's
	// dial_timeout goes before it.
	Connect time.Duration
	// Header bounds the wait for an answer's first line; default 30 s.
	Header time.Duration
	// Stall bounds the wait for the next bytes of an answer; default 60 s.
	Stall time.Duration
}

func (t Timeouts) withDefaults() Timeouts {
	if t.Connect <= 0 {
		t.Connect = 15 * time.Second
	}
	if t.Header <= 0 {
		t.Header = 30 * time.Second
	}
	if t.Stall <= 0 {
		t.Stall = 60 * time.Second
	}
	return t
}

// A silentError is a registry that lets us wait. It says that it is no
// timeout, or containerd's resolver would try five times over.
type silentError struct{ err error }

func (e *silentError) Error() string   { return e.err.Error() }
func (e *silentError) Unwrap() error   { return e.err }
func (e *silentError) Timeout() bool   { return false }
func (e *silentError) Temporary() bool { return false }

// A transport watches over one client's answers: those that stall, and those
// without an end where only a small document belongs.
type transport struct {
	base     *http.Transport
	timeouts Timeouts
	session  *session
}

// watch puts a transport into client; containerd calls it once or twice for
// each host of hosts.toml.
func watch(client *http.Client, timeouts Timeouts, ses *session) error {
	if _, ok := client.Transport.(*transport); ok {
		return nil
	}
	base, ok := client.Transport.(*http.Transport)
	if !ok {
		return fmt.Errorf("unexpected transport %T", client.Transport)
	}
	if base.ResponseHeaderTimeout != timeouts.Header { // not a clone of one seen
		base.ResponseHeaderTimeout = timeouts.Header
		base.TLSHandshakeTimeout = timeouts.Connect
		base.DialContext = (&net.Dialer{Timeout: timeouts.Connect, KeepAlive: 30 * time.Second}).DialContext
	}
	ses.used(base)
	client.Transport = &transport{base: base, timeouts: timeouts, session: ses}
	return nil
}

type bodyLimitKey struct{}

// withBodyLimit allows answers of n bytes to requests with this context.
func withBodyLimit(ctx context.Context, n int64) context.Context {
	return context.WithValue(ctx, bodyLimitKey{}, n)
}

func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	limit, ok := req.Context().Value(bodyLimitKey{}).(int64)
	if !ok {
		limit = MaxManifest
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	resp, err := t.base.RoundTrip(t.strip(req.WithContext(ctx)))
	if err != nil {
		cancel(nil)
		var timeout net.Error
		if req.Context().Err() == nil && errors.As(err, &timeout) && timeout.Timeout() {
			return nil, &silentError{err}
		}
		return nil, err
	}
	// The caller should see its own request, not our copy.
	resp.Request = req
	resp.Body = &watchedBody{rc: resp.Body, ctx: ctx, cancel: cancel, stall: t.timeouts.Stall, left: limit, limit: limit}
	return resp, nil
}

// strip takes credentials off a request that redirects have led to somebody
// else: net/http keeps them where just the port is another.
func (t *transport) strip(req *http.Request) *http.Request {
	first := req
	for first.Response != nil {
		first = first.Response.Request
	}
	if first.URL.Host != req.URL.Host && !t.session.admits(req.URL.Host) {
		req.Header = req.Header.Clone()
		req.Header.Del("Authorization")
		req.Header.Del("Cookie")
	}
	return req
}

func (t *transport) CloseIdleConnections() { t.base.CloseIdleConnections() }

// A watchedBody ends a body that sends nothing for too long or too much.
type watchedBody struct {
	rc     io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	stall  time.Duration
	left   int64
	limit  int64
	once   sync.Once
	timer  *time.Timer
}

var errStalled = errors.New("no more bytes came")

func (b *watchedBody) Read(p []byte) (int, error) {
	b.once.Do(func() {
		b.timer = time.AfterFunc(time.Hour, func() { b.cancel(errStalled) })
	})
	b.timer.Reset(b.stall)
	n, err := b.rc.Read(p)
	b.timer.Stop()
	if b.left -= int64(n); b.left < 0 {
		return n, fmt.Errorf("an answer of more than %d bytes", b.limit)
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), errStalled) {
		err = &silentError{fmt.Errorf("%w for %v", errStalled, b.stall)}
	} else if errors.Is(err, syscall.ECONNRESET) {
		err = io.ErrUnexpectedEOF // for which containerd's reader goes on from here
	}
	return n, err
}

func (b *watchedBody) Close() error {
	b.once.Do(func() { b.timer = time.NewTimer(0) })
	b.timer.Stop()
	err := b.rc.Close()
	b.cancel(nil)
	return err
}
