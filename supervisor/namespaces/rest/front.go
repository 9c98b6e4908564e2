package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/internal/vsphere"
)

const (
	sessionHeader = "vmware-api-session-id"
	apiSession    = "/api/session"
	oldSession    = "/rest/com/vmware/cis/session"

	// whoTimeout is for the question whose a session is, maxWho for the answer.
	whoTimeout = 20 * time.Second
	maxWho     = 64 << 10
)

// A Target is the vCenter that a Front stands in front of.
type Target struct {
	Address    string // host or host:port
	CA         []byte // PEM; nil: the host's authorities
	Thumbprint string // SHA-256 of its certificate, in place of CA
	// Credentials of the supervisor there, asked at each login.
	Credentials func(context.Context) (user, password string, err error)
	// Serves says that it serves the calls of Routes itself.
	Serves bool
}

// same is true where a connection that was made for one is one for the other.
func (t Target) same(o Target) bool {
	return t.Address == o.Address && bytes.Equal(t.CA, o.CA) && t.Thumbprint == o.Thumbprint && t.Serves == o.Serves
}

// A Front serves the calls of Routes in front of a vCenter that knows nothing of
// them, and passes what else clients of vSphere need on to it: SOAP, storage
// policies, the token service, REST and with it the sessions. So a client that
// is pointed here in place of vCenter finds both, and vCenter alone judges
// passwords. It is safe for concurrent use.
type Front struct {
	// target says which; asked at each request, it answers from a cache.
	target  func(context.Context) (Target, error)
	handler *Handler
	log     *slog.Logger

	mu   sync.Mutex
	have *remote
}

// A remote is one vCenter.
type remote struct {
	target  Target
	session *vsphere.Session // the supervisor's own
	url     url.URL
	http    *http.Client
	proxy   *httputil.ReverseProxy
}

// NewFront makes no call. o.VCenter is not looked at.
func NewFront(o Options, target func(context.Context) (Target, error)) *Front {
	f := &Front{target: target, log: o.Logger}
	if f.log == nil {
		f.log = slog.Default()
	}
	o.VCenter = f
	f.handler = New(o)
	return f
}

// passedOn are the paths of vCenter that a Front has.
func passedOn(path string) bool {
	for _, p := range []string{"/sdk", "/pbm", "/sts", "/api", "/rest"} {
		if path == p || strings.HasPrefix(path, p+"/") {
			return true
		}
	}
	return false
}

// own tells the paths of Patterns.
func own(path string) bool {
	for _, p := range Patterns() {
		if path == p || strings.HasSuffix(p, "/") && strings.HasPrefix(path, p) {
			return true
		}
	}
	return false
}

// ServeHTTP answers what is the Handler's and passes the rest on.
func (f *Front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v, err := f.vcenter(r.Context())
	switch {
	case err != nil:
		writeFault(w, err)
	case v.target.Serves:
		writeFault(w, problemf(errOperationNotFound, "vCenter %s serves this itself: ask there.", v.target.Address))
	case own(r.URL.Path):
		f.handler.ServeHTTP(w, r)
	case passedOn(r.URL.Path):
		v.proxy.ServeHTTP(w, r)
	default:
		noRoute(w, r)
	}
}

// vcenter is the one of now.
func (f *Front) vcenter(ctx context.Context) (*remote, error) {
	t, err := f.target(ctx)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.have != nil && f.have.target.same(t) {
		return f.have, nil
	}
	v := &remote{target: t}
	// The Secret may be another one by now.
	credentials := func(ctx context.Context) (string, string, error) {
		now, err := f.target(ctx)
		if err != nil {
			return "", "", err
		}
		return now.Credentials(ctx)
	}
	if v.session, err = vsphere.NewSession(vsphere.Config{Address: t.Address, CA: t.CA, Thumbprint: t.Thumbprint, Credentials: credentials, UserAgent: "atoll/vsphere-rest"}); err != nil {
		return nil, err
	}
	v.url = url.URL{Scheme: "https", Host: v.session.Address()}
	transport := v.session.Client().DefaultTransport()
	v.http = &http.Client{Transport: transport, Timeout: whoTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	v.proxy = &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(&v.url)
			p.SetXForwarded()
		},
		Transport:     transport,
		FlushInterval: -1, // a watch's answer is not held back
		ErrorLog:      slog.NewLogLogger(f.log.Handler(), slog.LevelDebug),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() == nil {
				f.log.Warn("vCenter does not answer a call that was passed on", "vcenter", t.Address, "path", r.URL.Path, "err", err)
			}
			writeFault(w, problemf(errdefs.ErrUnavailable, "vCenter %s does not answer: try again in a moment.", t.Address))
		},
	}
	f.have = v
	return v, nil
}

