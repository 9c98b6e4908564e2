package login

import (
	"errors"
	"sync"

	"github.com/containerd/errdefs"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
)

// The metrics are on the API server's /metrics, whose process this is.
var (
	loginsTotal = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "logins_total",
		Help:           "Passwords that users sent, by result: ok, refused (wrong), limited (too many tries) and unknown (vCenter did not answer).",
		StabilityLevel: metrics.ALPHA,
	}, []string{"result"})
	tokensTotal = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "login_tokens_total",
		Help:           "Tokens that were issued, revoked (given back by a logout, or their user was removed from vCenter) and expired (shown after their time).",
		StabilityLevel: metrics.ALPHA,
	}, []string{"event"})
	rechecks = metrics.NewCounterVec(&metrics.CounterOpts{
		Subsystem: "atoll", Name: "login_user_rechecks_total",
		Help:           "Questions to vCenter whether the bearer of a token is still there, by answer: there, gone and unknown.",
		StabilityLevel: metrics.ALPHA,
	}, []string{"result"})
)

var registerMetrics = sync.OnceFunc(func() { legacyregistry.MustRegister(loginsTotal, tokensTotal, rechecks) })

// Values of tokensTotal's event.
const (
	tokenIssued  = "issued"
	tokenRevoked = "revoked"
	tokenExpired = "expired"
)

// loginResult is a password's, for loginsTotal.
func loginResult(err error) string {
	var locked *waitError
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &locked):
		return "limited"
	case errdefs.IsUnauthorized(err):
		return "refused"
	}
	return "unknown"
}
