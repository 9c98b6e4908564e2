package image

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/erofs"
)

// nothingLeft checks that a failed pull left no content and no disk.
func nothingLeft(t *testing.T, s *Store) {
	t.Helper()
	for _, dir := range []string{"content/blobs/sha256", "content/ingest", "disks", "layers"} {
		left, err := os.ReadDir(filepath.Join(s.root, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if len(left) > 0 {
			t.Errorf("left in %s: %v", dir, left)
		}
	}
	if list, err := s.List(t.Context()); err != nil || len(list) > 0 {
		t.Errorf("List = %v, %v", list, err)
	}
}

// on answers requests whose path contains part, and passes on the others.
func on(part string, answer http.HandlerFunc) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if (req.Method == http.MethodGet || req.Method == http.MethodHead) && strings.Contains(req.URL.Path, part) {
				answer(w, req)
				return
			}
			next.ServeHTTP(w, req)
		})
	}
}

// rewrite changes the body of answers whose path contains part.
func rewrite(part string, change func([]byte) []byte) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method != http.MethodGet || !strings.Contains(req.URL.Path, part) {
				next.ServeHTTP(w, req)
				return
			}
			rec := httptest.NewRecorder()
			next.ServeHTTP(rec, req)
			for k, v := range rec.Header() {
				if k != "Content-Length" {
					w.Header()[k] = v
				}
			}
			w.WriteHeader(rec.Code)
			_, _ = w.Write(change(rec.Body.Bytes()))
		})
	}
}

func hang(_ http.ResponseWriter, req *http.Request) { <-req.Context().Done() }

func TestPullFromBadRegistries(t *testing.T) {
	img := build(t, layer(t, file{"a", strings.Repeat("content ", 1000)}))
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layerDigest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	manifestDigest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	blob, manifest := "/blobs/"+layerDigest.String(), "/manifests/"+manifestDigest.String()
	for what, c := range map[string]struct {
		wrap  func(http.Handler) http.Handler
		class func(error) bool
		says  string
	}{
		"never answers":     {on("/manifests/", hang), errdefs.IsUnavailable, "does not answer"},
		"layer never comes": {on(blob, hang), errdefs.IsUnavailable, "does not answer"},
		"layer stalls": {on(blob, func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Content-Length", "1000")
			w.Write([]byte("abc"))
			w.(http.Flusher).Flush()
			hang(w, req)
		}), errdefs.IsUnavailable, "does not answer"},
		"garbage": {on("/manifests/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>welcome</html>") }), errdefs.IsDataLoss, "not an image"},
		"garbage as manifest": {on("/manifests/", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			fmt.Fprint(w, "{{{{")
		}), errdefs.IsDataLoss, "not an image"},
		"endless manifest": {on("/manifests/", func(w http.ResponseWriter, req *http.Request) {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
			endless(w, req)
		}), errdefs.IsUnavailable, "does not work as one"},
		"not HTTP answers": {on("/manifests/", func(w http.ResponseWriter, _ *http.Request) {
			c, _, _ := w.(http.Hijacker).Hijack()
			c.Write([]byte("SSH-2.0-OpenSSH\r\n"))
			c.Close()
		}), errdefs.IsUnavailable, "does not work as one"},
		"hangs up":        {on("/manifests/", func(w http.ResponseWriter, _ *http.Request) { c, _, _ := w.(http.Hijacker).Hijack(); c.Close() }), errdefs.IsUnavailable, "does not work as one"},
		"401":             {on("/manifests/", status(401)), errdefs.IsPermissionDenied, "imagePullSecret"},
		"403":             {on("/manifests/", status(403)), errdefs.IsPermissionDenied, "imagePullSecret"},
		"404":             {on("/manifests/", status(404)), errdefs.IsNotFound, "does not exist"},
		"404 of a layer":  {on(blob, status(404)), errdefs.IsNotFound, "does not exist"},
		"429":             {on("/manifests/", status(429)), errdefs.IsUnavailable, "no more requests"},
		"500":             {on("/manifests/", status(500)), errdefs.IsUnavailable, "error of its own"},
		"500 of a layer":  {on(blob, status(503)), errdefs.IsUnavailable, "error of its own"},
		"418":             {on("/manifests/", status(418)), errdefs.IsUnavailable, "as no registry would"},
		"redirect loop":   {on(blob, func(w http.ResponseWriter, req *http.Request) { http.Redirect(w, req, req.URL.Path, http.StatusFound) }), errdefs.IsUnavailable, "10 redirects"},
		"truncated layer": {rewrite(blob, func(b []byte) []byte { return b[:len(b)/2] }), errdefs.IsDataLoss, "digest or size"},
		"corrupt layer":   {rewrite(blob, func(b []byte) []byte { b[len(b)-9] ^= 1; return b }), errdefs.IsDataLoss, "digest or size"},
		"longer layer":    {rewrite(blob, func(b []byte) []byte { return append(b, "more"...) }), errdefs.IsDataLoss, "digest or size"},
		"other manifest":  {rewrite(manifest, func(b []byte) []byte { return append(b, ' ') }), errdefs.IsDataLoss, "digest or size"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			ref := serveImage(t, c.wrap, img)
			s := newStore(t, Config{Timeouts: Timeouts{Connect: 300 * time.Millisecond, Header: 300 * time.Millisecond, Stall: 300 * time.Millisecond}})
			start := time.Now()
			_, err := s.Pull(t.Context(), ref, nil, nil)
			if err == nil || !c.class(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), ref) {
				t.Errorf("Pull = %v; want another class or that it names %s and says %q", err, ref, c.says)
			}
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
			nothingLeft(t, s)
		})
	}
}

