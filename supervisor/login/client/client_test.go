package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/supervisor/login"
	"github.com/openatoll/atoll/supervisor/login/client"
	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

// users are all that have the password "right".
type users struct{}

func (users) Domain(context.Context) (string, error) { return "vsphere.local", nil }

func (users) Authenticate(_ context.Context, user, password string) (login.Identity, error) {
	p, err := sso.Parse(user, "vsphere.local")
	if err != nil || password != "right" {
		return login.Identity{}, fmt.Errorf("wrong: %w", errdefs.ErrUnauthenticated)
	}
	return login.Identity{User: p, Warning: "mind the gap"}, nil
}

// A supervisor is a login server; its namespaces can be changed.
type supervisor struct {
	addr       string
	ca         string // file
	namespaces []string
	stop       func()
}

func startSupervisor(t *testing.T) *supervisor {
	t.Helper()
	dir := t.TempDir()
	s := &supervisor{ca: filepath.Join(dir, "ca.crt"), namespaces: []string{"ops", "shop"}}
	writeCertificate(t, dir)
	free := netip.MustParseAddrPort("127.0.0.1:0")
	server, err := login.New(login.Options{
		Listen: free, Review: free,
		CertFile: filepath.Join(dir, "ca.crt"), KeyFile: filepath.Join(dir, "ca.key"), ClientCAFile: s.ca,
		KeyDir: filepath.Join(dir, "keys"), RevokedFile: filepath.Join(dir, "revoked"),
		TokenLifetime: time.Hour, APIServerPort: 6443, Users: users{},
		Namespaces:  func(context.Context, login.Identity) ([]string, error) { return s.namespaces, nil },
		Log:         slog.New(slog.DiscardHandler),
		FailureTime: time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	s.addr = server.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	s.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		done <- nil
	}
	t.Cleanup(s.stop)
	return s
}

// writeCertificate makes one that has signed itself.
func writeCertificate(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "sv"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{{127, 0, 0, 1}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{"ca.crt": {Type: "CERTIFICATE", Bytes: der}, "ca.key": {Type: "EC PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func (s *supervisor) options(kubeconfig string) client.Options {
	return client.Options{
		Server: s.addr, User: "Ada", CAFile: s.ca, Kubeconfig: kubeconfig,
		Password: func() (string, error) { return "right", nil },
	}
}

func TestLoginAndLogout(t *testing.T) {
	s := startSupervisor(t)
	kubeconfig := filepath.Join(t.TempDir(), "config")
	r, err := client.Login(t.Context(), s.options(kubeconfig))
	if err != nil || r.User != "ada@vsphere.local" || r.Current != s.addr || fmt.Sprint(r.Contexts) != "["+s.addr+" ops shop]" || r.Warning != "mind the gap" || r.Fingerprint != "" {
		t.Fatalf("%+v, %v", r, err)
	}
	// From now on the authority is known.
	o := s.options(kubeconfig)
	o.CAFile, o.Namespace = "", "shop"
	if r, err = client.Login(t.Context(), o); err != nil || r.Current != "shop" {
		t.Errorf("again: %+v, %v", r, err)
	}
	have, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	if got := have.Clusters["atoll:"+s.addr].Server; got != "https://127.0.0.1:6443" {
		t.Errorf("API server %s", got)
	}
	before, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*client.Options){
		"wrong password": func(o *client.Options) { o.Password = func() (string, error) { return "left", nil } },
		"no namespace":   func(o *client.Options) { o.Namespace = "lab" },
		"no password":    func(o *client.Options) { o.Password = func() (string, error) { return "", errors.New("none") } },
		"no CA file":     func(o *client.Options) { o.CAFile = "/nonexistent" },
		"bad address":    func(o *client.Options) { o.Server = "http://" + s.addr },
	} {
		o := s.options(kubeconfig)
		change(&o)
		if r, err := client.Login(t.Context(), o); err == nil {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if after, err := os.ReadFile(kubeconfig); err != nil || string(after) != string(before) {
		t.Errorf("a login that failed changed the kubeconfig: %v", err)
	}
	if out, err := client.Logout(t.Context(), "other.example", kubeconfig); err != nil || len(out) != 0 {
		t.Errorf("logout elsewhere: %+v, %v", out, err)
	}
	if out, err := client.Logout(t.Context(), s.addr, kubeconfig); err != nil || len(out) != 1 || out[0].NotRevoked != nil {
		t.Errorf("logout: %+v, %v", out, err)
	}
	if out, err := client.Logout(t.Context(), "", kubeconfig); err != nil || len(out) != 0 {
		t.Errorf("logout again: %+v, %v", out, err)
	}
}

// TestLogoutWithoutServer: the contexts go, and the user is told that the token
// does not.
func TestLogoutWithoutServer(t *testing.T) {
	s := startSupervisor(t)
	kubeconfig := filepath.Join(t.TempDir(), "config")
	if _, err := client.Login(t.Context(), s.options(kubeconfig)); err != nil {
		t.Fatal(err)
	}
	s.stop()
	out, err := client.Logout(t.Context(), "", kubeconfig)
	if err != nil || len(out) != 1 || !errdefs.IsUnavailable(out[0].NotRevoked) || time.Until(out[0].Expires) < 50*time.Minute {
		t.Errorf("%+v, %v", out, err)
	}
	if have, err := clientcmd.LoadFromFile(kubeconfig); err != nil || len(have.Contexts)+len(have.AuthInfos)+len(have.Clusters) != 0 {
		t.Errorf("left: %+v, %v", have, err)
	}
}

// TestTrust: a server is taken on trust only when that is asked for, and once.
func TestTrust(t *testing.T) {
	s := startSupervisor(t)
	kubeconfig := filepath.Join(t.TempDir(), "config")
	never := func() (string, error) {
		t.Error("asked for a password")
		return "", errors.New("not asked for")
	}
	o := s.options(kubeconfig)
	o.CAFile, o.Password = "", never
	if _, err := client.Login(t.Context(), o); !errdefs.IsPermissionDenied(err) {
		t.Errorf("unknown authority: %v", err)
	}
	o = s.options(kubeconfig)
	o.CAFile, o.Insecure = "", true
	r, err := client.Login(t.Context(), o)
	if err != nil || len(r.Fingerprint) != 64 {
		t.Fatalf("insecure: %+v, %v", r, err)
	}
	have, err := clientcmd.LoadFromFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	c := have.Clusters["atoll:"+s.addr]
	if ca, err := os.ReadFile(s.ca); err != nil || c.InsecureSkipTLSVerify || string(c.CertificateAuthorityData) != string(ca) {
		t.Errorf("cluster %+v, %v", c, err)
	}
	// Somebody else at that address is found out.
	other := startSupervisor(t)
	text, err := os.ReadFile(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(kubeconfig, []byte(strings.ReplaceAll(string(text), s.addr, other.addr)), 0o600); err != nil {
		t.Fatal(err)
	}
	o = other.options(kubeconfig)
	o.CAFile, o.Password = "", never
	if _, err := client.Login(t.Context(), o); !errdefs.IsPermissionDenied(err) {
		t.Errorf("another one at the address: %v", err)
	}
}

// TestNotALoginServer: what is no login server is told so, and a redirect does
// not lead a password astray.
func TestNotALoginServer(t *testing.T) {
	astray := httptest.NewTLSServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if _, _, ok := r.BasicAuth(); ok {
			t.Error("the password went to another server")
		}
	}))
	defer astray.Close()
	for name, handler := range map[string]http.HandlerFunc{
		"404": http.NotFound,
		"API": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"kind":"Status","message":"forbidden"}`)
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, astray.URL+r.URL.Path, http.StatusTemporaryRedirect)
		},
		"HTML": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
		"later HTML": func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == loginapi.LoginPath {
				fmt.Fprint(w, "<html>")
				return
			}
			fmt.Fprint(w, `{"keys":[{}]}`)
		},
		"empty": func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "{}") },
	} {
		srv := httptest.NewTLSServer(handler)
		o := client.Options{
			Server: srv.Listener.Addr().String(), User: "ada", Insecure: true, Kubeconfig: filepath.Join(t.TempDir(), "config"),
			Password: func() (string, error) { return "right", nil },
		}
		if _, err := client.Login(t.Context(), o); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "no supervisor's login server") {
			t.Errorf("%s: %v", name, err)
		}
		srv.Close()
	}
}
