package login

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	jose "gopkg.in/go-jose/go-jose.v2"
	"gopkg.in/go-jose/go-jose.v2/jwt"

	"github.com/openatoll/atoll/internal/sso"
)

var epoch = time.Date(2026, 11, 2, 8, 0, 0, 0, time.UTC)

var ada = Identity{
	User:   sso.Principal{Name: "ada", Domain: "vsphere.local"},
	Groups: []sso.Principal{{Name: "shop-devs", Domain: "vsphere.local"}, {Name: "everyone", Domain: "corp.example"}},
}

func newTokens(t *testing.T, issuer string) *tokens {
	t.Helper()
	keys, fresh, err := openKeyring(filepath.Join(t.TempDir(), "login"), slog.New(slog.DiscardHandler))
	if err != nil || !fresh {
		t.Fatalf("new key directory: fresh %v, err %v", fresh, err)
	}
	if err := keys.upkeep(epoch, 10*time.Hour); err != nil {
		t.Fatal(err)
	}
	return &tokens{issuer: issuer, life: 10 * time.Hour, keys: keys}
}

func TestTokenLife(t *testing.T) {
	tok := newTokens(t, "https://a:6444")
	text, s, err := tok.issue(ada, epoch)
	if err != nil {
		t.Fatal(err)
	}
	if want := epoch.Add(10 * time.Hour); !s.Expires.Equal(want) {
		t.Errorf("expires at %s, want %s", s.Expires, want)
	}
	for _, at := range []time.Duration{-skew, 0, 10*time.Hour - time.Second} {
		got, err := tok.verify(text, epoch.Add(at))
		if err != nil || got.ID != s.ID || got.Identity.User != ada.User || len(got.Identity.Groups) != 2 || got.Identity.Groups[1] != ada.Groups[1] {
			t.Errorf("after %s: %+v, %v", at, got, err)
		}
	}
	for at, why := range map[time.Duration]string{10 * time.Hour: "expired", 100 * time.Hour: "expired", -2 * skew: "future"} {
		if _, err := tok.verify(text, epoch.Add(at)); !errdefs.IsUnauthorized(err) || !strings.Contains(err.Error(), why) {
			t.Errorf("after %s: %v, want %q", at, err, why)
		}
	}
}

