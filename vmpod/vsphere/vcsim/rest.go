package vcsim

import (
	"crypto/rand"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

const (
	sessionHeader = "vmware-api-session-id"
	restSession   = "/rest/com/vmware/cis/session"
	apiSession    = "/api/session"
)

// tokens are the sessions of REST.
type tokens struct {
	mu   sync.Mutex
	live map[string]*token
}

type token struct {
	user          string // Identity.Name
	created, used time.Time
}

func (t *tokens) add(user string, now time.Time) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live == nil {
		t.live = map[string]*token{}
	}
	oldest := ""
	for id, x := range t.live {
		if now.Sub(x.used) > sessionIdle {
			delete(t.live, id)
		} else if oldest == "" || x.used.Before(t.live[oldest].used) {
			oldest = id
		}
	}
	if len(t.live) >= maxSessions {
		delete(t.live, oldest)
	}
	id := rand.Text()
	t.live[id] = &token{user: user, created: now, used: now}
	return id
}

func (t *tokens) use(id string, now time.Time) (token, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	x := t.live[id]
	if x == nil || now.Sub(x.used) > sessionIdle {
		delete(t.live, id)
		return token{}, false
	}
	x.used = now
	return *x, true
}

// end forgets the sessions of a user; empty: of everyone.
func (t *tokens) end(user string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, x := range t.live {
		if user == "" || x.user == user {
			delete(t.live, id)
		}
	}
}

func (t *tokens) remove(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.live, id)
}

func tokenOf(r *http.Request) string {
	if id := r.Header.Get(sessionHeader); id != "" {
		return id
	}
	if c, err := r.Cookie(sessionHeader); err == nil {
		return c.Value
	}
	return ""
}

// Caller is who sent a REST request: the session's user (a token of
// /api/session or /rest/com/vmware/cis/session, in the header or the cookie
// vmware-api-session-id). It is false for anyone else: answer 401.
func (s *Server) Caller(r *http.Request) (Identity, bool) {
	t, ok := s.tokens.use(tokenOf(r), time.Now())
	if !ok {
		return Identity{}, false
	}
	who, err := s.users.Lookup(t.user)
	return who, err == nil
}

// Allowed tells whether a user has a privilege ("Namespaces.Manage") on an
// object of the inventory (its managed object id), or, for an empty id, at the
// root.
func (s *Server) Allowed(who Identity, privilege, kind, id string) bool {
	on := s.root
	if id != "" {
		on.Type, on.Value = kind, id
	}
	_, missing := s.missing(who, []demand{{privilege, on}})
	return !missing
}

// Exists tells whether the inventory has an object.
func (s *Server) Exists(kind, id string) bool {
	return s.vim.Get(types.ManagedObjectReference{Type: kind, Value: id}) != nil
}

func (s *Server) buildREST() {
	s.mux.HandleFunc("POST "+restSession, s.restLogin)
	s.mux.HandleFunc("GET "+restSession, s.restWho)
	s.mux.HandleFunc("DELETE "+restSession, s.restLogout)
	s.mux.HandleFunc("POST "+apiSession, s.restLogin)
	s.mux.HandleFunc("GET "+apiSession, s.restWho)
	s.mux.HandleFunc("DELETE "+apiSession, s.restLogout)
	s.mux.HandleFunc("/rest/", s.notOffered)
	s.mux.HandleFunc("/api/", s.notOffered)
	s.buildTags()
}

func (s *Server) restLogin(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("~action") == "get" {
		s.restWho(w, r)
		return
	}
	name, password, ok := r.BasicAuth()
	who, err := s.users.Authenticate(name, password)
	if !ok || err != nil {
		w.Header().Set("WWW-Authenticate", `Basic realm="vSphere"`)
		restError(w, r, http.StatusUnauthorized, "unauthenticated", "user name or password is wrong")
		return
	}
	id := s.tokens.add(who.Name, time.Now())
	if r.Header.Get("vmware-use-header-authn") == "" {
		http.SetCookie(w, &http.Cookie{Name: sessionHeader, Value: id, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	}
	status := http.StatusOK
	if r.URL.Path == apiSession {
		status = http.StatusCreated
	}
	restValue(w, r, status, id)
}

func (s *Server) restWho(w http.ResponseWriter, r *http.Request) {
	t, ok := s.tokens.use(tokenOf(r), time.Now())
	if !ok {
		restError(w, r, http.StatusUnauthorized, "unauthenticated", "sign in at "+r.URL.Path)
		return
	}
	restValue(w, r, http.StatusOK, map[string]any{"user": t.user, "created_time": t.created.UTC(), "last_accessed_time": t.used.UTC()})
}

func (s *Server) restLogout(w http.ResponseWriter, r *http.Request) {
	if _, ok := s.tokens.use(tokenOf(r), time.Now()); !ok {
		restError(w, r, http.StatusUnauthorized, "unauthenticated", "sign in at "+r.URL.Path)
		return
	}
	s.tokens.remove(tokenOf(r))
	if r.URL.Path == apiSession {
		w.WriteHeader(http.StatusNoContent)
	}
}

func (s *Server) notOffered(w http.ResponseWriter, r *http.Request) {
	if _, ok := s.Caller(r); !ok {
		restError(w, r, http.StatusUnauthorized, "unauthenticated", "sign in at "+apiSession)
		return
	}
	restError(w, r, http.StatusNotFound, "not_found", "the embedded vCenter does not offer "+r.URL.Path)
}

// isOld tells the form of /rest from that of /api.
func isOld(r *http.Request) bool { return len(r.URL.Path) > 6 && r.URL.Path[:6] == "/rest/" }

// restValue answers as /rest (wrapped) or /api (bare) does.
func restValue(w http.ResponseWriter, r *http.Request, status int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if isOld(r) {
		value = map[string]any{"value": value}
	}
	_ = json.NewEncoder(w).Encode(value) // a client that went away
}

// restError answers with vAPI's standard error of a kind, such as
// "already_exists".
func restError(w http.ResponseWriter, r *http.Request, status int, kind, message string) {
	messages := []map[string]any{{"id": "atoll." + kind, "default_message": message, "args": []string{}}}
	var body any = map[string]any{"error_type": strings.ToUpper(kind), "messages": messages}
	if isOld(r) {
		body = map[string]any{"type": "com.vmware.vapi.std.errors." + kind, "value": map[string]any{"messages": messages}}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}
