package vsphere

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	// DefaultTimeout of a call that is not a wait.
	DefaultTimeout = time.Minute
	// maxInFlight calls of one session, waits apart: vCenter slows down for
	// everybody beyond it.
	maxInFlight = 32
	// loginHoldOff after a refused login: vCenter locks an account after five
	// refusals within three minutes by default.
	loginHoldOff = time.Minute
)

// Config says which vCenter a Session is with.
type Config struct {
	Address string // host, host:port or https URL, without userinfo
	// Credentials is asked at each login; what it returns is not kept.
	Credentials func(context.Context) (user, password string, err error)
	CA          []byte // PEM; nil: the system's
	Thumbprint  string // in place of CA
	UserAgent   string
	Timeout     time.Duration // of a call; DefaultTimeout if zero
	// Observe is told of every call that left, waits included. Optional.
	Observe func(Call)
}

// A Call is one request that was made to vCenter.
type Call struct {
	Method string // "CreateResourcePool"
	Took   time.Duration
	Err    error // nil, or with a class
}

// A Session is a login at one vCenter that is renewed when it was dropped. It
// is a soap.RoundTripper, so that govmomi's methods and objects work on it. It
// is safe for concurrent use; at most 32 calls are in flight, waits apart.
//
// A call that vCenter refused because the session was gone is made once more
// after a new login: it has had no effect. Any other is made once.
type Session struct {
	config  Config
	client  *vim25.Client // its ServiceContent is set at the first login
	slots   chan struct{}
	holdOff time.Duration

	login      sync.Mutex // held by whoever logs in
	mu         sync.Mutex
	generation int // of logins; 0: none yet, or the last one was dropped
	logins     int
	newest     context.Context // ends with the next login
	replace    context.CancelFunc
	about      types.AboutInfo
	user       string // of the last login
	refused    time.Time
	refusal    error
}

// NewSession makes no call: the first one logs in. An address or a CA that
// cannot be is ErrInvalidArgument.
func NewSession(c Config) (*Session, error) {
	u, err := parseAddress(c.Address)
	if err != nil {
		return nil, err
	}
	config, err := tlsConfig(c.CA, c.Thumbprint)
	if err != nil {
		return nil, fmt.Errorf("vCenter %s: %w", u.Host, err)
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultTimeout
	}
	c.Address = u.Host
	sc := soap.NewClient(u, false)
	sc.Namespace, sc.Version, sc.UserAgent = "urn:"+vim25.Namespace, vim25.Version, c.UserAgent
	t := sc.DefaultTransport()
	t.TLSClientConfig = config
	t.DialTLSContext = nil // govmomi's heeds no deadline
	t.DialContext = (&net.Dialer{Timeout: 20 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	t.MaxIdleConnsPerHost = maxInFlight
	s := &Session{config: c, slots: make(chan struct{}, maxInFlight), holdOff: loginHoldOff}
	s.client = &vim25.Client{Client: sc, RoundTripper: s}
	s.newest, s.replace = context.WithCancel(context.Background())
	return s, nil
}

func parseAddress(address string) (*url.URL, error) {
	u, err := soap.ParseURL(strings.TrimSpace(address))
	if err != nil || u == nil || u.Hostname() == "" {
		return nil, fmt.Errorf("vCenter address %q: give a host, host:port or https URL: %w", address, errdefs.ErrInvalidArgument)
	}
	if u.Scheme != "https" {
		return nil, fmt.Errorf("vCenter address %q: only https carries a password: %w", u.Redacted(), errdefs.ErrInvalidArgument)
	}
	if u.User != nil && u.User.Username() != "" {
		return nil, fmt.Errorf("vCenter address of %s: user and password belong into the credentials, not into the address: %w", u.Host, errdefs.ErrInvalidArgument)
	}
	u.User = nil
	return u, nil
}

// Address is the vCenter's host and port.
func (s *Session) Address() string { return s.config.Address }

// Client is for govmomi's packages that want one. Its ServiceContent is empty
// before Login.
func (s *Session) Client() *vim25.Client { return s.client }

// About is what the vCenter said of itself at the last login.
func (s *Session) About() types.AboutInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.about
}

// User is who signed in last; empty before the first login.
func (s *Session) User() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.user
}

// Logins counts them: whoever holds objects that live in a session (views,
// filters) must make them anew when it changed.
func (s *Session) Logins() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logins
}

// current lasts until there is another login than now.
func (s *Session) current() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.newest
}

// Login logs in if that is needed.
func (s *Session) Login(ctx context.Context) error {
	_, err := s.ensure(ctx, -1)
	return err
}

// ensure returns the generation of a login other than stale.
func (s *Session) ensure(ctx context.Context, stale int) (int, error) {
	s.login.Lock()
	defer s.login.Unlock()
	s.mu.Lock()
	generation, since, refusal := s.generation, time.Since(s.refused), s.refusal
	s.mu.Unlock()
	if generation != 0 && generation != stale {
		return generation, nil
	}
	if refusal != nil && since < s.holdOff {
		return 0, refusal
	}
	err := s.logIn(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.generation, s.refusal = 0, nil
	if err != nil {
		if _, ok := Fault(err).(types.BaseInvalidLogin); ok {
			s.refused, s.refusal = time.Now(), s.loginError(err)
		}
		return 0, s.loginError(err)
	}
	s.logins++
	s.generation = s.logins
	s.replace()
	s.newest, s.replace = context.WithCancel(context.Background())
	return s.generation, nil
}

func (s *Session) loginError(err error) error {
	what := "vCenter " + s.config.Address
	if _, ok := Fault(err).(types.BaseInvalidLogin); ok {
		return fmt.Errorf("%s refuses the login: check user and password in the credentials, and that the account is not locked: %w", what, ErrLogin)
	}
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("log in to %s: %w", what, err)
	}
	return Error("log in to "+what, err)
}

