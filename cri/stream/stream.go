// Package stream serves exec, attach and port-forward for package cri: an
// HTTP server on loopback, over SPDY and WebSocket, whose URLs carry a token
// that works once and for a minute.
package stream

import (
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

// idle is how long a stream may be silent: as good as for ever. Streams must
// not end because nobody types.
const idle = 365 * 24 * time.Hour

// A Server is a running streaming server.
type Server struct {
	inner    streaming.Server
	http     *http.Server
	listener net.Listener
	done     chan struct{}
}

// New listens on addr, a loopback address ("127.0.0.1:0"), and serves.
func New(addr string, runtime streaming.Runtime, log *slog.Logger) (*Server, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("stream address %q: %w: %w", addr, err, errdefs.ErrInvalidArgument)
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("stream address %q: want a loopback address: who has a token is let in: %w", addr, errdefs.ErrInvalidArgument)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	config := streaming.DefaultConfig
	config.StreamIdleTimeout = idle
	config.Addr = l.Addr().String()
	config.BaseURL = &url.URL{Scheme: "http", Host: config.Addr}
	inner, err := streaming.NewServer(config, runtime)
	if err != nil {
		l.Close()
		return nil, err
	}
	s := &Server{inner: inner, listener: l, done: make(chan struct{})}
	s.http = &http.Server{Handler: inner, ReadHeaderTimeout: 30 * time.Second, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
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

// Close stops listening. Streams under way end with their sandboxes' sessions.
func (s *Server) Close() error {
	err := s.http.Close()
	<-s.done
	return err
}
