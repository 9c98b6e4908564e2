package login

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/openatoll/atoll/supervisor/login/loginapi"
)

// ReviewPath is where the API server asks about tokens.
const ReviewPath = "/token-review"

// credentialID is where the API server keeps a token's id, as of its own
// tokens: its audit log shows it.
const credentialID = "authentication.kubernetes.io/credential-id"

// reviewRoutes are for the API server alone: the TLS handshake has verified its
// certificate against the cluster's authority, which has signed others too.
func (s *Server) reviewRoutes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+ReviewPath, s.handleReview)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 || r.TLS.VerifiedChains[0][0].Subject.CommonName != ReviewerName {
			s.answer(w, http.StatusForbidden, loginapi.Error{Message: "this is for the API server"})
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// handleReview answers a TokenReview of authentication.k8s.io/v1. What is wrong
// with a token goes to the API server's log, its bearer gets a bare 401.
func (s *Server) handleReview(w http.ResponseWriter, r *http.Request) {
	var review authenticationv1.TokenReview
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&review); err != nil {
		s.answer(w, http.StatusBadRequest, loginapi.Error{Message: "no TokenReview: " + err.Error()})
		return
	}
	session, err := s.session(r.Context(), review.Spec.Token)
	review.Spec = authenticationv1.TokenReviewSpec{} // not sent back
	review.Status = authenticationv1.TokenReviewStatus{}
	if err != nil {
		review.Status.Error = sentence(err)
	} else {
		review.Status.Authenticated = true
		review.Status.User = authenticationv1.UserInfo{
			Username: session.Identity.User.Subject(),
			Groups:   subjects(session.Identity.Groups),
			Extra:    map[string]authenticationv1.ExtraValue{credentialID: {"JTI=" + session.ID}},
		}
	}
	s.answer(w, http.StatusOK, review)
}

// A certificate is read again when its file has changed.
type certificate struct {
	certFile, keyFile string

	mu    sync.Mutex
	pair  *tls.Certificate
	since time.Time // the file's modification time
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	st, err := os.Stat(c.certFile)
	if err == nil && c.pair != nil && st.ModTime().Equal(c.since) {
		return c.pair, nil
	}
	pair, err2 := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err2 != nil {
		if c.pair != nil { // between the writes of the key and the certificate
			return c.pair, nil
		}
		return nil, err2
	}
	c.pair = &pair
	if err == nil {
		c.since = st.ModTime()
	}
	return c.pair, nil
}