func endless(w http.ResponseWriter, req *http.Request) {
	block := make([]byte, 1<<16)
	for range 1024 { // 64 MiB
		if _, err := w.Write(block); err != nil || req.Context().Err() != nil {
			return
		}
	}
}

func status(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if code == http.StatusUnauthorized {
			w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
		}
		w.WriteHeader(code)
	}
}

// serveImage pushes img to a registry, then puts wrap before it.
func serveImage(t *testing.T, wrap func(http.Handler) http.Handler, img v1.Image) string {
	t.Helper()
	var on atomic.Bool
	host := serve(t, func(h http.Handler) http.Handler {
		if wrap == nil {
			return h
		}
		bad := wrap(h)
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if on.Load() {
				bad.ServeHTTP(w, req)
			} else {
				h.ServeHTTP(w, req)
			}
		})
	})
	ref := host + "/team/app:v1"
	push(t, ref, img)
	on.Store(true)
	return ref
}

func TestPullFromNowhere(t *testing.T) {
	s := newStore(t, Config{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	for ref, says := range map[string]string{
		closed + "/x:1":            "refuses connections",
		"no-such-host.invalid/x:1": "has no address",
	} {
		if _, err := s.Pull(t.Context(), ref, nil, nil); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), says) {
			t.Errorf("Pull(%s) = %v; want ErrUnavailable that says %q", ref, err, says)
		}
	}
}

// A server that accepts connections and never says a word, as behind a
// firewall that swallows packets.
func TestPullFromSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := newStore(t, Config{Timeouts: Timeouts{Connect: 200 * time.Millisecond, Header: 200 * time.Millisecond, Stall: 200 * time.Millisecond}})
	start := time.Now()
	_, err = s.Pull(t.Context(), l.Addr().String()+"/x:1", nil, nil)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "does not answer") || time.Since(start) > 5*time.Second {
		t.Errorf("Pull = %v after %v", err, time.Since(start))
	}
}

func TestPullThroughHostsToml(t *testing.T) {
	img := build(t, layer(t, file{"a", "x"}))
	ref := serveImage(t, nil, img)
	host, _, _ := strings.Cut(ref, "/")
	dir := t.TempDir()
	hosts := func(text string) *Store {
		if err := os.MkdirAll(filepath.Join(dir, "registry.example"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "registry.example", "hosts.toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return newStore(t, Config{HostsDir: dir})
	}
	const name = "registry.example/team/app:v1"
	got, err := hosts(fmt.Sprintf("server = %q\n", "http://"+host)).Pull(t.Context(), name, nil, nil)
	if err != nil || got.Tags[0] != name {
		t.Errorf("Pull = %+v, %v", got, err)
	}
	if _, err := hosts("server = http://no-quotes\n").Pull(t.Context(), name, nil, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "hosts.toml") {
		t.Errorf("with a broken hosts.toml Pull = %v, want ErrFailedPrecondition that names it", err)
	}
	// TLS with a CA that only hosts.toml knows.
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		proxy(w, req, "http://"+host)
	}))
	defer srv.Close()
	if _, err := hosts(fmt.Sprintf("server = %q\n", srv.URL)).Pull(t.Context(), name, nil, nil); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "CA in hosts.toml") {
		t.Errorf("with an unknown CA Pull = %v", err)
	}
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, pemOf(srv.Certificate()), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := hosts(fmt.Sprintf("server = %q\nca = %q\n", srv.URL, ca)).Pull(t.Context(), name, nil, nil); err != nil {
		t.Errorf("with the CA Pull = %v", err)
	}
}

func proxy(w http.ResponseWriter, req *http.Request, to string) {
	out, err := http.NewRequestWithContext(req.Context(), req.Method, to+req.URL.Path, nil)
	if err != nil {
		return
	}
	out.Header = req.Header
	resp, err := http.DefaultTransport.RoundTrip(out)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for k, v := range resp.Header {
		w.Header()[k] = v
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body)
}

