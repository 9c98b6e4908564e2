package vcsim

import (
	"net/http"
	"reflect"
	"runtime/debug"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/types"
)

const (
	// maxBody is more than any request that makes sense.
	maxBody = 8 << 20
	// bodyTimeout is for sending it.
	bodyTimeout = 30 * time.Second
)

// guard is in front of everything that is served: it bounds requests, applies
// fault rules to REST (handle does so for SOAP), and survives panics of the
// simulator.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r, e := withExchange(r)
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout)) // HTTP/1.1 has it
		defer func() {
			p := recover()
			if p != nil && p != http.ErrAbortHandler {
				s.log.Error("a request failed inside the simulator", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
				p = http.ErrAbortHandler
			}
			if p != nil {
				panic(p)
			}
		}()
		if isREST(r) && !s.injectREST(w, r) {
			return
		}
		next.ServeHTTP(&answer{ResponseWriter: w, exchange: e}, r)
	})
}

func isREST(r *http.Request) bool {
	return strings.HasPrefix(r.URL.Path, "/rest/") || strings.HasPrefix(r.URL.Path, "/api/")
}

// injectREST applies the fault rules; it has answered if it returns false.
func (s *Server) injectREST(w http.ResponseWriter, r *http.Request) bool {
	_, pattern := s.mux.Handler(r)
	s.faults.count(pattern)
	user := ""
	if t, ok := s.tokens.use(tokenOf(r), time.Now()); ok {
		user = t.user
	}
	f, ok := s.faults.match(r.Method+" "+r.URL.Path, "", "", user)
	if !ok {
		return true
	}
	s.delay(f.Delay, r)
	switch {
	case f.Logout:
		s.tokens.remove(tokenOf(r))
	case f.Drop && f.Late:
		exchangeOf(r).drop = true
	case f.Drop:
		panic(http.ErrAbortHandler)
	case f.Fault != nil:
		restError(w, r, http.StatusInternalServerError, "internal_server_error", messageOf(f.Fault))
		return false
	}
	return true
}

func (s *Server) delay(d time.Duration, r *http.Request) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-r.Context().Done():
	case <-s.stopping:
	}
}

// An answer is cut off if a fault rule says so.
type answer struct {
	http.ResponseWriter
	exchange *exchange
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answer) cut() {
	if a.exchange.drop {
		panic(http.ErrAbortHandler)
	}
}

func (a *answer) WriteHeader(status int) {
	a.cut()
	for i, c := range a.Header()["Set-Cookie"] { // the simulator's lacks it
		if !strings.Contains(c, "Secure") {
			a.Header()["Set-Cookie"][i] = c + "; Secure"
		}
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(b []byte) (int, error) {
	a.cut()
	return a.ResponseWriter.Write(b)
}

// validLogin is the simulator's question whether a password is right.
func (s *Server) validLogin(login *types.Login) bool {
	_, err := s.users.Authenticate(login.UserName, login.Password)
	return err == nil
}

func typeName(v any) string { return reflect.TypeOf(v).Elem().Name() }
