// Package stream serves exec, attach and port-forward for package cri: an
// HTTP server on loopback, over SPDY and WebSocket, whose URLs carry a token
// that works once and for a minute.
package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"
)

// forever is how long a stream may be silent unless an Options bounds it.
// Streams must not end because nobody types.
const forever = 365 * 24 * time.Hour

// Options of a Server.
type Options struct {
	// Addr is a loopback address, such as 127.0.0.1:0. Required.
	Addr string
	// IdleTimeout ends a stream over which nothing went for so long; 0: none.
	IdleTimeout time.Duration
	// TLS makes it an HTTPS server. Nil: plain HTTP, on loopback alone.
	TLS *tls.Config
}

// A Server is a running streaming server.
type Server struct {
	inner    streaming.Server
	http     *http.Server
	listener net.Listener
	cancel   context.CancelFunc // ends the streams under way
	done     chan struct{}
}

// New listens and serves. The context of a runtime's call ends when its client
// has gone, or with the server.
func New(o Options, runtime streaming.Runtime, log *slog.Logger) (*Server, error) {
	host, _, err := net.SplitHostPort(o.Addr)
	if err != nil {
		return nil, fmt.Errorf("stream address %q: %w: %w", o.Addr, err, errdefs.ErrInvalidArgument)
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("stream address %q: want a loopback address: who has a token is let in: %w", o.Addr, errdefs.ErrInvalidArgument)
	}
	l, err := net.Listen("tcp", o.Addr)
	if err != nil {
		return nil, err
	}
	config := streaming.DefaultConfig
	if config.StreamIdleTimeout = o.IdleTimeout; o.IdleTimeout <= 0 {
		config.StreamIdleTimeout = forever
	}
	config.Addr = l.Addr().String()
	config.BaseURL = &url.URL{Scheme: "http", Host: config.Addr}
	if o.TLS != nil {
		config.BaseURL.Scheme = "https"
		t := o.TLS.Clone()
		t.NextProtos = []string{"http/1.1"} // HTTP/2 knows no upgrades
		l = tls.NewListener(l, t)
	}
	inner, err := streaming.NewServer(config, v5Runtime{runtime})
	if err != nil {
		l.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{inner: inner, listener: l, cancel: cancel, done: make(chan struct{})}
	s.http = &http.Server{
		Handler: watchClients(inner), ReadHeaderTimeout: 30 * time.Second,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ErrorLog:    slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the streaming server ended", "err", err)
		}
	}()
	return s, nil
}

// Addr is where the server listens.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// GetExec makes a URL for one exec.
func (s *Server) GetExec(req *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	return s.inner.GetExec(req)
}

// GetAttach makes a URL for one attach.
func (s *Server) GetAttach(req *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	return s.inner.GetAttach(req)
}

// GetPortForward makes a URL for one port-forward.
func (s *Server) GetPortForward(req *runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error) {
	return s.inner.GetPortForward(req)
}

// Close stops listening and ends the streams under way.
func (s *Server) Close() error {
	s.cancel()
	err := s.http.Close()
	<-s.done
	return err
}
