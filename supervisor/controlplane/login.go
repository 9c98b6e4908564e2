package controlplane

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/controlplane/pki"
	"github.com/openatoll/atoll/supervisor/login"
)

// supervisorCacheTime is how long logins use a Supervisor that was read: one
// read serves a storm of wrong passwords.
const supervisorCacheTime = 2 * time.Second

func (c Config) loginDir() string { return filepath.Join(c.DataDir, "login") }

// reviewURL is where the API server asks about the tokens of users.
func (c Config) reviewURL() string {
	return fmt.Sprintf("https://127.0.0.1:%d%s", tokenReviewPort, login.ReviewPath)
}

func (c Config) loginURL() string {
	return "https://" + netip.AddrPortFrom(c.Address, c.LoginPort).String()
}

// loginLeaves are the login server's certificate, for the names of the API
// server, and the one that the API server shows it.
func (c Config) loginLeaves() []pki.Leaf {
	server := c.apiServerLeaf()
	server.File, server.CommonName = "login", "atoll-login"
	server.Addresses = append(server.Addresses, netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	return []pki.Leaf{server, {File: "token-reviewer", CommonName: login.ReviewerName, Client: true}}
}

// writeTokenReviewKubeconfig is the API server's --authentication-token-webhook-config-file.
func writeTokenReviewKubeconfig(c Config) error {
	b, err := clientcmd.Write(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"login": {Server: c.reviewURL(), CertificateAuthority: c.ClientCAFile()}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"apiserver": {ClientCertificate: c.pkiPath("token-reviewer.crt"), ClientKey: c.pkiPath("token-reviewer.key")}},
		Contexts:       map[string]*clientcmdapi.Context{"login": {Cluster: "login", AuthInfo: "apiserver"}},
		CurrentContext: "login",
	})
	if err != nil {
		return err
	}
	return writeIfChanged(c.componentKubeconfig(tokenReview), b, 0o600)
}

// startLogin must come before the API server, which asks it.
func (s *supervisor) startLogin() error {
	c := s.config
	if s.vcenter != nil {
		s.health.serveUsers(s.vcenter)
	}
	if err := makePrivateDir(c.loginDir()); err != nil {
		return err
	}
	client, dyn, err := clients(c, loginIdentity)
	if err != nil {
		return err
	}
	targets, err := c.frontTargets()
	if err != nil {
		return err
	}
	reader := &supervisorReader{client: dyn}
	server, err := login.New(login.Options{
		Listen:        netip.AddrPortFrom(c.Address, c.LoginPort),
		Review:        netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), tokenReviewPort),
		CertFile:      c.pkiPath("login.crt"),
		KeyFile:       c.pkiPath("login.key"),
		ClientCAFile:  c.ClientCAFile(),
		KeyDir:        c.pkiPath("login"),
		RevokedFile:   filepath.Join(c.loginDir(), "revoked"),
		TokenLifetime: c.TokenLifetime,
		APIServerPort: c.APIPort,
		Users:         &login.SSO{VCenter: reader.vcenter, Log: slog.Default().With("component", "login"), Now: time.Now},
		Namespaces: func(ctx context.Context, who login.Identity) ([]string, error) {
			return login.Namespaces(ctx, client, who)
		},
		Directory: &login.UserDirectory{VCenter: reader.vcenter, Credentials: targets.supervisorCredentials},
		Log:       slog.Default(),
	})
	if err != nil {
		return err
	}
	// With the API server, not with its clients: it asks until it has ended.
	s.start(s.apis, "login", server.Run)
	return nil
}

// A supervisorReader says which vCenter users are asked for: that of the
// cluster's Supervisor.
type supervisorReader struct {
	client dynamic.Interface

	mu   sync.Mutex
	have login.VCenter
	err  error
	read time.Time
}

func (r *supervisorReader) vcenter(ctx context.Context) (login.VCenter, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.read) < supervisorCacheTime {
		return r.have, r.err
	}
	have, err := r.get(ctx)
	if ctx.Err() != nil {
		return have, err // of this caller alone
	}
	r.have, r.err, r.read = have, err, time.Now()
	return r.have, r.err
}

func (r *supervisorReader) get(ctx context.Context) (login.VCenter, error) {
	object, err := r.client.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisors")).Get(ctx, v1alpha1.SupervisorName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return login.VCenter{}, fmt.Errorf("there is no Supervisor %q that names a vCenter to ask for users: create it: %w", v1alpha1.SupervisorName, errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return login.VCenter{}, fmt.Errorf("read the Supervisor: %v: %w", err, errdefs.ErrUnavailable)
	}
	var sv v1alpha1.Supervisor
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, &sv); err != nil {
		return login.VCenter{}, fmt.Errorf("read the Supervisor: %v: %w", err, errdefs.ErrFailedPrecondition)
	}
	v := sv.Spec.VCenter
	return login.VCenter{Address: v.Server, CA: v.CABundle, Thumbprint: v.Thumbprint, SSODomain: sv.Spec.SSODomain}, nil
}
