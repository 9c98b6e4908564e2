package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	digest "github.com/opencontainers/go-digest"
)

func notAllowed(req *http.Request) error {
	return refuse(http.StatusMethodNotAllowed, "UNSUPPORTED", "%s is not supported here", req.Method)
}

func (r *Registry) manifest(w http.ResponseWriter, req *http.Request, name, ref string) error {
	switch req.Method {
	case http.MethodGet, http.MethodHead:
		l, err := r.readLink(name, ref)
		if err != nil {
			return err
		}
		f, err := os.Open(r.blobPath(l.Digest))
		if err != nil {
			return err
		}
		defer f.Close()
		w.Header().Set("Content-Type", l.MediaType)
		w.Header().Set("Docker-Content-Digest", l.Digest.String())
		http.ServeContent(w, req, "", time.Time{}, f)
		return nil
	case http.MethodPut:
		return r.putManifest(w, req, name, ref)
	case http.MethodDelete:
		path, err := r.linkPath(name, ref)
		if err != nil {
			return err
		}
		err = os.Remove(path)
		if errors.Is(err, os.ErrNotExist) {
			return refuse(http.StatusNotFound, "MANIFEST_UNKNOWN", "%s has no %s", name, ref)
		}
		if err == nil {
			w.WriteHeader(http.StatusAccepted)
		}
		return err
	}
	return notAllowed(req)
}

func (r *Registry) putManifest(w http.ResponseWriter, req *http.Request, name, ref string) error {
	data, err := io.ReadAll(io.LimitReader(req.Body, maxManifest+1))
	if err != nil {
		return err
	}
	if len(data) > maxManifest {
		return refuse(http.StatusRequestEntityTooLarge, "SIZE_INVALID", "a manifest may have %d bytes", maxManifest)
	}
	d := digest.FromBytes(data)
	if strings.Contains(ref, ":") && ref != d.String() {
		return refuse(http.StatusBadRequest, "DIGEST_INVALID", "the manifest is %s", d)
	}
	mediaType := req.Header.Get("Content-Type")
	if err := r.checkManifest(name, data); err != nil {
		return err
	}
	if err := r.putLinked(name, ref, mediaType, data); err != nil {
		return err
	}
	w.Header().Set("Location", "/v2/"+name+"/manifests/"+d.String())
	w.Header().Set("Docker-Content-Digest", d.String())
	w.WriteHeader(http.StatusCreated)
	return nil
}

