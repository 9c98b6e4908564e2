package e2e

import (
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/rogpeppe/go-internal/testscript"
)

// Sizes in bytes of the images small and large: noise, so that no compression
// makes them smaller and no store has them already.
const (
	smallImage = 64 << 10
	largeImage = 144 << 20 // more than the whole disk of twonodes.txt's second node
)

// cmdRegistry serves the demo images until the script ends, and sets
// $REGISTRY to where and $DIGEST to busybox's digest:
//
//	registry 127.0.0.1
//
// What stands before an image's name says how its repository behaves:
//
//	busybox           well
//	private/busybox   only with ann's password, s3cret
//	closed/busybox    never: whatever the password
//	nonsense/busybox  as a web server that is no registry
//	silent/busybox    takes connections and never answers
//	corrupt/small     sends layers in which a byte is wrong
//
// Images that no node can have yet are small and large.
func cmdRegistry(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: registry ADDRESS")
	}
	ln, err := net.Listen("tcp4", net.JoinHostPort(args[0], "0"))
	ts.Check(err)
	good := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	srv := httptest.NewUnstartedServer(&moodyRegistry{good})
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	ts.Defer(func() {
		srv.CloseClientConnections() // of those that wait for the silent one
		srv.Close()
	})
	host := ln.Addr().String()
	ts.Setenv("REGISTRY", host)
	images, err := layout.ImageIndexFromPath(filepath.Join(ts.Getenv("ROOT"), "build", "images"))
	ts.Check(err)
	manifest, err := images.IndexManifest()
	ts.Check(err)
	push := func(repo string, img v1.Image) {
		ref, err := name.ParseReference(host+"/"+repo, name.Insecure)
		ts.Check(err)
		ts.Check(remote.Write(ref, img))
	}
	for _, m := range manifest.Manifests {
		repo, _, _ := strings.Cut(filepath.Base(m.Annotations["org.opencontainers.image.ref.name"]), ":")
		img, err := images.Image(m.Digest)
		ts.Check(err)
		push(repo, img)
		if repo == "busybox" {
			ts.Setenv("DIGEST", m.Digest.String())
		}
	}
	for repo, size := range map[string]int64{"small": smallImage, "large": largeImage} {
		noise, err := random.Image(size, 1)
		ts.Check(err)
		push(repo, noise)
	}
}

// A moodyRegistry is a registry that misbehaves where it is asked to.
type moodyRegistry struct{ good http.Handler }

func (r *moodyRegistry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	mood, rest, _ := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v2/"), "/")
	inner := req.Clone(req.Context())
	inner.URL.Path = "/v2/" + rest
	switch mood {
	case "private":
		user, password, _ := req.BasicAuth()
		if user != "ann" || password != "s3cret" {
			challenge(w)
			return
		}
		r.good.ServeHTTP(w, inner)
	case "closed":
		challenge(w)
	case "nonsense":
		w.Header().Set("Content-Type", "text/html")
		_, _ = io.WriteString(w, "<html><body>It works!</body></html>")
	case "silent":
		<-req.Context().Done()
	case "corrupt":
		r.corrupt(w, inner)
	default:
		r.good.ServeHTTP(w, req)
	}
}

func challenge(w http.ResponseWriter) {
	w.Header().Set("WWW-Authenticate", `Basic realm="the test's registry"`)
	w.WriteHeader(http.StatusUnauthorized)
}

// corrupt changes a byte in the middle of each layer; manifests and image
// configurations, which are JSON, are left alone.
func (r *moodyRegistry) corrupt(w http.ResponseWriter, req *http.Request) {
	rec := httptest.NewRecorder()
	req.Header.Del("Range")
	r.good.ServeHTTP(rec, req)
	body := rec.Body.Bytes()
	if strings.Contains(req.URL.Path, "/blobs/") && len(body) > 0 && body[0] != '{' {
		body[len(body)/2] ^= 0xff
	}
	for k, v := range rec.Header() {
		w.Header()[k] = v
	}
	if req.Method != http.MethodHead {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	}
	w.WriteHeader(rec.Code)
	_, _ = w.Write(body)
}