func TestCredentials(t *testing.T) {
	img := build(t, layer(t, file{"a", "x"}))
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret"))
	guard := func(ok func(*http.Request) bool, challenge func(*http.Request) string) func(http.Handler) http.Handler {
		return func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if req.URL.Path == "/token" {
					token(w, req)
					return
				}
				if !ok(req) {
					w.Header().Set("WWW-Authenticate", challenge(req))
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				next.ServeHTTP(w, req)
			})
		}
	}
	header := func(want string) func(*http.Request) bool {
		return func(req *http.Request) bool { return req.Header.Get("Authorization") == want }
	}
	basicChallenge := func(*http.Request) string { return `Basic realm="here"` }
	bearerChallenge := func(req *http.Request) string {
		return fmt.Sprintf(`Bearer realm="http://%s/token",service="test",scope="repository:team/app:pull"`, req.Host)
	}
	for what, c := range map[string]struct {
		wrap func(http.Handler) http.Handler
		good storage.Auth
	}{
		"basic":          {guard(header(basic), basicChallenge), storage.Auth{Username: "ann", Password: "secret"}},
		"token server":   {guard(header("Bearer for-ann"), bearerChallenge), storage.Auth{Username: "ann", Password: "secret"}},
		"identity token": {guard(header("Bearer for-identity"), bearerChallenge), storage.Auth{IdentityToken: "identity"}},
		"registry token": {guard(header("Bearer ready-made"), bearerChallenge), storage.Auth{RegistryToken: "ready-made"}},
	} {
		t.Run(what, func(t *testing.T) {
			ref := serveImage(t, c.wrap, img)
			s := newStore(t, Config{})
			for _, auth := range []*storage.Auth{nil, {Username: "ann", Password: "wrong"}, {RegistryToken: "wrong"}, {IdentityToken: "wrong"}} {
				if _, err := s.Pull(t.Context(), ref, auth, nil); !errdefs.IsPermissionDenied(err) || strings.Contains(err.Error(), "wrong") {
					t.Errorf("Pull with %+v = %v, want ErrPermissionDenied without the secret", auth, err)
				}
			}
			if _, err := s.Pull(t.Context(), ref, &c.good, nil); err != nil {
				t.Errorf("Pull = %v", err)
			}
			// What is here already is not for everybody.
			if _, err := s.Pull(t.Context(), ref, nil, nil); !errdefs.IsPermissionDenied(err) {
				t.Errorf("Pull without credentials of what is here = %v, want ErrPermissionDenied", err)
			}
		})
	}
}

func token(w http.ResponseWriter, req *http.Request) {
	_ = req.ParseForm()
	user, password, _ := req.BasicAuth()
	var token string
	switch {
	case user == "ann" && password == "secret", req.Form.Get("username") == "ann" && req.Form.Get("password") == "secret":
		token = "for-ann"
	case req.Form.Get("refresh_token") == "identity":
		token = "for-identity"
	default:
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]string{"token": token, "access_token": token})
}

// Credentials must not follow a redirect to somebody else.
func TestCredentialsStayWithTheRegistry(t *testing.T) {
	var seen atomic.Value
	seen.Store("")
	thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if auth := req.Header.Get("Authorization"); auth != "" {
			seen.Store(auth)
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="give me"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer thief.Close()
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret"))
	ref := serveImage(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Header.Get("Authorization") != basic {
				status(401)(w, req)
				return
			}
			if strings.Contains(req.URL.Path, "/blobs/") {
				http.Redirect(w, req, thief.URL+"/blob", http.StatusTemporaryRedirect)
				return
			}
			next.ServeHTTP(w, req)
		})
	}, build(t, layer(t, file{"a", "x"})))
	s := newStore(t, Config{})
	if _, err := s.Pull(t.Context(), ref, &storage.Auth{Username: "ann", Password: "secret"}, nil); err == nil {
		t.Error("the pull succeeded")
	}
	if got := seen.Load(); got != "" {
		t.Errorf("the other host was shown %q", got)
	}
}

