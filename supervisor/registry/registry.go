// Package registry is a small OCI distribution registry for one machine:
// pull and push, kept on disk, without accounts. `atoll up` serves the demo
// images from it on loopback; users push their own to it.
//
// It is our own because go-containerregistry's, made for tests, keeps
// manifests and whole uploads in memory and digests a blob anew for each
// request.
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
)

// Config of Serve.
type Config struct {
	// Dir keeps blobs, repositories and uploads; made if need be. Required.
	Dir string
	// Listener is where to serve; Serve closes it. It should be on loopback:
	// everybody who reaches it may push.
	Listener net.Listener
	// Seeds are OCI layouts whose images are offered too; see Seed.
	Seeds []string
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// Serve runs a registry until ctx ends; then it returns nil, after requests
// under way got 5 s to end.
func Serve(ctx context.Context, cfg Config) error {
	defer cfg.Listener.Close()
	log := cfg.Logger
	if log == nil {
		log = slog.Default()
	}
	reg, err := Open(cfg.Dir, log)
	if err != nil {
		return err
	}
	for _, layout := range cfg.Seeds {
		if err := reg.Seed(ctx, layout); err != nil {
			return err
		}
	}
	// No limit on a whole request: layers may be large.
	srv := &http.Server{Handler: reg, ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
		stopped <- nil
	}()
	if err := srv.Serve(cfg.Listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("registry on %s: %w", cfg.Listener.Addr(), err)
	}
	return <-stopped
}

// A Registry serves the distribution API from a directory:
//
//	blobs/sha256/<hex>                   every blob and manifest
//	repos/<repository>/_manifests/<hex>  a link (JSON)
//	repos/<repository>/_tags/<tag>       a link
//	uploads/<id>                         uploads under way
//
// Links are replaced by renaming, blobs are never changed, so a process that
// dies leaves at worst uploads, which Open erases. Blobs belong to all
// repositories and are never collected.
type Registry struct {
	dir string
	log *slog.Logger
}

// A link is what a tag or digest of a repository stands for.
type link struct {
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
}

const (
	maxManifest = 4 << 20
	tagsDir     = "_tags"
	digestsDir  = "_manifests"
)

// Open opens the registry in dir, or makes one.
func Open(dir string, log *slog.Logger) (*Registry, error) {
	r := &Registry{dir: dir, log: log}
	if err := os.RemoveAll(filepath.Join(dir, "uploads")); err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	for _, sub := range []string{"blobs/sha256", "repos", "uploads"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fmt.Errorf("registry: %w", err)
		}
	}
	return r, nil
}

// An apiError is an answer of the distribution API.
type apiError struct {
	status        int
	code, message string
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

var errUnknownName = &apiError{http.StatusNotFound, "NAME_UNKNOWN", "no such repository"}

func refuse(status int, code, format string, args ...any) error {
	return &apiError{status, code, fmt.Sprintf(format, args...)}
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	err := r.route(w, req)
	if err == nil {
		return
	}
	var api *apiError
	if !errors.As(err, &api) {
		r.log.Error("registry cannot answer", "method", req.Method, "path", req.URL.Path, "error", err)
		api = &apiError{http.StatusInternalServerError, "UNKNOWN", "the registry has an error of its own: see its log"}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(api.status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []map[string]string{{"code": api.code, "message": api.message}}})
}

// namePattern is the distribution specification's, for a repository.
var namePattern = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)

var tagPattern = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)

// route finds the kind of request: /v2/<name>/<kind>/<rest>, where the name
// may have slashes, so the kind is looked for from the end.
func (r *Registry) route(w http.ResponseWriter, req *http.Request) error {
	path, ok := strings.CutPrefix(req.URL.Path, "/v2/")
	switch {
	case req.URL.Path == "/v2", ok && path == "":
		return nil
	case !ok:
		return refuse(http.StatusNotFound, "UNSUPPORTED", "the API is below /v2/")
	case path == "_catalog":
		return r.catalog(w, req)
	}
	parts := strings.Split(path, "/")
	for i := len(parts) - 2; i > 0; i-- {
		name, rest := strings.Join(parts[:i], "/"), parts[i+1:]
		if len(name) > 255 || !namePattern.MatchString(name) {
			continue
		}
		switch {
		case parts[i] == "manifests" && len(rest) == 1:
			return r.manifest(w, req, name, rest[0])
		case parts[i] == "tags" && len(rest) == 1 && rest[0] == "list":
			return r.tags(w, req, name)
		case parts[i] == "blobs" && rest[0] == "uploads" && len(rest) <= 2:
			return r.upload(w, req, name, strings.Join(rest[1:], ""))
		case parts[i] == "blobs" && len(rest) == 1:
			return r.blob(w, req, rest[0])
		}
	}
	return refuse(http.StatusNotFound, "NAME_INVALID", "no request of the distribution API: %.200s", req.URL.Path)
}

func (r *Registry) blobPath(d digest.Digest) string {
	return filepath.Join(r.dir, "blobs", "sha256", d.Encoded())
}

// parseDigest accepts sha256 only: the path of a blob is made from it.
func parseDigest(s string) (digest.Digest, error) {
	d := digest.Digest(s)
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return "", refuse(http.StatusBadRequest, "DIGEST_INVALID", "%.100q is no sha256 digest", s)
	}
	return d, nil
}

// linkPath is where a tag or digest of a repository is.
func (r *Registry) linkPath(name, ref string) (string, error) {
	repo := filepath.Join(r.dir, "repos", filepath.FromSlash(name))
	if strings.Contains(ref, ":") {
		d, err := parseDigest(ref)
		if err != nil {
			return "", err
		}
		return filepath.Join(repo, digestsDir, d.Encoded()), nil
	}
	if !tagPattern.MatchString(ref) {
		return "", refuse(http.StatusBadRequest, "TAG_INVALID", "%.150q is no tag", ref)
	}
	return filepath.Join(repo, tagsDir, ref), nil
}

func (r *Registry) readLink(name, ref string) (link, error) {
	var l link
	path, err := r.linkPath(name, ref)
	if err != nil {
		return l, err
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return l, refuse(http.StatusNotFound, "MANIFEST_UNKNOWN", "%s has no %s", name, ref)
	}
	if err != nil {
		return l, err
	}
	return l, json.Unmarshal(data, &l)
}

func (r *Registry) writeLink(name, ref string, l link) error {
	path, err := r.linkPath(name, ref)
	if err != nil {
		return err
	}
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return r.writeFile(path, data)
}

// writeFile replaces path as a whole.
func (r *Registry) writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Join(r.dir, "uploads"), "link-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// repository strips the registry's name of a reference: the registry itself
// does not know under which it is reached.
func repository(ref string) (name, tag string, err error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", "", fmt.Errorf("%.200q: %w", ref, err)
	}
	tagged, ok := named.(reference.Tagged)
	if !ok {
		return "", "", fmt.Errorf("%.200q has no tag", ref)
	}
	return reference.Path(named), tagged.Tag(), nil
}
