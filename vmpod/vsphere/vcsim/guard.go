package vcsim

import (
	"net/http"

	"github.com/vmware/govmomi/vim25/types"
)

// maxBody is more than any request that makes sense.
const maxBody = 8 << 20

// guard is in front of everything that is served.
func (s *Server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

// validLogin is the simulator's question whether a password is right.
func (s *Server) validLogin(login *types.Login) bool {
	_, err := s.users.Authenticate(login.UserName, login.Password)
	return err == nil
}

func (s *Server) stopWatches() {}

func (s *Server) closeStore() error { return nil }
