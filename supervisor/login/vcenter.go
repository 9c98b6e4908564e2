package login

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/sts"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/internal/vsphere"
)

// An Authenticator knows whether a password is right.
type Authenticator interface {
	// Authenticate returns who signed in. A password that is wrong, a user that
	// is not there or may not sign in are one ErrUnauthenticated. Anything else
	// (vCenter down, slow, not trusted, none named) is ErrUnavailable or
	// ErrFailedPrecondition: nothing is known about the password. user is as it
	// was typed, at most 600 bytes; errors hold no password.
	Authenticate(ctx context.Context, user, password string) (Identity, error)
	// Domain is that of users who name none.
	Domain(ctx context.Context) (string, error)
}

// A VCenter is where users are asked for.
type VCenter struct {
	Address    string // host or host:port
	CA         []byte // PEM; empty: the host's authorities
	Thumbprint string // SHA-256 of its certificate, in place of CA
	SSODomain  string // of users who name none
}

// vcenterTimeout is for everything about one password.
const vcenterTimeout = 30 * time.Second

// SSO signs users in at a vCenter, with their own name and password: by its
// token service, which tells a user's groups and lets in those who have no
// rights in vSphere; or, where that is missing (vCenter's simulators), by a
// session, which tells no groups.
type SSO struct {
	// VCenter says which; asked at each login.
	VCenter func(context.Context) (VCenter, error)
	Log     *slog.Logger
	Now     func() time.Time
}

// Domain is the Supervisor's.
func (s *SSO) Domain(ctx context.Context) (string, error) {
	v, err := s.VCenter(ctx)
	if err != nil {
		return "", err
	}
	if v.SSODomain == "" {
		return sso.DefaultDomain, nil
	}
	return v.SSODomain, nil
}

// Authenticate is Authenticator's.
func (s *SSO) Authenticate(ctx context.Context, user, password string) (Identity, error) {
	v, err := s.VCenter(ctx)
	if err != nil {
		return Identity{}, err
	}
	domain, err := s.Domain(ctx)
	if err != nil {
		return Identity{}, err
	}
	who, err := sso.Parse(user, domain)
	if err != nil {
		return Identity{}, errWrong
	}
	ctx, cancel := context.WithTimeout(ctx, vcenterTimeout)
	defer cancel()
	// Never logged in: it gives a client that trusts what the operator said.
	session, err := vsphere.NewSession(vsphere.Config{Address: v.Address, CA: v.CA, Thumbprint: v.Thumbprint, UserAgent: "atoll/login", Timeout: vcenterTimeout})
	if err != nil {
		return Identity{}, err
	}
	client := session.Client().Client
	defer client.CloseIdleConnections()
	found, err := s.byToken(ctx, client, who, password)
	if !errors.Is(err, errdefs.ErrUnknown) {
		return found, err
	}
	s.Log.Warn("vCenter's token service cannot be used; users sign in without their groups", "vcenter", v.Address, "error", err)
	return s.bySession(ctx, client, who, password)
}

// errWrong is the one answer to all that a stranger may not tell apart.
var errWrong = fmt.Errorf("user name or password is wrong: %w", errdefs.ErrUnauthenticated)

// byToken asks for a SAML token. ErrUnknown says that there is no token service
// that checks passwords.
func (s *SSO) byToken(ctx context.Context, client *soap.Client, who sso.Principal, password string) (Identity, error) {
	service := client.NewServiceClient(sts.Path, sts.Namespace)
	tokens := &sts.Client{Client: service, RoundTripper: service}
	token, err := tokens.Issue(ctx, sts.TokenRequest{Userinfo: url.UserPassword(who.String(), password), Lifetime: time.Minute})
	if err == nil {
		return readAssertion(token.Token, who, s.Now())
	}
	if soap.IsSoapFault(err) {
		fault := soap.ToSoapFault(err)
		// WS-Security 1.1, section 12: the codes of faults.
		if strings.HasSuffix(fault.Code, "FailedAuthentication") {
			return Identity{}, errWrong
		}
		return Identity{}, fmt.Errorf("vCenter's token service does not answer a login (%s): %w", fault.String, errdefs.ErrUnavailable)
	}
	if notFound(err) {
		return Identity{}, fmt.Errorf("vCenter has no token service at %s: %w", sts.Path, errdefs.ErrUnknown)
	}
	return Identity{}, unreachable(err)
}

// bySession logs in and out again. Users without any right in vSphere are
// refused by vCenter itself.
func (s *SSO) bySession(ctx context.Context, client *soap.Client, who sso.Principal, password string) (Identity, error) {
	content, err := methods.RetrieveServiceContent(ctx, client, &types.RetrieveServiceContent{This: vim25.ServiceInstance})
	if err != nil {
		return Identity{}, unreachable(err)
	}
	manager := content.Returnval.SessionManager
	if manager == nil {
		return Identity{}, fmt.Errorf("vCenter has no session manager: %w", errdefs.ErrUnavailable)
	}
	_, err = methods.Login(ctx, client, &types.Login{This: *manager, UserName: who.String(), Password: password})
	if err != nil {
		switch vsphere.Fault(err).(type) {
		case types.BaseInvalidLogin, *types.NoPermission:
			return Identity{}, errWrong
		}
		return Identity{}, unreachable(err)
	}
	if _, err := methods.Logout(ctx, client, &types.Logout{This: *manager}); err != nil {
		s.Log.Warn("a session in vCenter was not ended; it ends by itself", "user", who.String(), "error", err)
	}
	return Identity{User: who, Warning: "vCenter does not tell your groups: namespaces that you may use as a member of one are missing"}, nil
}

// notFound tells an answer of 404, which govmomi has no type for. Any other
// status may be of a vCenter that is starting.
func notFound(err error) bool {
	var answer *url.Error
	return errors.As(err, &answer) && answer.Op == http.MethodPost && strings.HasPrefix(answer.Err.Error(), "404 ")
}

// unreachable classes what says nothing about a password.
func unreachable(err error) error {
	err = vsphere.Error("sign in at vCenter", err)
	if errdefs.IsUnavailable(err) {
		return err
	}
	return fmt.Errorf("%v: %w", err, errdefs.ErrUnavailable)
}
