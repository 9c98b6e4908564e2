package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

const (
	// callTimeout is longer than the server gives vCenter.
	callTimeout = 90 * time.Second
	maxAnswer   = 8 << 20
)

// A server is one supervisor's login server.
type server struct {
	target target
	http   *http.Client
}

// dial makes no call. ca is PEM and takes the place of the system's
// authorities; insecure takes any certificate.
func dial(t target, ca []byte, insecure bool) (*server, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	switch {
	case insecure:
		config.InsecureSkipVerify = true //nolint:gosec // asked for by name
	case len(ca) > 0:
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("the CA of %s holds no PEM certificate: %w", t.name(), errdefs.ErrInvalidArgument)
		}
	}
	return &server{target: t, http: &http.Client{
		Timeout:   callTimeout,
		Transport: &http.Transport{TLSClientConfig: config, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 15 * time.Second},
		// A password goes to whom the user named, and no further.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

func (s *server) close() { s.http.CloseIdleConnections() }

// reach finds out whether the server is there, trusted, and one to sign in at,
// before anybody types a password or sends it.
func (s *server) reach(ctx context.Context) error {
	var published struct{ Keys []json.RawMessage }
	err := s.call(ctx, http.MethodGet, loginapi.KeysPath, func(*http.Request) {}, &published)
	if err == nil && len(published.Keys) == 0 {
		err = s.notALoginServer("it publishes no keys")
	}
	return err
}

func (s *server) login(ctx context.Context, user, password string) (loginapi.Login, error) {
	var l loginapi.Login
	err := s.call(ctx, http.MethodPost, loginapi.LoginPath, func(r *http.Request) { r.SetBasicAuth(user, password) }, &l)
	if err == nil && (l.Token == "" || l.APIServerPort == 0 || l.User == "") {
		err = s.notALoginServer("its answer is incomplete")
	}
	return l, err
}

func (s *server) workloads(ctx context.Context, token string) ([]loginapi.Workload, error) {
	var w []loginapi.Workload
	err := s.call(ctx, http.MethodGet, loginapi.WorkloadsPath, withToken(token), &w)
	return w, err
}

// logout is idempotent: a token that is good no more is no error.
func (s *server) logout(ctx context.Context, token string) error {
	err := s.call(ctx, http.MethodPost, loginapi.LogoutPath, withToken(token), nil)
	if errdefs.IsUnauthorized(err) {
		return nil
	}
	return err
}

func withToken(token string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
}

// call makes one request; an answer of 2xx is decoded into out unless that is
// nil.
func (s *server) call(ctx context.Context, method, path string, authorize func(*http.Request), out any) error {
	req, err := http.NewRequestWithContext(ctx, method, s.target.url(path), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "kubectl-atoll")
	authorize(req)
	resp, err := s.http.Do(req)
	if err != nil {
		return s.transportError(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return s.transportError(err)
	}
	if resp.StatusCode/100 != 2 {
		return s.refusal(resp, body)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return s.notALoginServer("its answer is no JSON")
	}
	return nil
}

// refusal gives an answer its class, and the server's own sentence.
func (s *server) refusal(resp *http.Response, body []byte) error {
	var e loginapi.Error
	if err := json.Unmarshal(body, &e); err != nil || e.Message == "" {
		return s.notALoginServer("it answers " + resp.Status)
	}
	var class error = errdefs.ErrUnavailable
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		class = errdefs.ErrUnauthenticated
	case http.StatusTooManyRequests:
		class = errdefs.ErrResourceExhausted
	case http.StatusForbidden, http.StatusNotFound:
		return s.notALoginServer("it answers " + resp.Status)
	}
	return fmt.Errorf("%s: %s: %w", s.target.name(), e.Message, class)
}

func (s *server) notALoginServer(why string) error {
	return fmt.Errorf("%s is no supervisor's login server, %s: give its host, and its port if it is not %d: %w", s.target.url(""), why, loginapi.DefaultPort, errdefs.ErrInvalidArgument)
}

func (s *server) transportError(err error) error {
	var unknown x509.UnknownAuthorityError
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fmt.Errorf("the certificate of %s is signed by an authority that is not trusted here: give the supervisor's with --ca-file (pki/ca.crt in its data directory), or check that the address is right: %w", s.target.name(), errdefs.ErrPermissionDenied)
	case errors.As(err, &name), errors.As(err, &invalid):
		return fmt.Errorf("the certificate of %s is not good for it: %v: %w", s.target.name(), err, errdefs.ErrPermissionDenied)
	case errors.Is(err, context.Canceled):
		return err
	}
	return fmt.Errorf("%s cannot be reached: %v: %w", s.target.name(), err, errdefs.ErrUnavailable)
}
