package login

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/net/netutil"

	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

const (
	// DefaultTokenLifetime is VMware's.
	DefaultTokenLifetime = 10 * time.Hour
	// DefaultFailureTime is how long every refusal takes, or a multiple of it:
	// longer than vCenter takes to look up a user and hash a password.
	DefaultFailureTime = time.Second
	// ReviewerName is the common name of the client certificate by which the
	// API server asks about tokens.
	ReviewerName = "atoll:token-reviewer"

	maxConnections = 512
	maxChecks      = 8 // passwords that vCenter is asked about at a time
	maxBody        = 256 << 10
	upkeepEvery    = 10 * time.Minute
)

// Options are all that a Server must know; all fields are needed unless they
// say otherwise.
type Options struct {
	// Listen is for users, Review for the API server, on loopback.
	Listen, Review netip.AddrPort
	// CertFile and KeyFile are the server's on both; read again when they
	// change. ClientCAFile signed the API server's client certificate, and its
	// serving certificate: users are given it.
	CertFile, KeyFile, ClientCAFile string
	// KeyDir holds the signing keys, RevokedFile the tokens that were given
	// back. Where keys are and the file is not (a restored backup), the keys
	// are thrown away: a token that was given back must not be good again.
	KeyDir, RevokedFile string
	// TokenLifetime, 5 min to 24 h.
	TokenLifetime time.Duration
	// APIServerPort is what users are told, on the host that they asked.
	APIServerPort uint16
	// Users checks passwords; Namespaces lists those that somebody may use.
	Users      Authenticator
	Namespaces func(context.Context, Identity) ([]string, error)
	// Directory is asked whether users are still there; nil: tokens are good
	// until they expire or are given back.
	Directory Directory
	// Log gets a line for each login, logout and refusal.
	Log *slog.Logger
	// FailureTime; 0 is DefaultFailureTime. Now; nil is time.Now.
	FailureTime time.Duration
	Now         func() time.Time
}

// A Server signs users in and answers for their tokens.
type Server struct {
	o       Options
	log     *slog.Logger
	ca      []byte
	keys    *keyring
	tokens  *tokens
	revoked *revocations
	lockout lockout
	present *presence
	checks  chan struct{}

	users, review         *http.Server
	usersAddr, reviewAddr net.Listener
}

// CheckTokenLifetime is ErrInvalidArgument but for 5 min to 24 h.
func CheckTokenLifetime(d time.Duration) error {
	if d < 5*time.Minute || d > 24*time.Hour {
		return fmt.Errorf("token lifetime %s: give 5m to 24h: %w", d, errdefs.ErrInvalidArgument)
	}
	return nil
}

// New opens the keys and both ports; Run serves.
func New(o Options) (*Server, error) {
	if err := CheckTokenLifetime(o.TokenLifetime); err != nil {
		return nil, err
	}
	if o.FailureTime == 0 {
		o.FailureTime = DefaultFailureTime
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	s := &Server{o: o, log: o.Log.With("component", "login"), checks: make(chan struct{}, maxChecks)}
	s.present = &presence{directory: o.Directory, now: o.Now, log: s.log}
	registerMetrics()
	if err := s.openState(); err != nil {
		return nil, err
	}
	s.tokens = &tokens{issuer: "https://" + o.Listen.String(), life: o.TokenLifetime, keys: s.keys}
	var err error
	if s.ca, err = os.ReadFile(o.ClientCAFile); err != nil {
		return nil, fmt.Errorf("login: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(s.ca) {
		return nil, fmt.Errorf("login: %s holds no certificate: %w", o.ClientCAFile, errdefs.ErrInvalidArgument)
	}
	certs := &certificate{certFile: o.CertFile, keyFile: o.KeyFile}
	if _, err := certs.get(nil); err != nil {
		return nil, fmt.Errorf("login: %w", err)
	}
	forUsers := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certs.get}
	forReview := forUsers.Clone()
	forReview.ClientAuth, forReview.ClientCAs = tls.RequireAndVerifyClientCert, pool
	s.users = s.httpServer(s.userRoutes(), forUsers)
	s.review = s.httpServer(s.reviewRoutes(), forReview)
	if s.usersAddr, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(o.Listen)); err != nil {
		return nil, fmt.Errorf("login: %w", err)
	}
	if s.reviewAddr, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(o.Review)); err != nil {
		s.usersAddr.Close()
		return nil, fmt.Errorf("login: %w", err)
	}
	// So that strangers cannot take all descriptors of the control plane.
	s.usersAddr = netutil.LimitListener(s.usersAddr, maxConnections)
	return s, nil
}

func (s *Server) openState() error {
	now := s.o.Now()
	keys, fresh, err := openKeyring(s.o.KeyDir, s.log)
	if err != nil {
		return err
	}
	revoked, missing, err := openRevocations(s.o.RevokedFile, now)
	if err != nil {
		return err
	}
	if missing && !fresh {
		s.log.Warn("the list of revoked tokens is missing: everybody has to sign in again", "file", s.o.RevokedFile)
		if err := keys.discard(); err != nil {
			return err
		}
	}
	s.keys, s.revoked = keys, revoked
	return keys.upkeep(now, s.o.TokenLifetime)
}

