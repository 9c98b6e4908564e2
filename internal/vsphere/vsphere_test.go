package vsphere

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

const (
	testUser     = "administrator@vsphere.local"
	testPassword = "correct horse"
)

// A vcenter is the embedded one.
type vcenter struct {
	*vcsim.Server
	addr string
	ca   []byte
	pin  string
}

func startVCenter(t *testing.T) *vcenter {
	t.Helper()
	s, err := vcsim.New(vcsim.Config{AdminPassword: testPassword, PasswordRounds: 1000, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return &vcenter{Server: s, addr: s.URL().Host, ca: s.CA(), pin: s.Thumbprint()}
}

// A ledger counts calls by method.
type ledger struct {
	mu    sync.Mutex
	calls map[string]int
}

func (l *ledger) observe(c Call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls == nil {
		l.calls = map[string]int{}
	}
	l.calls[c.Method]++
}

func (l *ledger) count(method string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.calls[method]
}

func (v *vcenter) config(l *ledger) Config {
	c := Config{
		Address: v.addr, CA: v.ca,
		Credentials: func(context.Context) (string, string, error) { return testUser, testPassword, nil },
	}
	if l != nil {
		c.Observe = l.observe
	}
	return c
}

func newSession(t *testing.T, c Config) *Session {
	t.Helper()
	s, err := NewSession(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.client.CloseIdleConnections)
	return s
}

func now(ctx context.Context, s *Session) error {
	_, err := methods.CurrentTime(ctx, s, &types.CurrentTime{This: types.ManagedObjectReference{Type: "ServiceInstance", Value: "ServiceInstance"}})
	return err
}

// rootName needs a session, which now does not.
func rootName(ctx context.Context, s *Session) (string, error) {
	if err := s.Login(ctx); err != nil {
		return "", err
	}
	root := s.Client().ServiceContent.RootFolder
	found, err := s.Retrieve(ctx, map[types.ManagedObjectReference][]string{root: {"name"}})
	if err != nil {
		return "", err
	}
	name, _ := found[root]["name"].(string)
	return name, nil
}

// dropSessions ends all sessions at the server.
func (v *vcenter) dropSessions(t *testing.T) {
	t.Helper()
	s := newSession(t, v.config(nil))
	if err := s.Login(t.Context()); err != nil {
		t.Fatal(err)
	}
	manager := *s.Client().ServiceContent.SessionManager
	found, err := s.Retrieve(t.Context(), map[types.ManagedObjectReference][]string{manager: {"sessionList", "currentSession"}})
	if err != nil {
		t.Fatal(err)
	}
	mine := found[manager]["currentSession"].(types.UserSession).Key
	var ids []string
	for _, u := range found[manager]["sessionList"].(types.ArrayOfUserSession).UserSession {
		if u.Key != mine {
			ids = append(ids, u.Key)
		}
	}
	if _, err := methods.TerminateSession(t.Context(), s, &types.TerminateSession{This: manager, SessionId: ids}); err != nil {
		t.Fatal(err)
	}
}

func TestSessionLogsInOnceAndAgain(t *testing.T) {
	v := startVCenter(t)
	var l ledger
	s := newSession(t, v.config(&l))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := rootName(t.Context(), s); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := l.count("Login"); n != 1 {
		t.Fatalf("%d logins for 8 calls at once, want 1", n)
	}
	v.dropSessions(t)
	calls := l.count("RetrievePropertiesEx")
	name, err := rootName(t.Context(), s)
	if err != nil || name != "Datacenters" {
		t.Fatalf("after the session was dropped: %q, %v", name, err)
	}
	if l.count("Login") != 2 || s.Logins() != 2 || l.count("RetrievePropertiesEx") != calls+2 {
		t.Errorf("%d logins and %d more calls, want 2 and 2", l.count("Login"), l.count("RetrievePropertiesEx")-calls)
	}
}

func TestRefusedLoginIsNotRepeated(t *testing.T) {
	v := startVCenter(t)
	var l ledger
	c := v.config(&l)
	password := "wrong"
	c.Credentials = func(context.Context) (string, string, error) { return testUser, password, nil }
	s := newSession(t, c)
	for range 3 {
		err := s.Login(t.Context())
		if !errdefs.IsUnavailable(err) {
			t.Fatalf("a refused login is %v, want ErrUnavailable", err)
		}
		if want := "vCenter " + v.addr + " refuses the login: check user and password"; len(err.Error()) < len(want) || err.Error()[:len(want)] != want {
			t.Errorf("the error is %q, want it to begin with %q", err, want)
		}
	}
	if n := l.count("Login"); n != 1 {
		t.Errorf("%d logins in a row with a password that was refused, want 1: accounts get locked", n)
	}
	password = testPassword
	s.holdOff = 0
	if err := s.Login(t.Context()); err != nil {
		t.Errorf("with the right password: %v", err)
	}
}

func TestAddressAndTrust(t *testing.T) {
	v := startVCenter(t)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	_ = closed.Close()
	for name, c := range map[string]struct {
		change func(*Config)
		class  error
		text   string
	}{
		"CA":               {change: func(*Config) {}},
		"thumbprint":       {change: func(c *Config) { c.CA, c.Thumbprint = nil, v.pin }},
		"unknown CA":       {func(c *Config) { c.CA = nil }, errdefs.ErrUnavailable, "unknown authority: give vCenter's CA"},
		"other thumbprint": {func(c *Config) { c.Thumbprint = fmt.Sprintf("%064d", 7) }, errdefs.ErrUnavailable, "another thumbprint"},
		"no thumbprint":    {func(c *Config) { c.Thumbprint = "12:34" }, errdefs.ErrInvalidArgument, "thumbprint"},
		"no CA":            {func(c *Config) { c.CA = []byte("hello") }, errdefs.ErrInvalidArgument, "in PEM"},
		"http":             {func(c *Config) { c.Address = "http://" + c.Address }, errdefs.ErrInvalidArgument, "only https"},
		"userinfo":         {func(c *Config) { c.Address = "https://me:secret@" + c.Address }, errdefs.ErrInvalidArgument, "into the credentials"},
		"empty":            {func(c *Config) { c.Address = "" }, errdefs.ErrInvalidArgument, "give a host"},
		"nobody listens":   {func(c *Config) { c.Address = nobody }, errdefs.ErrUnavailable, "connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			config := v.config(nil)
			c.change(&config)
			s, err := NewSession(config)
			if err == nil {
				err = s.Login(t.Context())
			}
			if c.class == nil {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			mustBe(t, err, c.class, c.text)
		})
	}
}

// A vCenter that has stopped answering does not hold a caller for ever.
func TestSlowVCenterIsUnknown(t *testing.T) {
	v := startVCenter(t)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "https", Host: v.addr})
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	hang := make(chan struct{})
	var slow sync.Map
	server := newTLSServer(t, func(w http.ResponseWriter, r *http.Request) {
		if _, ok := slow.Load("on"); ok {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
			return
		}
		proxy.ServeHTTP(w, r)
	})
	t.Cleanup(func() { close(hang) })
	c := v.config(nil)
	c.Address, c.CA, c.Timeout = server.addr, server.ca, 50*time.Millisecond
	s := newSession(t, c)
	s.config.Timeout = time.Minute
	if err := now(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	s.config.Timeout = 50 * time.Millisecond
	slow.Store("on", true)
	err := Error("ask for the time", now(t.Context(), s))
	mustBe(t, err, errdefs.ErrUnavailable, "no answer in time: what was asked may have happened or not")
}

func mustBe(t *testing.T, err, class error, text string) {
	t.Helper()
	if !errors.Is(err, class) || !contains(err, text) {
		t.Errorf("the error is %v, want %v with %q", err, class, text)
	}
}