// checkManifest refuses one whose parts were not pushed.
func (r *Registry) checkManifest(name string, data []byte) error {
	type part struct {
		Digest digest.Digest `json:"digest"`
		URLs   []string      `json:"urls"`
	}
	var m struct {
		Config    *part  `json:"config"`
		Layers    []part `json:"layers"`
		Manifests []part `json:"manifests"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return refuse(http.StatusBadRequest, "MANIFEST_INVALID", "%v", err)
	}
	parts := append(m.Layers, m.Manifests...)
	if m.Config != nil {
		parts = append(parts, *m.Config)
	}
	for _, p := range parts {
		d, err := parseDigest(p.Digest.String())
		if err != nil {
			return err
		}
		if _, err := os.Stat(r.blobPath(d)); err != nil && len(p.URLs) == 0 {
			return refuse(http.StatusBadRequest, "MANIFEST_BLOB_UNKNOWN", "%s was not pushed to %s", d, name)
		}
	}
	return nil
}

// putLinked keeps a manifest under its digest and ref.
func (r *Registry) putLinked(name, ref, mediaType string, data []byte) error {
	d := digest.FromBytes(data)
	if err := r.writeFile(r.blobPath(d), data); err != nil {
		return err
	}
	l := link{MediaType: mediaType, Digest: d, Size: int64(len(data))}
	if err := r.writeLink(name, d.String(), l); err != nil {
		return err
	}
	if ref == d.String() {
		return nil
	}
	return r.writeLink(name, ref, l)
}

func (r *Registry) blob(w http.ResponseWriter, req *http.Request, ref string) error {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		return notAllowed(req)
	}
	d, err := parseDigest(ref)
	if err != nil {
		return err
	}
	f, err := os.Open(r.blobPath(d))
	if errors.Is(err, os.ErrNotExist) {
		return refuse(http.StatusNotFound, "BLOB_UNKNOWN", "no blob %s", d)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Docker-Content-Digest", d.String())
	http.ServeContent(w, req, "", time.Time{}, f)
	return nil
}

func (r *Registry) upload(w http.ResponseWriter, req *http.Request, name, id string) error {
	if id == "" {
		if req.Method != http.MethodPost {
			return notAllowed(req)
		}
		return r.startUpload(w, req, name)
	}
	if _, err := uuid.Parse(id); err != nil {
		return refuse(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "no such upload")
	}
	f, err := os.OpenFile(filepath.Join(r.dir, "uploads", id), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return refuse(http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "no such upload")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	switch req.Method {
	case http.MethodGet:
		return uploadStatus(w, f, name, id, http.StatusNoContent)
	case http.MethodPatch:
		if err := receive(req, f); err != nil {
			return err
		}
		return uploadStatus(w, f, name, id, http.StatusAccepted)
	case http.MethodPut:
		if err := receive(req, f); err != nil {
			return err
		}
		return r.finishUpload(w, req, f, name)
	case http.MethodDelete:
		w.WriteHeader(http.StatusNoContent)
		return os.Remove(f.Name())
	}
	return notAllowed(req)
}

// startUpload also takes a whole blob at once (digest=) and finds one that is
// here already (mount=).
func (r *Registry) startUpload(w http.ResponseWriter, req *http.Request, name string) error {
	if mount := req.URL.Query().Get("mount"); mount != "" {
		d, err := parseDigest(mount)
		if err != nil {
			return err
		}
		if _, err := os.Stat(r.blobPath(d)); err == nil {
			return created(w, name, d)
		}
	}
	id := uuid.NewString()
	f, err := os.OpenFile(filepath.Join(r.dir, "uploads", id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if req.URL.Query().Get("digest") == "" {
		return uploadStatus(w, f, name, id, http.StatusAccepted)
	}
	if err := receive(req, f); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return r.finishUpload(w, req, f, name)
}

// receive appends the request's body; a Content-Range must go on where the
// upload ends.
func receive(req *http.Request, f *os.File) error {
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if cr := req.Header.Get("Content-Range"); cr != "" {
		from, _, _ := strings.Cut(strings.TrimPrefix(cr, "bytes "), "-")
		if n, err := strconv.ParseInt(from, 10, 64); err != nil || n != end {
			return refuse(http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", "the upload has %d bytes", end)
		}
	}
	_, err = io.Copy(f, req.Body)
	return err
}

func uploadStatus(w http.ResponseWriter, f *os.File, name, id string, status int) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v2/"+name+"/blobs/uploads/"+id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(fi.Size()-1, 0)))
	w.Header().Set("Docker-Upload-Uuid", id)
	w.WriteHeader(status)
	return nil
}

// finishUpload makes an upload a blob, if it is what the request says.
func (r *Registry) finishUpload(w http.ResponseWriter, req *http.Request, f *os.File, name string) error {
	defer os.Remove(f.Name()) // gone already if all went well
	want, err := parseDigest(req.URL.Query().Get("digest"))
	if err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	got, err := digest.FromReader(f)
	if err != nil {
		return err
	}
	if got != want {
		return refuse(http.StatusBadRequest, "DIGEST_INVALID", "the upload is %s, not %s", got, want)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), r.blobPath(want)); err != nil {
		return err
	}
	return created(w, name, want)
}

func created(w http.ResponseWriter, name string, d digest.Digest) error {
	w.Header().Set("Location", "/v2/"+name+"/blobs/"+d.String())
	w.Header().Set("Docker-Content-Digest", d.String())
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (r *Registry) tags(w http.ResponseWriter, req *http.Request, name string) error {
	if req.Method != http.MethodGet {
		return notAllowed(req)
	}
	repo := filepath.Join(r.dir, "repos", filepath.FromSlash(name))
	if _, err := os.Stat(filepath.Join(repo, digestsDir)); err != nil {
		return errUnknownName
	}
	entries, err := os.ReadDir(filepath.Join(repo, tagsDir))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	tags := []string{}
	for _, e := range entries {
		tags = append(tags, e.Name())
	}
	tags = page(w, req, tags)
	return writeJSON(w, map[string]any{"name": name, "tags": tags})
}

func (r *Registry) catalog(w http.ResponseWriter, req *http.Request) error {
	if req.Method != http.MethodGet {
		return notAllowed(req)
	}
	root := filepath.Join(r.dir, "repos")
	repos := []string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		switch d.Name() {
		case digestsDir:
			rel, err := filepath.Rel(root, filepath.Dir(path))
			if err != nil {
				return err
			}
			repos = append(repos, filepath.ToSlash(rel))
			return fs.SkipDir
		case tagsDir:
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return err
	}
	return writeJSON(w, map[string]any{"repositories": page(w, req, repos)})
}

// page cuts a list as n= and last= of the request say, and links to the rest.
func page(w http.ResponseWriter, req *http.Request, list []string) []string {
	slices.Sort(list)
	q := req.URL.Query()
	if last := q.Get("last"); last != "" {
		i, found := slices.BinarySearch(list, last)
		if found {
			i++
		}
		list = list[i:]
	}
	if n, err := strconv.Atoi(q.Get("n")); err == nil && n >= 0 && n < len(list) {
		list = list[:n]
		if n > 0 {
			next := url.Values{"n": {q.Get("n")}, "last": {list[n-1]}}
			w.Header().Set("Link", fmt.Sprintf("<%s?%s>; rel=\"next\"", req.URL.Path, next.Encode()))
		}
	}
	return list
}

func writeJSON(w http.ResponseWriter, v any) error {
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(v); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	_, err := w.Write(b.Bytes())
	return err
}