func (s *Server) httpServer(h http.Handler, c *tls.Config) *http.Server {
	return &http.Server{
		Handler:           h,
		TLSConfig:         c,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       20 * time.Second,
		WriteTimeout:      2 * time.Minute,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    2 * maxTokenBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// Addr is where users sign in.
func (s *Server) Addr() net.Addr { return s.usersAddr.Addr() }

// Run serves until ctx ends; it may be called once.
func (s *Server) Run(ctx context.Context) error {
	failed := make(chan error, 2)
	serve := func(h *http.Server, l net.Listener) {
		if err := h.ServeTLS(l, "", ""); !errors.Is(err, http.ErrServerClosed) {
			failed <- err
		}
	}
	go serve(s.users, s.usersAddr)
	go serve(s.review, s.reviewAddr)
	defer s.users.Close()
	defer s.review.Close()
	tick := time.NewTicker(upkeepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return fmt.Errorf("login: %w", err)
		case <-tick.C:
			now := s.o.Now()
			if err := errors.Join(s.keys.upkeep(now, s.o.TokenLifetime), s.revoked.upkeep(now)); err != nil {
				s.log.Error("keys and revocations not looked after; tried again later", "in", upkeepEvery, "error", err)
			}
		}
	}
}

func (s *Server) userRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+loginapi.LoginPath, s.handleLogin)
	mux.HandleFunc("GET "+loginapi.WorkloadsPath, s.handleWorkloads)
	mux.HandleFunc("POST "+loginapi.LogoutPath, s.handleLogout)
	mux.HandleFunc("GET "+loginapi.KeysPath, func(w http.ResponseWriter, _ *http.Request) {
		s.answer(w, http.StatusOK, s.keys.published())
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	return mux
}

// handleLogin takes a name and a password.
func (s *Server) handleLogin(w http.ResponseWriter, r *http.Request) {
	began := s.o.Now()
	who, err := s.checkPassword(r)
	if err != nil {
		s.refuse(w, r, began, err)
		return
	}
	who.Listed = s.present.listed(r.Context(), who.User)
	token, session, err := s.tokens.issue(who, s.o.Now())
	if err != nil {
		s.fail(w, r, err)
		return
	}
	tokensTotal.WithLabelValues(tokenIssued).Inc()
	s.log.Info("signed in", "audit", "login", "user", who.User.String(), "groups", len(who.Groups), "address", address(r), "token", session.ID, "expires", session.Expires)
	s.answer(w, http.StatusOK, loginapi.Login{
		Token: token, Expires: session.Expires, User: who.User.String(), Groups: names(who.Groups), Warning: who.Warning,
		APIServerPort: s.o.APIServerPort, CertificateAuthority: string(s.ca),
	})
}

// checkPassword lets vCenter judge, unless there were too many wrong ones.
func (s *Server) checkPassword(r *http.Request) (_ Identity, err error) {
	defer func() { loginsTotal.WithLabelValues(loginResult(err)).Inc() }()
	user, password, ok := r.BasicAuth()
	if !ok || user == "" || password == "" || len(user) > 600 || len(password) > 1024 {
		return Identity{}, errWrong
	}
	ctx := r.Context()
	domain, err := s.o.Users.Domain(ctx)
	if err != nil {
		return Identity{}, err
	}
	// Every way to write a name counts as the same.
	p, err := sso.Parse(user, domain)
	if err != nil {
		return Identity{}, errWrong
	}
	try, err := s.lockout.begin(p.String(), address(r), s.o.Now())
	if err != nil {
		return Identity{}, err
	}
	select {
	case s.checks <- struct{}{}:
		defer func() { <-s.checks }()
	case <-ctx.Done():
		try.unknown()
		return Identity{}, fmt.Errorf("too many users sign in at once: try again: %w", errdefs.ErrUnavailable)
	}
	// Whoever hangs up has tried all the same.
	who, err := s.o.Users.Authenticate(context.WithoutCancel(ctx), user, password)
	switch {
	case err == nil:
		try.right(s.o.Now())
	case !errdefs.IsUnauthorized(err):
		try.unknown()
	}
	return who, err
}

// refuse answers a login that failed. All refusals of one kind look alike and
// take as long.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, began time.Time, err error) {
	took := s.o.Now().Sub(began)
	wait := s.o.FailureTime - took%s.o.FailureTime
	s.log.Warn("login refused", "audit", "login", "user", loggedName(r), "address", address(r), "reason", err)
	select {
	case <-time.After(wait):
	case <-r.Context().Done():
		return
	}
	var locked *waitError
	switch {
	case errors.As(err, &locked):
		w.Header().Set("Retry-After", strconv.Itoa(int(locked.wait.Seconds())+1))
		s.answer(w, http.StatusTooManyRequests, loginapi.Error{Message: locked.Error()})
	case errdefs.IsUnauthorized(err):
		s.answer(w, http.StatusUnauthorized, loginapi.Error{Message: "user name or password is wrong"})
	default:
		// What is wrong with vCenter is for its operator, in the log.
		s.answer(w, http.StatusServiceUnavailable, loginapi.Error{Message: "nobody can sign in now, vCenter cannot be asked: whether the password is right is not known; the supervisor's log has the reason"})
	}
}

