package login

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

// fakeUsers knows ada, with the password "right"; while down, nobody.
type fakeUsers struct {
	down  atomic.Bool
	asked atomic.Int32
}

func (f *fakeUsers) Domain(context.Context) (string, error) { return "vsphere.local", nil }

func (f *fakeUsers) Authenticate(ctx context.Context, user, password string) (Identity, error) {
	f.asked.Add(1)
	if f.down.Load() {
		return Identity{}, fmt.Errorf("vCenter is away: %w", errdefs.ErrUnavailable)
	}
	p, err := sso.Parse(user, "vsphere.local")
	if err != nil || p != ada.User || password != "right" {
		return Identity{}, errWrong
	}
	return ada, ctx.Err()
}

// A testPKI is an authority, a serving certificate and client certificates.
type testPKI struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newTestPKI(t *testing.T) *testPKI {
	p := &testPKI{t: t, dir: t.TempDir()}
	p.cert, p.key = p.issue("ca", &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	p.issue("server", &x509.Certificate{Subject: pkix.Name{CommonName: "login"}, IPAddresses: []net.IP{{127, 0, 0, 1}}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	return p
}

func (p *testPKI) file(name string) string { return filepath.Join(p.dir, name) }

func (p *testPKI) issue(name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent, signer := p.cert, p.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		p.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		p.t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{name + ".crt": {Type: "CERTIFICATE", Bytes: der}, name + ".key": {Type: "EC PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(p.file(file), pem.EncodeToMemory(block), 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	return cert, key
}

// client trusts the authority and shows the named certificate, if any.
func (p *testPKI) client(name string) *http.Client {
	p.t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(p.cert)
	c := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	if name != "" {
		p.issue(name, &x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		pair, err := tls.LoadX509KeyPair(p.file(name+".crt"), p.file(name+".key"))
		if err != nil {
			p.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}}
}

// A world is a running server, with a clock that stands still.
type world struct {
	t     *testing.T
	pki   *testPKI
	users *fakeUsers
	clock atomic.Pointer[time.Time]
	o     Options
	*Server
	stop func()
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, pki: newTestPKI(t), users: &fakeUsers{}}
	w.set(epoch)
	dir := t.TempDir()
	free := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	w.o = Options{
		Listen: free, Review: free,
		CertFile: w.pki.file("server.crt"), KeyFile: w.pki.file("server.key"), ClientCAFile: w.pki.file("ca.crt"),
		KeyDir: filepath.Join(dir, "keys"), RevokedFile: filepath.Join(dir, "revoked"),
		TokenLifetime: time.Hour, APIServerPort: 6443, Users: w.users,
		Namespaces:  func(_ context.Context, who Identity) ([]string, error) { return []string{"of-" + who.User.Name}, nil },
		Log:         slog.New(slog.DiscardHandler),
		FailureTime: time.Millisecond, Now: func() time.Time { return *w.clock.Load() },
	}
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

func (w *world) set(now time.Time) { w.clock.Store(&now) }

func (w *world) start() {
	w.t.Helper()
	s, err := New(w.o)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	w.Server = s
	w.stop = func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
}

// call returns the status and the body.
func (w *world) call(c *http.Client, method, url string, body io.Reader, authorize func(*http.Request)) (int, string) {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, url, body)
	if err != nil {
		w.t.Fatal(err)
	}
	if authorize != nil {
		authorize(req)
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (w *world) user(method, path string, authorize func(*http.Request)) (int, string) {
	w.t.Helper()
	return w.call(w.pki.client(""), method, "https://"+w.usersAddr.Addr().String()+path, nil, authorize)
}

func basic(user, password string) func(*http.Request) {
	return func(r *http.Request) { r.SetBasicAuth(user, password) }
}

func withBearer(token string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) }
}

func (w *world) login() string {
	w.t.Helper()
	status, body := w.user(http.MethodPost, loginapi.LoginPath, basic("Ada@vsphere.local", "right"))
	var l loginapi.Login
	if err := json.Unmarshal([]byte(body), &l); status != http.StatusOK || err != nil {
		w.t.Fatalf("login: %d %s", status, body)
	}
	if l.User != "ada@vsphere.local" || len(l.Groups) != 2 || l.APIServerPort != 6443 || !strings.Contains(l.CertificateAuthority, "CERTIFICATE") {
		w.t.Errorf("login: %s", body)
	}
	return l.Token
}

// review asks as the API server does, with the certificate of that name.
func (w *world) review(reviewer, token string) (int, authenticationv1.TokenReviewStatus) {
	w.t.Helper()
	body, err := json.Marshal(authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}})
	if err != nil {
		w.t.Fatal(err)
	}
	status, text := w.call(w.pki.client(reviewer), http.MethodPost, "https://"+w.reviewAddr.Addr().String()+ReviewPath, strings.NewReader(string(body)), nil)
	var r authenticationv1.TokenReview
	_ = json.Unmarshal([]byte(text), &r)
	if strings.Contains(text, token) {
		w.t.Error("the answer repeats the token")
	}
	return status, r.Status
}

func TestServer(t *testing.T) {
	w := newWorld(t)
	token := w.login()
	if status, body := w.user(http.MethodGet, loginapi.WorkloadsPath, withBearer(token)); status != http.StatusOK || !strings.Contains(body, `"namespace":"of-ada","master_host":"127.0.0.1","control_plane_api_server_port":"6443"`) {
		t.Errorf("workloads: %d %s", status, body)
	}
	if status, body := w.user(http.MethodGet, loginapi.WorkloadsPath, basic("ada", "right")); status != http.StatusOK || !strings.Contains(body, "of-ada") {
		t.Errorf("workloads by password: %d %s", status, body)
	}
	status, r := w.review(ReviewerName, token)
	if status != http.StatusOK || !r.Authenticated || r.User.Username != "sso:ada@vsphere.local" || fmt.Sprint(r.User.Groups) != "[sso:shop-devs@vsphere.local sso:everyone@corp.example]" {
		t.Errorf("review: %d %+v", status, r)
	}
	// The authority has signed others, who are not the API server.
	if status, r := w.review("system:node:n1", token); status != http.StatusForbidden || r.Authenticated {
		t.Errorf("review for a node: %d %+v", status, r)
	}
	if status, r := w.review("", token); status != 0 || r.Authenticated {
		t.Errorf("review for a stranger: %d %+v", status, r)
	}
	if status, _ := w.user(http.MethodPost, ReviewPath, nil); status != http.StatusNotFound {
		t.Errorf("review at the users' port: %d", status)
	}
	if status, body := w.user(http.MethodGet, loginapi.KeysPath, nil); status != http.StatusOK || !strings.Contains(body, w.keys.keys[0].id) || strings.Contains(body, `"d":`) {
		t.Errorf("keys: %d %s", status, body)
	}
	w.set(epoch.Add(time.Hour))
	if _, r := w.review(ReviewerName, token); r.Authenticated || !strings.Contains(r.Error, "expired") {
		t.Errorf("an hour later: %+v", r)
	}
	if status, body := w.user(http.MethodGet, loginapi.WorkloadsPath, withBearer(token)); status != http.StatusUnauthorized || !strings.Contains(body, "sign in again") {
		t.Errorf("workloads an hour later: %d %s", status, body)
	}
}

func TestServerRefuses(t *testing.T) {
	w := newWorld(t)
	var first string
	for _, c := range [][2]string{{"ada", "wrong"}, {"nobody", "right"}, {"ada@other.example", "right"}, {"", ""}, {"a\x00b", "x"}, {strings.Repeat("a", 700), "x"}, {"ada", ""}} {
		status, body := w.user(http.MethodPost, loginapi.LoginPath, basic(c[0], c[1]))
		if first == "" {
			first = body
		}
		if status != http.StatusUnauthorized || body != first {
			t.Errorf("%.20q with %.20q: %d %s", c[0], c[1], status, body)
		}
	}
	if status, _ := w.user(http.MethodGet, loginapi.LoginPath, basic("ada", "right")); status != http.StatusMethodNotAllowed {
		t.Errorf("login by GET: %d", status)
	}
	// While vCenter is away, nothing counts as wrong.
	w.users.down.Store(true)
	for range 2 * maxFailures {
		if status, body := w.user(http.MethodPost, loginapi.LoginPath, basic("ada", "right")); status != http.StatusServiceUnavailable || strings.Contains(body, "vCenter is away") {
			t.Fatalf("without vCenter: %d %s", status, body)
		}
	}
	w.users.down.Store(false)
	w.login()
	for range maxFailures {
		w.user(http.MethodPost, loginapi.LoginPath, basic("ada", "wrong"))
	}
	asked := w.users.asked.Load()
	if status, body := w.user(http.MethodPost, loginapi.LoginPath, basic("ada", "right")); status != http.StatusTooManyRequests || !strings.Contains(body, "wait 5m0s") {
		t.Errorf("locked: %d %s", status, body)
	}
	if w.users.asked.Load() != asked {
		t.Error("vCenter was asked while the user was locked")
	}
	w.set(epoch.Add(lockTime))
	w.login()
}

// hangingUp is a client that goes away while vCenter is asked.
type hangingUp struct {
	fakeUsers
	hangUp context.CancelFunc
}

func (h *hangingUp) Authenticate(ctx context.Context, _, _ string) (Identity, error) {
	h.hangUp()
	if err := ctx.Err(); err != nil {
		return Identity{}, err
	}
	return Identity{}, errWrong
}

// TestHangingUp: who does not wait for the answer has tried all the same.
func TestHangingUp(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	w.Server.o.Users = &hangingUp{hangUp: cancel}
	req := httptest.NewRequestWithContext(ctx, http.MethodPost, loginapi.LoginPath, nil)
	req.SetBasicAuth("ada", "wrong")
	if _, err := w.checkPassword(req); !errdefs.IsUnauthorized(err) {
		t.Errorf("checkPassword: %v", err)
	}
	if c := w.lockout.counters[counterKey{userFromAddress, "ada@vsphere.local", "192.0.2.1"}]; c == nil || c.n != 1 {
		t.Errorf("counted %+v", c)
	}
}

// TestRestart: what was given back stays so over a restart; and where the list
// of it is lost, as in a restored backup, no token is good any more.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	kept, returned := w.login(), w.login()
	if status, body := w.user(http.MethodPost, loginapi.LogoutPath, withBearer(returned)); status != http.StatusNoContent {
		t.Fatalf("logout: %d %s", status, body)
	}
	if status, _ := w.user(http.MethodPost, loginapi.LogoutPath, withBearer(returned)); status != http.StatusUnauthorized {
		t.Errorf("logout once more: %d", status)
	}
	check := func(when string, keptGood bool) {
		t.Helper()
		if _, r := w.review(ReviewerName, kept); r.Authenticated != keptGood {
			t.Errorf("%s: %+v", when, r)
		}
		if _, r := w.review(ReviewerName, returned); r.Authenticated {
			t.Errorf("%s: the one that was given back is good", when)
		}
	}
	check("before", true)
	w.stop()
	w.start()
	check("after a restart", true)
	w.stop()
	if err := os.Remove(w.o.RevokedFile); err != nil {
		t.Fatal(err)
	}
	w.start()
	check("without the list", false)
	w.stop()
	w.start()
	check("after that", false)
	w.login()
}
