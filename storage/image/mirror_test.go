package image

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/openatoll/atoll/storage"
)

// A mirror that asks for a password is passed by, and never shown the
// registry's.
func TestMirrorsSeeNoCredentials(t *testing.T) {
	var asked, shown atomic.Int32
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		asked.Add(1)
		if req.Header.Get("Authorization") != "" {
			shown.Add(1)
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="mirror"`)
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer mirror.Close()
	for name, c := range map[string]struct {
		want string
		auth storage.Auth
	}{
		"password": {"Basic " + base64.StdEncoding.EncodeToString([]byte("ann:secret")), storage.Auth{Username: "ann", Password: "secret"}},
		"token":    {"Bearer ready-made", storage.Auth{RegistryToken: "ready-made"}},
	} {
		ref := serveImage(t, func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if req.Header.Get("Authorization") != c.want {
					w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
					w.WriteHeader(http.StatusUnauthorized)
					return
				}
				next.ServeHTTP(w, req)
			})
		}, build(t, layer(t, file{"a", name})))
		host, rest, _ := strings.Cut(ref, "/")
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "registry.example"), 0o755); err != nil {
			t.Fatal(err)
		}
		text := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+host, mirror.URL)
		if err := os.WriteFile(filepath.Join(dir, "registry.example", "hosts.toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s := newStore(t, Config{HostsDir: dir})
		if _, err := s.Pull(t.Context(), "registry.example/"+rest, &c.auth, nil); err != nil {
			t.Errorf("%s: Pull = %v", name, err)
		}
	}
	if asked.Load() == 0 || shown.Load() != 0 {
		t.Errorf("the mirror was asked %d times and shown credentials %d times", asked.Load(), shown.Load())
	}
}