// TestForgedTokens: what was not signed here, for here, is refused.
func TestForgedTokens(t *testing.T) {
	tok, other := newTokens(t, "https://a:6444"), newTokens(t, "https://a:6444")
	good, _, err := tok.issue(ada, epoch)
	if err != nil {
		t.Fatal(err)
	}
	foreign, _, err := other.issue(ada, epoch)
	if err != nil {
		t.Fatal(err)
	}
	parts := strings.Split(good, ".")
	encode := base64.RawURLEncoding.EncodeToString
	signedBy := func(key any, alg jose.SignatureAlgorithm, c any) string {
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key, KeyID: tok.keys.keys[0].id}}, nil)
		if err != nil {
			t.Fatal(err)
		}
		text, err := jwt.Signed(signer).Claims(c).CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	whole := jwt.Claims{
		Issuer: tok.issuer, Subject: "ada@vsphere.local", Audience: jwt.Audience{audience}, ID: strings.Repeat("a", 32),
		IssuedAt: jwt.NewNumericDate(epoch), Expiry: jwt.NewNumericDate(epoch.Add(time.Hour)),
	}
	if _, err := tok.verify(signedBy(tok.keys.keys[0].private, jose.ES256, whole), epoch); err != nil {
		t.Fatalf("the claims that the cases below spoil are no good themselves: %v", err)
	}
	with := func(change func(*jwt.Claims)) string {
		c := whole
		change(&c)
		return signedBy(tok.keys.keys[0].private, jose.ES256, c)
	}
	for name, text := range map[string]string{
		"empty":            "",
		"words":            "not.a.token",
		"too long":         strings.Repeat("a", maxTokenBytes+1),
		"another's key":    foreign,
		"our key's id":     signedBy(stranger, jose.ES256, whole),
		"alg none":         encode([]byte(`{"alg":"none","kid":"`+tok.keys.keys[0].id+`"}`)) + "." + parts[1] + ".",
		"alg HS256":        signedBy([]byte("0123456789abcdef0123456789abcdef"), jose.HS256, whole),
		"changed claims":   parts[0] + "." + encode([]byte(`{"sub":"root@localos"}`)) + "." + parts[2],
		"no signature":     parts[0] + "." + parts[1] + ".",
		"another issuer":   with(func(c *jwt.Claims) { c.Issuer = "https://b:6444" }),
		"another audience": with(func(c *jwt.Claims) { c.Audience = jwt.Audience{"x"} }),
		"no expiry":        with(func(c *jwt.Claims) { c.Expiry = nil }),
		"no id":            with(func(c *jwt.Claims) { c.ID = "" }),
		"no subject":       with(func(c *jwt.Claims) { c.Subject = "" }),
	} {
		if s, err := tok.verify(text, epoch); !errdefs.IsUnauthorized(err) {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
}

// TestRotation lives through 120 days, with upkeep and a login every two hours: a
// token that was good stays good until it expires, and keys do not pile up.
func TestRotation(t *testing.T) {
	tok := newTokens(t, "https://a:6444")
	type live struct {
		text    string
		expires time.Time
	}
	var out []live
	signers := map[string]bool{}
	for now := epoch; now.Before(epoch.Add(120 * 24 * time.Hour)); now = now.Add(2 * time.Hour) {
		if err := tok.keys.upkeep(now, tok.life); err != nil {
			t.Fatal(err)
		}
		if n := len(tok.keys.keys); n > 2 {
			t.Fatalf("%s: %d keys", now, n)
		}
		key, err := tok.keys.signing(now)
		if err != nil {
			t.Fatal(err)
		}
		if age := now.Sub(key.made); len(signers) > 0 && age < publishAhead || age > RotateEvery+4*time.Hour {
			t.Fatalf("%s: signs with a key that is %s old", now, age)
		}
		signers[key.id] = true
		text, s, err := tok.issue(ada, now)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, live{text, s.Expires})
		for len(out) > 0 && !now.Before(out[0].expires) {
			out = out[1:]
		}
		for _, l := range out {
			if _, err := tok.verify(l.text, now); err != nil {
				t.Fatalf("%s: a token good until %s: %v", now, l.expires, err)
			}
		}
	}
	if len(signers) != 4 {
		t.Errorf("%d keys signed within 120 days", len(signers))
	}
}

// TestKeyFiles: keys are private, survive a restart, and one that is broken
// does not stop the others.
func TestKeyFiles(t *testing.T) {
	tok := newTokens(t, "https://a:6444")
	text, _, err := tok.issue(ada, epoch)
	if err != nil {
		t.Fatal(err)
	}
	file := tok.keys.keys[0].file
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%s: %v, %v", file, st.Mode(), err)
	}
	if st, err := os.Stat(tok.keys.dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%s: %v, %v", tok.keys.dir, st.Mode(), err)
	}
	if err := os.WriteFile(filepath.Join(tok.keys.dir, "20260101T000000Z-0123456789abcdef.key"), []byte("-----BEGIN EC PRIVATE KEY-----\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	again, fresh, err := openKeyring(tok.keys.dir, slog.New(slog.DiscardHandler))
	if err != nil || fresh || len(again.keys) != 1 {
		t.Fatalf("opened again: %d keys, fresh %v, %v", len(again.keys), fresh, err)
	}
	if _, err := (&tokens{issuer: tok.issuer, life: tok.life, keys: again}).verify(text, epoch); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	if set := again.published(); len(set.Keys) != 1 || set.Keys[0].KeyID != again.keys[0].id || !set.Keys[0].IsPublic() {
		t.Errorf("published: %+v", set)
	}
}
