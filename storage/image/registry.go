package image

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/openatoll/atoll/storage"
)

// A session is the clients of one pull.
type session struct {
	resolver remotes.Resolver

	mu         sync.Mutex
	transports []*http.Transport
	hosts      map[string]bool // that credentials may be shown to
}

// newSession sets up the way to the registry of r: the hosts that hosts.toml
// names, TLS as it says, plain HTTP only where it says so or on loopback.
func (s *Store) newSession(ctx context.Context, r ref, auth *storage.Auth) (*session, error) {
	if err := s.checkHostsFile(r.host()); err != nil {
		return nil, err
	}
	ses := &session{hosts: map[string]bool{}}
	options := config.HostOptions{
		UpdateClient: func(c *http.Client) error { return watch(c, s.timeouts, ses) },
		Credentials:  func(host string) (string, string, error) { return ses.credentials(auth, host) },
	}
	if s.hostsDir != "" {
		options.HostDir = config.HostDirFromRoot(s.hostsDir)
	}
	configured := config.ConfigureHosts(ctx, options)
	ses.resolver = docker.NewResolver(docker.ResolverOptions{
		Headers: http.Header{"User-Agent": {"atoll"}},
		Hosts: func(name string) ([]docker.RegistryHost, error) {
			hosts, err := configured(name)
			if err != nil {
				return nil, classed(errdefs.ErrFailedPrecondition, "pull image %s: the settings of its registry in %s are wrong: %v", r, s.hostsDir, err)
			}
			ses.admit(hosts, auth)
			return hosts, nil
		},
	})
	return ses, nil
}

// admits tells whether host belongs to the registry.
func (ses *session) admits(host string) bool {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	return ses.hosts[host]
}

func (ses *session) used(t *http.Transport) {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	ses.transports = append(ses.transports, t)
}

// admit notes which host is the registry: it alone sees credentials, not one
// that it redirects to, and no mirror, whose passwords are other ones. The
// registry is the last, after the mirrors that hosts.toml names.
func (ses *session) admit(hosts []docker.RegistryHost, auth *storage.Auth) {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	if i := len(hosts) - 1; i >= 0 {
		ses.hosts[hosts[i].Host] = true
		if auth != nil && auth.RegistryToken != "" && auth.Username == "" && auth.IdentityToken == "" {
			hosts[i].Authorizer = &bearer{host: hosts[i].Host, token: auth.RegistryToken}
		}
	}
}

func (ses *session) credentials(auth *storage.Auth, host string) (string, string, error) {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	switch {
	case auth == nil || !ses.hosts[host]:
		return "", "", nil
	case auth.Username != "" || auth.Password != "":
		return auth.Username, auth.Password, nil
	default:
		return "", auth.IdentityToken, nil
	}
}

func (ses *session) close() {
	ses.mu.Lock()
	defer ses.mu.Unlock()
	for _, t := range ses.transports {
		t.CloseIdleConnections()
	}
}

// A bearer shows a token that the registry gave somebody else already.
type bearer struct{ host, token string }

func (b *bearer) Authorize(_ context.Context, req *http.Request) error {
	if req.URL.Host == b.host {
		req.Header.Set("Authorization", "Bearer "+b.token)
	}
	return nil
}

func (b *bearer) AddResponses(context.Context, []*http.Response) error {
	return fmt.Errorf("%w: the registry refuses the token", docker.ErrInvalidAuthorization)
}

// checkHostsFile refuses a hosts.toml that cannot be read: containerd's code
// would go on without it, perhaps to another registry than the admin meant.
func (s *Store) checkHostsFile(host string) error {
	if s.hostsDir == "" {
		return nil
	}
	dir, err := config.HostDirFromRoot(s.hostsDir)(host)
	if err != nil {
		return nil // none for this registry
	}
	path := filepath.Join(dir, "hosts.toml")
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err == nil {
		err = toml.Unmarshal(data, new(map[string]any))
	}
	if err != nil {
		return classed(errdefs.ErrFailedPrecondition, "the settings of registry %s in %s cannot be read: correct the file: %v", host, path, err)
	}
	return nil
}