func TestPlatforms(t *testing.T) {
	s := newStore(t, Config{})
	host := serve(t, nil)
	amd := build(t, layer(t, file{"a", "amd64"}))
	arm := buildFor(t, v1.Platform{OS: "linux", Architecture: "arm64"}, layer(t, file{"a", "arm64"}))
	index := func(tag string, images map[string]v1.Image) string {
		idx := v1.ImageIndex(empty.Index)
		for arch, img := range images {
			idx = mutate.AppendManifests(idx, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
		}
		ref := host + "/multi:" + tag
		r, err := name.ParseReference(ref, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.WriteIndex(r, idx); err != nil {
			t.Fatal(err)
		}
		return ref
	}
	img, err := s.Pull(t.Context(), index("both", map[string]v1.Image{"arm64": arm, "amd64": amd}), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := amd.ConfigName(); img.ID != want.String() {
		t.Errorf("ID %s, want the amd64 image's %s", img.ID, want)
	}
	if len(img.Digests) != 1 || strings.Contains(img.Digests[0], img.ID) {
		t.Errorf("digests %q, want the index's", img.Digests)
	}
	armRef := host + "/arm:1"
	push(t, armRef, arm)
	for _, ref := range []string{index("arm", map[string]v1.Image{"arm64": arm}), armRef} {
		if _, err := s.Pull(t.Context(), ref, nil, nil); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "no variant for linux/amd64") || !strings.Contains(err.Error(), "arm64") {
			t.Errorf("Pull(%s) = %v; want ErrNotFound that says what there is", ref, err)
		}
	}
}

func TestConcurrentPullsAreOne(t *testing.T) {
	var fetches atomic.Int32
	img := build(t, layer(t, file{"a", "x"}))
	layers, _ := img.Layers()
	d, _ := layers[0].Digest()
	release := make(chan struct{})
	ref := serveImage(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if strings.HasSuffix(req.URL.Path, d.String()) {
				fetches.Add(1)
				<-release
			}
			next.ServeHTTP(w, req)
		})
	}, img)
	s := newStore(t, Config{Timeouts: Timeouts{Connect: 5 * time.Second, Header: 20 * time.Second, Stall: 5 * time.Second}})
	impatient, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 5 {
		ctx := t.Context()
		if i == 0 {
			ctx = impatient
		}
		wg.Go(func() {
			_, err := s.Pull(ctx, ref, nil, nil)
			if i == 0 && !errors.Is(err, context.Canceled) || i > 0 && err != nil {
				t.Errorf("pull %d = %v", i, err)
			}
		})
	}
	for fetches.Load() == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	cancel() // one leaves, the others stay
	time.Sleep(50 * time.Millisecond)
	close(release)
	wg.Wait()
	if n := fetches.Load(); n != 1 {
		t.Errorf("the layer was fetched %d times", n)
	}
}

func TestPullCancelled(t *testing.T) {
	img := build(t, layer(t, file{"a", "x"}))
	layers, _ := img.Layers()
	d, _ := layers[0].Digest()
	started := make(chan struct{}, 1)
	ref := serveImage(t, on(d.String(), func(w http.ResponseWriter, req *http.Request) { started <- struct{}{}; hang(w, req) }), img)
	s := newStore(t, Config{Timeouts: Timeouts{Connect: time.Minute, Header: time.Minute, Stall: time.Minute}})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	if _, err := s.Pull(ctx, ref, nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Pull = %v", err)
	}
	s.pulling.Wait() // the pull itself ends a moment later
	nothingLeft(t, s)
}

func TestPullOnFullDisk(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("mounting needs root: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	host := serve(t, nil)
	fits, large := host+"/fits:1", host+"/large:1"
	push(t, fits, build(t, layer(t, file{"zeros", strings.Repeat("x", 12<<20)})))
	push(t, large, build(t, layer(t, file{"random", incompressible(9 << 20)})))
	s := newStore(t, Config{Root: root})
	for ref, what := range map[string]string{large: "its layers have", fits: "is full"} {
		if _, err := s.Pull(t.Context(), ref, nil, nil); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), root) || !strings.Contains(err.Error(), what) {
			t.Errorf("Pull(%s) = %v; want ErrResourceExhausted that names %s and says %q", ref, err, root, what)
		}
		nothingLeft(t, s)
	}
}

func TestPullOfHostileImages(t *testing.T) {
	s := newStore(t, Config{Limits: erofs.Limits{Bytes: 1 << 20, Layers: 3}})
	host := serve(t, nil)
	for tag, c := range map[string]struct {
		img  v1.Image
		says string
	}{
		"bomb":   {build(t, layer(t, file{"zeros", strings.Repeat("\x00", 4<<20)})), "unpacks to more than 1 MiB"},
		"layers": {build(t, layer(t, file{"a", ""}), layer(t, file{"b", ""}), layer(t, file{"c", ""}), layer(t, file{"d", ""})), "4 layers"},
	} {
		ref := host + "/hostile:" + tag
		push(t, ref, c.img)
		if _, err := s.Pull(t.Context(), ref, nil, nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("Pull(%s) = %v; want ErrFailedPrecondition that says %q", ref, err, c.says)
		}
		nothingLeft(t, s)
	}
	// An image without layers is an empty tree.
	ref := host + "/hostile:none"
	push(t, ref, build(t))
	img, err := s.Pull(t.Context(), ref, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Disk(t.Context(), img.ID, "pod"); err != nil {
		t.Error(err)
	}
}

func incompressible(n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(b)
	return string(b)
}

func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}