// handleWorkloads takes a token, and the name and password of scripts that keep
// none.
func (s *Server) handleWorkloads(w http.ResponseWriter, r *http.Request) {
	var who Identity
	if _, _, basic := r.BasicAuth(); basic {
		began := s.o.Now()
		id, err := s.checkPassword(r)
		if err != nil {
			s.refuse(w, r, began, err)
			return
		}
		who = id
	} else {
		session, err := s.session(r.Context(), bearerOf(r))
		if err != nil {
			s.answer(w, http.StatusUnauthorized, loginapi.Error{Message: sentence(err)})
			return
		}
		who = session.Identity
	}
	list, err := s.o.Namespaces(r.Context(), who)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(r.Host); err == nil {
		host = h
	}
	out := []loginapi.Workload{}
	for _, n := range list {
		out = append(out, loginapi.Workload{Namespace: n, MasterHost: host, APIServerPort: strconv.Itoa(int(s.o.APIServerPort))})
	}
	s.answer(w, http.StatusOK, out)
}

func (s *Server) handleLogout(w http.ResponseWriter, r *http.Request) {
	session, err := s.session(r.Context(), bearerOf(r))
	if err != nil {
		s.answer(w, http.StatusUnauthorized, loginapi.Error{Message: sentence(err)})
		return
	}
	if err := s.revoked.add(session); err != nil {
		s.fail(w, r, err)
		return
	}
	tokensTotal.WithLabelValues(tokenRevoked).Inc()
	s.log.Info("signed out", "audit", "logout", "user", session.Identity.User.String(), "address", address(r), "token", session.ID)
	w.WriteHeader(http.StatusNoContent)
}

// session returns what a token says that is good, was not given back, and whose
// user vCenter still has, as far as that is known.
func (s *Server) session(ctx context.Context, token string) (Session, error) {
	session, err := s.tokens.verify(token, s.o.Now())
	if err != nil {
		return Session{}, err
	}
	if s.revoked.has(session.ID) {
		return Session{}, fmt.Errorf("the token was given back by a logout: sign in again with `kubectl atoll login`: %w", errdefs.ErrUnauthenticated)
	}
	if s.present.gone(ctx, session) {
		return Session{}, s.dismiss(session)
	}
	return session, nil
}

// dismiss revokes a token of somebody who was removed from vCenter.
func (s *Server) dismiss(session Session) error {
	user := session.Identity.User.String()
	if err := s.revoked.add(session); err != nil {
		s.log.Error("a token of a user who was removed is refused, and may be good again after a restart", "user", user, "token", session.ID, "error", err)
	} else {
		tokensTotal.WithLabelValues(tokenRevoked).Inc()
		s.log.Info("token revoked: its user is gone from vCenter", "audit", "revoke", "user", user, "token", session.ID)
	}
	return fmt.Errorf("user %s is not in vCenter any more: %w", user, errdefs.ErrUnauthenticated)
}

// fail answers what is no fault of the client's.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	s.log.Error("request failed", "path", r.URL.Path, "address", address(r), "error", err)
	if errdefs.IsResourceExhausted(err) {
		s.answer(w, http.StatusServiceUnavailable, loginapi.Error{Message: sentence(err)})
		return
	}
	s.answer(w, http.StatusInternalServerError, loginapi.Error{Message: "the supervisor could not do it; its log has the reason"})
}

func (s *Server) answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(body); err != nil {
		s.log.Debug("answer not sent", "error", err)
	}
}

func bearerOf(r *http.Request) string {
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

func address(r *http.Request) string {
	if host, _, err := net.SplitHostPort(r.RemoteAddr); err == nil {
		return host
	}
	return r.RemoteAddr
}

// loggedName is the name that was tried, if it can be one: some type their
// password there.
func loggedName(r *http.Request) string {
	user, _, _ := r.BasicAuth()
	if p, err := sso.Parse(user, sso.DefaultDomain); err == nil && strings.ContainsAny(user, `@\`) {
		return p.String()
	}
	return "(not shown: not NAME@DOMAIN)"
}

func names(principals []sso.Principal) []string {
	var out []string
	for _, p := range principals {
		out = append(out, p.String())
	}
	return out
}

// sentence is an error without the name of its class.
func sentence(err error) string {
	for _, class := range []error{errdefs.ErrUnauthenticated, errdefs.ErrResourceExhausted} {
		if s, ok := strings.CutSuffix(err.Error(), ": "+class.Error()); ok {
			return s
		}
	}
	return err.Error()
}