func (s *Session) logIn(ctx context.Context) error {
	user, password, err := s.config.Credentials(ctx)
	if err != nil {
		return fmt.Errorf("credentials: %w: %w", err, errdefs.ErrUnavailable)
	}
	content, err := s.content(ctx)
	if err != nil {
		return err
	}
	if content.About.ApiType != "VirtualCenter" || content.SessionManager == nil {
		return fmt.Errorf("it is no vCenter but %q: a single ESXi host has no namespaces: %w", content.About.FullName, errdefs.ErrInvalidArgument)
	}
	body := &methods.LoginBody{Req: &types.Login{This: *content.SessionManager, UserName: user, Password: password, Locale: "en_US"}}
	if err := s.send(ctx, body, &methods.LoginBody{}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.user = user
	return nil
}

// content asks for what needs no login, and keeps it.
func (s *Session) content(ctx context.Context) (types.ServiceContent, error) {
	res := &methods.RetrieveServiceContentBody{}
	req := &methods.RetrieveServiceContentBody{Req: &types.RetrieveServiceContent{This: vim25.ServiceInstance}}
	if err := s.send(ctx, req, res); err != nil {
		return types.ServiceContent{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.about = res.Res.Returnval.About
	if s.client.ServiceContent.SessionManager == nil {
		s.client.ServiceContent = res.Res.Returnval
	}
	return res.Res.Returnval, nil
}

// RoundTrip makes one call, after a login where that is needed. What it returns
// is for Error.
func (s *Session) RoundTrip(ctx context.Context, req, res soap.HasFault) error {
	generation, err := s.ensure(ctx, -1)
	if err != nil {
		return err
	}
	err = s.send(ctx, req, res)
	if !NotAuthenticated(err) {
		return err
	}
	if _, err := s.ensure(ctx, generation); err != nil {
		return err
	}
	clear(res)
	return s.send(ctx, req, res)
}

// clear empties a response for a second use.
func clear(res soap.HasFault) {
	if v := reflect.ValueOf(res); v.Kind() == reflect.Pointer && !v.IsNil() {
		v.Elem().SetZero()
	}
}

// send makes the call in the session that there is.
func (s *Session) send(ctx context.Context, req, res soap.HasFault) error {
	return s.sendTo(ctx, s.client.Client, req, res)
}

func (s *Session) sendTo(ctx context.Context, c *soap.Client, req, res soap.HasFault) error {
	method := methodName(req)
	if method != "WaitForUpdatesEx" {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.config.Timeout)
		defer cancel()
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		case <-ctx.Done():
			return fmt.Errorf("%s waited too long for its turn, and was not made: %w: %w", method, ctx.Err(), errdefs.ErrUnavailable)
		}
	}
	start := time.Now()
	err := c.RoundTrip(ctx, req, res)
	if s.config.Observe != nil {
		s.config.Observe(Call{Method: method, Took: time.Since(start), Err: err})
	}
	return err
}

// methodName is "CreateFolder" for a *methods.CreateFolderBody.
func methodName(req soap.HasFault) string {
	t := reflect.TypeOf(req)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return strings.TrimSuffix(t.Name(), "Body")
}

// dropped says that vCenter ended the session of that login.
func (s *Session) dropped(login int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.generation == login {
		s.generation = 0
	}
}

// Service is a RoundTripper for another service of the same vCenter that takes
// this session's cookie, as PBM at "/pbm" with namespace "pbm".
func (s *Session) Service(path, namespace string) (*soap.Client, soap.RoundTripper) {
	sc := s.client.NewServiceClient(path, namespace)
	sc.Cookie = s.client.SessionCookie
	return sc, roundTripper(func(ctx context.Context, req, res soap.HasFault) error {
		generation, err := s.ensure(ctx, -1)
		if err != nil {
			return err
		}
		s.share(sc)
		if err = s.sendTo(ctx, sc, req, res); !NotAuthenticated(err) {
			return err
		}
		if _, err := s.ensure(ctx, generation); err != nil {
			return err
		}
		clear(res)
		s.share(sc)
		return s.sendTo(ctx, sc, req, res)
	})
}

// share gives another service's client the cookie of the login that there is:
// it has the one of when it was made, and some services know no other way.
func (s *Session) share(sc *soap.Client) {
	sc.Jar.SetCookies(sc.URL(), s.client.Jar.Cookies(s.client.URL()))
}

type roundTripper func(ctx context.Context, req, res soap.HasFault) error

func (f roundTripper) RoundTrip(ctx context.Context, req, res soap.HasFault) error {
	return f(ctx, req, res)
}

// Logout ends the session, if there is one. The next call would log in again.
func (s *Session) Logout(ctx context.Context) {
	s.mu.Lock()
	in := s.generation != 0
	s.generation = 0
	s.mu.Unlock()
	if in {
		req := &methods.LogoutBody{Req: &types.Logout{This: *s.client.ServiceContent.SessionManager}}
		_ = s.send(ctx, req, &methods.LogoutBody{}) // vCenter ends idle sessions itself
	}
	s.client.CloseIdleConnections()
}