// Caller asks vCenter whose the session is.
func (f *Front) Caller(r *http.Request) (string, error) {
	id := sessionOf(r)
	if id == "" {
		return "", errNoSession
	}
	v, err := f.vcenter(r.Context())
	if err != nil {
		return "", err
	}
	user, err := v.whose(r.Context(), http.MethodGet, apiSession, id)
	if errdefs.IsNotFound(err) { // before vSphere 7.0.2
		user, err = v.whose(r.Context(), http.MethodPost, oldSession+"?~action=get", id)
	}
	if err != nil {
		return "", err
	}
	who, err := sso.Parse(user, "")
	if err != nil {
		return "", problemf(errdefs.ErrUnavailable, "vCenter says that the session is of %q, which is no name of a user.", user)
	}
	return who.String(), nil
}

func sessionOf(r *http.Request) string {
	if id := r.Header.Get(sessionHeader); id != "" {
		return id
	}
	if c, err := r.Cookie(sessionHeader); err == nil {
		return c.Value
	}
	return ""
}

// whose is ErrNotFound where the vCenter has no such call.
func (v *remote) whose(ctx context.Context, method, path, id string) (string, error) {
	silent := func(why any) error {
		return problemf(errdefs.ErrUnavailable, "vCenter %s does not say whose the session is (%v): try again in a moment.", v.target.Address, why)
	}
	req, err := http.NewRequestWithContext(ctx, method, v.url.String()+path, nil)
	if err != nil {
		return "", errNoSession // an id that no header can hold
	}
	req.Header.Set(sessionHeader, id)
	res, err := v.http.Do(req)
	if err != nil {
		var cause *url.Error
		if errors.As(err, &cause) {
			err = cause.Err
		}
		return "", silent(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxWho))
	switch {
	case err != nil:
		return "", silent(err)
	case res.StatusCode == http.StatusUnauthorized:
		return "", errNoSession
	case res.StatusCode == http.StatusNotFound:
		return "", fmt.Errorf("%s: %w", path, errdefs.ErrNotFound)
	case res.StatusCode != http.StatusOK:
		return "", silent(res.Status)
	}
	var answer struct {
		User  string `json:"user"`
		Value struct {
			User string `json:"user"`
		} `json:"value"`
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return "", silent("its answer is no JSON")
	}
	if answer.User == "" {
		answer.User = answer.Value.User // the form of /rest
	}
	if answer.User == "" {
		return "", silent("its answer names nobody")
	}
	return answer.User, nil
}

// Allowed asks vCenter, as the supervisor.
func (f *Front) Allowed(ctx context.Context, user, privilege string, entities []Entity) ([]bool, error) {
	if len(entities) == 0 {
		return nil, nil
	}
	v, err := f.vcenter(ctx)
	if err != nil {
		return nil, err
	}
	allowed, err := v.allowed(ctx, user, privilege, entities)
	if err == nil || errdefs.IsNotFound(err) || errdefs.IsUnavailable(err) || ctx.Err() != nil {
		return allowed, err
	}
	return nil, problemf(errdefs.ErrUnavailable, "vCenter does not tell the supervisor what user %s may do: %v.", user, err)
}

func (v *remote) allowed(ctx context.Context, user, privilege string, entities []Entity) ([]bool, error) {
	if err := v.session.Login(ctx); err != nil {
		return nil, err
	}
	content := v.session.Client().ServiceContent
	if content.AuthorizationManager == nil {
		return nil, problemf(errdefs.ErrUnavailable, "vCenter %s has no AuthorizationManager: give the Supervisor the address of a vCenter.", v.target.Address)
	}
	req := types.HasUserPrivilegeOnEntities{This: *content.AuthorizationManager, UserName: user, PrivId: []string{privilege}}
	for _, e := range entities {
		ref := types.ManagedObjectReference{Type: e.Kind, Value: e.ID}
		if e == Root {
			ref = content.RootFolder
		}
		req.Entities = append(req.Entities, ref)
	}
	res, err := methods.HasUserPrivilegeOnEntities(ctx, v.session, &req)
	if err != nil {
		return nil, vsphere.Error("privileges of user "+user, err)
	}
	granted := map[types.ManagedObjectReference]bool{}
	for _, e := range res.Returnval {
		for _, p := range e.PrivAvailability {
			if p.PrivId == privilege && p.IsGranted {
				granted[plain(e.Entity)] = true
			}
		}
	}
	allowed := make([]bool, len(entities))
	for i, ref := range req.Entities {
		allowed[i] = granted[ref]
	}
	return allowed, nil
}

// plain leaves the vCenter's id out, which its answers may have.
func plain(ref types.ManagedObjectReference) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: ref.Type, Value: ref.Value}
}
