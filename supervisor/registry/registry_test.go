package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	digest "github.com/opencontainers/go-digest"
)

func open(t *testing.T, dir string) (*Registry, string) {
	t.Helper()
	r, err := Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	return r, strings.TrimPrefix(srv.URL, "http://")
}

func ref(t *testing.T, s string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(s, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func image(t *testing.T) v1.Image {
	t.Helper()
	img, err := random.Image(10000, 3)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestPushAndPull(t *testing.T) {
	dir := t.TempDir()
	_, host := open(t, dir)
	img := image(t)
	if err := remote.Write(ref(t, host+"/team/app:v1"), img); err != nil {
		t.Fatal(err)
	}
	idx := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})
	if err := remote.WriteIndex(ref(t, host+"/team/multi:v2"), idx); err != nil {
		t.Fatal(err)
	}
	// Another process finds it all.
	_, host = open(t, dir)
	got, err := remote.Image(ref(t, host+"/team/app:v1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(got); err != nil {
		t.Error(err)
	}
	want, _ := img.Digest()
	if d, _ := got.Digest(); d != want {
		t.Errorf("digest %s, want %s", d, want)
	}
	if _, err := remote.Image(ref(t, host+"/team/app@"+want.String())); err != nil {
		t.Errorf("by digest: %v", err)
	}
	gotIdx, err := remote.Index(ref(t, host+"/team/multi:v2"))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(gotIdx); err != nil {
		t.Error(err)
	}
	repo, _ := name.NewRepository(host+"/team/app", name.Insecure)
	if tags, err := remote.List(repo); err != nil || len(tags) != 1 || tags[0] != "v1" {
		t.Errorf("tags %v, %v", tags, err)
	}
	reg, _ := name.NewRegistry(host, name.Insecure)
	if repos, err := remote.Catalog(t.Context(), reg); err != nil || fmt.Sprint(repos) != "[team/app team/multi]" {
		t.Errorf("catalog %v, %v", repos, err)
	}
	if err := remote.Delete(ref(t, host+"/team/app:v1")); err != nil {
		t.Error(err)
	}
	if _, err := remote.Image(ref(t, host+"/team/app:v1")); err == nil {
		t.Error("the deleted tag is still there")
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "uploads")); len(left) > 0 {
		t.Errorf("left in uploads: %v", left)
	}
}

func TestRequests(t *testing.T) {
	_, host := open(t, t.TempDir())
	body := []byte("a blob of some length")
	sum := digest.FromBytes(body)
	do := func(method, path, header string, body []byte) *http.Response {
		t.Helper()
		if !strings.HasPrefix(path, "http") {
			path = "http://" + host + path
		}
		req, err := http.NewRequestWithContext(t.Context(), method, path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if k, v, ok := strings.Cut(header, ": "); ok {
			req.Header.Set(k, v)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		data, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		resp.Body = io.NopCloser(bytes.NewReader(data))
		return resp
	}
	for _, c := range []struct {
		method, path, header string
		body                 string
		want                 int
	}{
		{"GET", "/v2/", "", "", 200},
		{"GET", "/", "", "", 404},
		{"GET", "/v2/x/manifests/none", "", "", 404},
		{"GET", "/v2/x/manifests/bad tag", "", "", 400},
		{"GET", "/v2/x/manifests/sha256:12", "", "", 400},
		{"GET", "/v2/x/blobs/" + sum.String(), "", "", 404},
		{"GET", "/v2/x/blobs/sha256:..%2f..%2f", "", "", 404},
		{"GET", "/v2/..%2f..%2fetc/manifests/x", "", "", 404},
		{"GET", "/v2/UPPER/manifests/x", "", "", 404},
		{"PUT", "/v2/x/manifests/v1", "", "{", 400},
		{"PUT", "/v2/x/manifests/v1", "", `{"layers":[{"digest":"` + sum.String() + `"}]}`, 400},
		{"PUT", "/v2/x/manifests/" + sum.String(), "", `{}`, 400},
		{"PUT", "/v2/x/manifests/large", "", strings.Repeat(" ", maxManifest+1), 413},
		{"POST", "/v2/x/blobs/uploads/?digest=sha256:" + strings.Repeat("0", 64), "", "not that", 400},
		{"POST", "/v2/x/blobs/uploads/?digest=" + sum.String(), "", string(body), 201},
		{"POST", "/v2/y/blobs/uploads/?from=x&mount=" + sum.String(), "", "", 201},
		{"HEAD", "/v2/x/blobs/" + sum.String(), "", "", 200},
		{"GET", "/v2/x/blobs/" + sum.String(), "Range: bytes=2-5", "", 206},
		{"DELETE", "/v2/x/blobs/" + sum.String(), "", "", 405},
		{"PATCH", "/v2/x/blobs/uploads/../../x", "", "", 404},
		{"PATCH", "/v2/x/blobs/uploads/00000000-0000-0000-0000-000000000000", "", "", 404},
		{"GET", "/v2/none/tags/list", "", "", 404},
		{"PUT", "/v2/_catalog", "", "", 405},
	} {
		if resp := do(c.method, c.path, c.header, []byte(c.body)); resp.StatusCode != c.want {
			t.Errorf("%s %s = %s, want %d", c.method, c.path, resp.Status, c.want)
		}
	}
	// An upload in pieces.
	resp := do("POST", "/v2/x/blobs/uploads/", "", nil)
	at := "http://" + host + resp.Header.Get("Location")
	other := []byte("in two pieces")
	do("PATCH", at, "Content-Range: 0-4", other[:5])
	if resp := do("PATCH", at, "Content-Range: 9-9", other[9:]); resp.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("a piece out of order = %s", resp.Status)
	}
	if resp := do("GET", at, "", nil); resp.Header.Get("Range") != "0-4" {
		t.Errorf("status of the upload: %s, range %q", resp.Status, resp.Header.Get("Range"))
	}
	if resp := do("PUT", at+"?digest="+digest.FromBytes(other).String(), "", other[5:]); resp.StatusCode != http.StatusCreated {
		t.Errorf("the end of the upload = %s", resp.Status)
	}
}

func TestSeedAndServe(t *testing.T) {
	img := image(t)
	from := t.TempDir()
	path, err := layout.Write(from, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "atoll.local/web:latest"})); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	config := Config{Dir: t.TempDir(), Listener: l, Seeds: []string{from}, Logger: slog.New(slog.DiscardHandler)}
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, config) }()
	got, err := remote.Image(ref(t, l.Addr().String()+"/web:latest"))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(got); err != nil {
		t.Error(err)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("Serve = %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("Serve did not end")
	}
	l, err = net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := Serve(t.Context(), Config{Dir: t.TempDir(), Listener: l, Seeds: []string{"/no/such/layout"}}); err == nil || !strings.Contains(err.Error(), "/no/such/layout") {
		t.Errorf("Serve with a missing layout = %v", err)
	}
}

func TestWriteHosts(t *testing.T) {
	dir := t.TempDir()
	for name, want := range map[string]string{"atoll.local": "atoll.local", "reg:5000": "reg_5000_"} {
		if err := WriteHosts(dir, name, "http://127.0.0.1:1"); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join(dir, want, "hosts.toml"))
		if err != nil || !strings.Contains(string(data), `server = "http://127.0.0.1:1"`) {
			t.Errorf("hosts.toml of %s: %q, %v", name, data, err)
		}
	}
	for _, bad := range []string{"", "../x", "a/b", ".hidden"} {
		if err := WriteHosts(dir, bad, "http://x"); err == nil {
			t.Errorf("WriteHosts(%q) succeeds", bad)
		}
	}
}
