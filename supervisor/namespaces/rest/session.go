package rest

import (
	"context"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
)

// sessionHeader carries the session's id, as a header or as a cookie.
const sessionHeader = "vmware-api-session-id"

// Sessions are those of the vCenter that knows the users. The facade keeps none
// itself, so that one login serves for namespaces, tags and libraries alike,
// and a logout counts everywhere at once.
type Sessions interface {
	// Login returns a new session's id. Credentials that are refused are
	// ErrUnauthenticated.
	Login(ctx context.Context, user, password string) (string, error)
	// Get is ErrUnauthenticated for an id that is unknown or has expired, and
	// keeps one that is not from expiring.
	Get(ctx context.Context, id string) (Session, error)
	// Logout ends a session. One that is unknown is ErrUnauthenticated.
	Logout(ctx context.Context, id string) error
}

// A Session is somebody who is signed in.
type Session struct {
	User         string    `json:"user"` // as vCenter names him: "alice@vsphere.local" or `VSPHERE.LOCAL\alice`
	Created      time.Time `json:"created_time"`
	LastAccessed time.Time `json:"last_accessed_time"`
}

// sessionID is what a request shows, "" if nothing.
func sessionID(r *http.Request) string {
	if id := r.Header.Get(sessionHeader); id != "" {
		return id
	}
	if c, err := r.Cookie(sessionHeader); err == nil {
		return c.Value
	}
	return ""
}

var errNoSession = problemf(errdefs.ErrUnauthenticated, "This call needs a session: POST /api/session with a user and password of vCenter's, and send the id that it returns as %s.", sessionHeader)

// session finds who asks.
func (h *Handler) session(r *http.Request) (Session, error) {
	id := sessionID(r)
	if id == "" {
		return Session{}, errNoSession
	}
	return h.sessions.Get(r.Context(), id)
}

func (h *Handler) createSession(r *call) (any, error) {
	user, password, ok := r.BasicAuth()
	if !ok {
		return nil, problemf(errdefs.ErrUnauthenticated, "A session is made with a user and password of vCenter's, by HTTP Basic authentication.")
	}
	id, err := h.sessions.Login(r.Context(), user, password)
	if err != nil {
		return nil, err
	}
	if r.Header.Get("vmware-use-header-authn") == "" {
		http.SetCookie(r.w, &http.Cookie{Name: sessionHeader, Value: id, Path: "/api", Secure: r.TLS != nil, HttpOnly: true, SameSite: http.SameSiteStrictMode})
	}
	return id, nil
}

func (h *Handler) getSession(r *call) (any, error) { return r.session, nil }

func (h *Handler) deleteSession(r *call) (any, error) {
	return nil, h.sessions.Logout(r.Context(), sessionID(r.Request))
}
