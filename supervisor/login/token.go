package login

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	jose "gopkg.in/go-jose/go-jose.v2"
	"gopkg.in/go-jose/go-jose.v2/jwt"

	"github.com/openatoll/atoll/internal/sso"
)

// An Identity is whom vCenter vouches for.
type Identity struct {
	User   sso.Principal
	Groups []sso.Principal
	// Warning is a sentence for the user when the groups could not be read;
	// empty otherwise.
	Warning string
	// Listed says that vCenter's user directory had the user at the login.
	Listed bool
}

// audience is what tokens are for: the API server of this supervisor. Issuers
// differ between supervisors, and so do keys.
const audience = "atoll-supervisor"

// skew is how far the clocks of two machines may be apart.
const skew = time.Minute

// maxTokenBytes: a token that is longer was not made here.
const maxTokenBytes = 64 << 10

// claims are what a token says. Its principals are without sso.Prefix: that is
// added when it is read, so that no token can name another kind of user.
type claims struct {
	jwt.Claims
	Groups []string `json:"groups,omitempty"`
	Listed bool     `json:"listed,omitempty"`
}

// A Session is what a good token says.
type Session struct {
	ID       string // unique; 32 hex digits
	Identity Identity
	Issued   time.Time
	Expires  time.Time
}

// tokens makes and reads tokens.
type tokens struct {
	issuer string
	life   time.Duration
	keys   *keyring
}

// issue returns a new token for who, good from now on for as long as tokens
// are.
func (t *tokens) issue(who Identity, now time.Time) (string, Session, error) {
	key, err := t.keys.signing(now)
	if err != nil {
		return "", Session{}, err
	}
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		return "", Session{}, err
	}
	now = now.Truncate(time.Second)
	s := Session{ID: hex.EncodeToString(raw), Identity: who, Issued: now, Expires: now.Add(t.life)}
	sign, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key.private, KeyID: key.id}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", Session{}, fmt.Errorf("sign a token: %w", err)
	}
	c := claims{Claims: jwt.Claims{
		Issuer: t.issuer, Subject: who.User.String(), Audience: jwt.Audience{audience}, ID: s.ID,
		IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(s.Expires),
	}}
	c.Listed = who.Listed
	for _, g := range who.Groups {
		c.Groups = append(c.Groups, g.String())
	}
	token, err := jwt.Signed(sign).Claims(c).CompactSerialize()
	if err != nil {
		return "", Session{}, fmt.Errorf("sign a token: %w", err)
	}
	return token, s, nil
}

// verify reads a token that is good at now; any other is ErrUnauthenticated
// (expired, of another supervisor, forged), and the sentence holds nothing of
// the token. Whether it was revoked is not asked here.
func (t *tokens) verify(token string, now time.Time) (Session, error) {
	bad := func(why string) (Session, error) {
		return Session{}, fmt.Errorf("the token %s: sign in again with `kubectl atoll login`: %w", why, errdefs.ErrUnauthenticated)
	}
	if len(token) > maxTokenBytes {
		return bad("is too long")
	}
	parsed, err := jwt.ParseSigned(token)
	if err != nil || len(parsed.Headers) != 1 {
		return bad("is not one of this supervisor's")
	}
	// The algorithm is fixed: a token must not choose how it is checked.
	head := parsed.Headers[0]
	key, ok := t.keys.public(head.KeyID)
	if !ok || head.Algorithm != string(jose.ES256) {
		return bad("is not one of this supervisor's, or its signing key is gone")
	}
	var c claims
	if err := parsed.Claims(key, &c); err != nil {
		return bad("has a wrong signature")
	}
	switch {
	case c.Issuer != t.issuer || !c.Audience.Contains(audience):
		return bad("is for another supervisor")
	case c.Expiry == nil || c.IssuedAt == nil || len(c.ID) != 32:
		return bad("is incomplete")
	case !now.Before(c.Expiry.Time()):
		tokensTotal.WithLabelValues(tokenExpired).Inc()
		return bad("has expired")
	case c.IssuedAt.Time().After(now.Add(skew)):
		return bad("is from the future: check the clock of the supervisor's host")
	}
	s := Session{ID: c.ID, Issued: c.IssuedAt.Time(), Expires: c.Expiry.Time()}
	s.Identity.Listed = c.Listed
	if s.Identity.User, err = sso.Parse(c.Subject, ""); err != nil {
		return bad("names nobody")
	}
	for _, name := range c.Groups {
		g, err := sso.Parse(name, "")
		if err != nil {
			return bad("names a group that cannot be")
		}
		s.Identity.Groups = append(s.Identity.Groups, g)
	}
	return s, nil
}
