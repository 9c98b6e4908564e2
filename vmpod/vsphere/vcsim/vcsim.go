// Package vcsim is the vCenter that Atoll brings along: govmomi's simulator
// with what a vCenter has and the simulator lacks. Users sign in with
// passwords, permissions and roles are enforced, names are unique where
// vSphere wants them so, reservations fit into their parents', a watch is told
// of every change without polling, and pools, folders, permissions, tags,
// custom attributes and policies survive restarts. Pods of KVM nodes are shown
// as virtual machines (Mirror). First Class Disks and CNS volumes are real
// files, and devices of the virtual machines that they are attached to.
//
// It speaks SOAP (/sdk, /pbm, /vslm/sdk, /vsanHealth) and REST (/api/session, tagging, and what others
// add with HandleFunc) over TLS. What it does not have it refuses; it never
// pretends.
package vcsim

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// stopGrace is how long Close waits for requests that are under way.
const stopGrace = 2 * time.Second

// A Server is a running vCenter. Its methods may be called from several
// goroutines.
type Server struct {
	config Config
	log    *slog.Logger
	users  *Users
	faults *Faults

	svc      *simulator.Service
	vim      *simulator.Registry // /sdk
	methods  map[string]method
	hub      *hub
	sessions sessions
	tokens   tokens
	stopping chan struct{} // closed by Close

	root, authorizationManager, customFieldsManager types.ManagedObjectReference

	mirrors      mirrors
	instanceUUID string

	// mu is held while the inventory is changed, and guards what follows. With
	// it held objects' locks are taken, never the other way round.
	mu        sync.Mutex
	inventory inventory
	built     map[types.ManagedObjectReference]bool // by the configuration
	names     names
	shares    map[types.ManagedObjectReference]*share
	access    access
	fields    []types.CustomFieldDef
	tags      tagSet
	policies  map[string]policyRecord // by id
	disks     map[string]*diskRecord  // by id
	usage     map[string]usage        // by disk
	used      map[string]usage        // by datastore
	scratch   string                  // disks' files of a server that keeps nothing
	store     *store
	restoring bool
	lastID    int
	lastRole  int32
	lastField int32
	mux       *http.ServeMux
	http      *http.Server
	url       url.URL
	ca        []byte
	cert      atomic.Pointer[tls.Certificate]

	served chan error
	close  sync.Once
	closed error
}

// New starts a vCenter; it serves when New returns. A data directory that
// cannot be read is ErrDataLoss, an address in use ErrUnavailable.
func New(c Config) (*Server, error) {
	c, err := c.complete()
	if err != nil {
		return nil, err
	}
	if c.Dir != "" {
		if err := os.MkdirAll(c.Dir, 0o700); err != nil {
			return nil, fmt.Errorf("vcsim: data directory: %w", err)
		}
	}
	s := &Server{
		config: c, log: c.Logger, faults: &Faults{}, mux: http.NewServeMux(), served: make(chan error, 1), stopping: make(chan struct{}),
		hub: &hub{watches: map[*watch]bool{}}, methods: soapMethods(), access: newAccess(),
		names: names{}, built: map[types.ManagedObjectReference]bool{}, shares: map[types.ManagedObjectReference]*share{},
		mirrors: mirrors{places: map[types.ManagedObjectReference]place{}, byUUID: map[string]types.ManagedObjectReference{}, specs: map[types.ManagedObjectReference]Mirror{}},
	}
	if s.store, err = openStore(c.Dir); err != nil {
		return nil, err
	}
	if err := s.start(); err != nil {
		return nil, errors.Join(err, s.store.close())
	}
	return s, nil
}

// start builds and serves.
func (s *Server) start() (err error) {
	c := s.config
	if s.users, err = openUsers(c.Dir, c.Domain, c.AdminPassword, c.PasswordRounds); err != nil {
		return err
	}
	var cert tls.Certificate
	if cert, s.ca, err = c.certificate(time.Now()); err != nil {
		return err
	}
	s.SetCertificate(cert)
	listener, err := listen(c)
	if err != nil {
		return err
	}
	s.url = url.URL{Scheme: "https", Host: listener.Addr().String(), Path: "/sdk"}
	if err := s.build(); err != nil {
		return errors.Join(err, listener.Close())
	}
	s.mux.HandleFunc("POST "+stsPath, s.serveSTS)
	s.serve(listener)
	return nil
}

// Run is New, ready (which may be nil) called with the Server, and Close when
// ctx ends. It returns an error as well if serving fails.
func Run(ctx context.Context, c Config, ready func(*Server)) error {
	s, err := New(c)
	if err != nil {
		return err
	}
	if ready != nil {
		ready(s)
	}
	return s.Wait(ctx)
}

// Wait closes the server when ctx ends. It returns an error as well if serving
// fails.
func (s *Server) Wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return s.Close()
	case err := <-s.served:
		return errors.Join(fmt.Errorf("vcsim: serve: %w", err), s.Close())
	}
}

// URL is where SOAP clients connect, without credentials.
func (s *Server) URL() *url.URL {
	u := s.url
	return &u
}

// CA is the PEM that clients trust to reach the server.
func (s *Server) CA() []byte { return s.ca }

// Thumbprint is the SHA-256 of the server's certificate, as vSphere writes it.
func (s *Server) Thumbprint() string { return thumbprint(s.cert.Load().Certificate[0]) }

// SetCertificate is what connections from now on are shown, by the same
// authority.
func (s *Server) SetCertificate(cert tls.Certificate) { s.cert.Store(&cert) }

// Users are those of the SSO domain.
func (s *Server) Users() *Users { return s.users }

// Faults makes it misbehave, for tests.
func (s *Server) Faults() *Faults { return s.faults }

// HandleFunc serves further paths, in net/http's pattern syntax; a pattern may
// be longer than one of the server's own, not the same. The handler is called
// for anyone who connects: it asks Caller who that is. It may be called while
// the server runs.
func (s *Server) HandleFunc(pattern string, handler http.HandlerFunc) {
	s.mux.HandleFunc(pattern, handler)
}

// Close stops serving: watches that are open are cut off. It is idempotent.
func (s *Server) Close() error {
	s.close.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), stopGrace)
		defer cancel()
		s.http.SetKeepAlivesEnabled(false)
		close(s.stopping)
		if err := s.http.Shutdown(ctx); err != nil {
			// What is still under way is cut off.
			err = s.http.Close()
			if err != nil {
				s.closed = fmt.Errorf("vcsim: close: %w", err)
			}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.closed = errors.Join(s.closed, s.store.close())
		if s.scratch != "" {
			s.closed = errors.Join(s.closed, os.RemoveAll(s.scratch))
		}
	})
	return s.closed
}

func listen(c Config) (net.Listener, error) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(c.Listen))
	if err != nil {
		return nil, fmt.Errorf("vcsim: listen on %s: %w", c.Listen, err)
	}
	return l, nil
}

// serve starts the HTTP server. Requests may take long (a watch); their
// headers may not.
func (s *Server) serve(l net.Listener) {
	s.http = &http.Server{
		Handler:           s.guard(s.mux),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       5 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.cert.Load(), nil },
			MinVersion:     tls.VersionTLS12, NextProtos: []string{"http/1.1"},
		},
	}
	go func() {
		err := s.http.ServeTLS(l, "", "")
		if !errors.Is(err, http.ErrServerClosed) {
			s.served <- err
		}
	}()
}
