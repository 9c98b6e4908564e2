package login

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	jose "gopkg.in/go-jose/go-jose.v2"

	"github.com/openatoll/atoll/supervisor/controlplane/durable"
)

// How long keys live.
const (
	// RotateEvery is the age at which a signing key gets a successor.
	RotateEvery = 30 * 24 * time.Hour
	// publishAhead is how long the successor is published before it signs, so
	// that whoever keeps the published keys for a while knows it in time.
	publishAhead = time.Hour
	// keyTime is the creation time in a key's file name.
	keyTime = "20060102T150405Z"
)

// A signingKey is one file of the directory: "<time of its making>-<id>.key".
type signingKey struct {
	id      string // first 16 hex digits of the SHA-256 of its public key
	made    time.Time
	file    string
	private *ecdsa.PrivateKey
}

// A keyring signs tokens and knows the keys of all tokens that may still be
// good. It is safe for concurrent use.
type keyring struct {
	dir string
	log *slog.Logger

	mu   sync.RWMutex
	keys []signingKey // oldest first, never empty once ready has returned
}

// openKeyring reads the keys in dir, which it makes (0700) if need be.
// fresh says that there were none: no token was ever signed here.
func openKeyring(dir string, log *slog.Logger) (k *keyring, fresh bool, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, false, fmt.Errorf("signing keys of logins: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, false, fmt.Errorf("signing keys of logins: %w", err)
	}
	k = &keyring{dir: dir, log: log}
	files, err := filepath.Glob(filepath.Join(dir, "*.key"))
	if err != nil {
		return nil, false, err
	}
	for _, f := range files {
		key, err := loadSigningKey(f)
		if err != nil {
			// Its tokens are refused, and their users sign in again: no reason
			// to stop a control plane.
			log.Error("a signing key of logins cannot be used; tokens signed with it are refused", "file", f, "error", err)
			continue
		}
		k.keys = append(k.keys, key)
	}
	slices.SortFunc(k.keys, func(a, b signingKey) int { return strings.Compare(a.file, b.file) })
	return k, len(files) == 0, nil
}

// upkeep makes and removes keys as plan says. tokenLife is how long tokens are
// good at most.
func (k *keyring) upkeep(now time.Time, tokenLife time.Duration) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	made := make([]time.Time, len(k.keys))
	for i, key := range k.keys {
		made[i] = key.made
	}
	p := planKeys(made, now, tokenLife)
	if p.make {
		key, err := newSigningKey(k.dir, now)
		if err != nil {
			return err
		}
		k.keys = append(k.keys, key)
		k.log.Info("signing key of logins made", "key", key.id)
	}
	for _, key := range k.keys[:p.drop] {
		if err := os.Remove(key.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("signing keys of logins: %w", err)
		}
		k.log.Info("signing key of logins removed: no token of it can be good", "key", key.id)
	}
	k.keys = k.keys[p.drop:]
	return nil
}

// discard removes all keys: every token that was signed until now is refused.
func (k *keyring) discard() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, key := range k.keys {
		if err := os.Remove(key.file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("signing keys of logins: %w", err)
		}
	}
	k.keys = nil
	return nil
}

// A keyPlan is what is to be done with keys, given oldest first.
type keyPlan struct {
	make bool // one more
	drop int  // so many of the oldest
}

// planKeys decides by the keys' ages alone. A key is dropped when its successor
// has signed for longer than any token lives.
func planKeys(made []time.Time, now time.Time, tokenLife time.Duration) (p keyPlan) {
	n := len(made)
	p.make = n == 0 || now.Sub(made[n-1]) >= RotateEvery-publishAhead
	for i := 0; i+1 < n; i++ {
		if now.Sub(made[i+1]) > publishAhead+tokenLife+skew {
			p.drop = i + 1
		}
	}
	return p
}

// signer picks the key that signs: the newest that was published long enough,
// or the oldest if none was.
func signer(made []time.Time, now time.Time) int {
	for i := len(made) - 1; i > 0; i-- {
		if now.Sub(made[i]) >= publishAhead {
			return i
		}
	}
	return 0
}

// signing returns the key that signs at now.
func (k *keyring) signing(now time.Time) (signingKey, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if len(k.keys) == 0 {
		return signingKey{}, fmt.Errorf("logins have no signing key in %s: %w", k.dir, errdefs.ErrUnavailable)
	}
	made := make([]time.Time, len(k.keys))
	for i, key := range k.keys {
		made[i] = key.made
	}
	return k.keys[signer(made, now)], nil
}

// public returns the key of that id.
func (k *keyring) public(id string) (*ecdsa.PublicKey, bool) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	for _, key := range k.keys {
		if key.id == id {
			return &key.private.PublicKey, true
		}
	}
	return nil, false
}

// published is the set of public keys for GET /jwks.
func (k *keyring) published() jose.JSONWebKeySet {
	k.mu.RLock()
	defer k.mu.RUnlock()
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, key := range k.keys {
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: &key.private.PublicKey, KeyID: key.id, Algorithm: string(jose.ES256), Use: "sig"})
	}
	return set
}

func newSigningKey(dir string, now time.Time) (signingKey, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return signingKey{}, err
	}
	der, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		return signingKey{}, err
	}
	id, err := keyID(private)
	if err != nil {
		return signingKey{}, err
	}
	now = now.UTC().Truncate(time.Second)
	key := signingKey{id: id, made: now, private: private, file: filepath.Join(dir, now.Format(keyTime)+"-"+id+".key")}
	if err := durable.WriteFile(key.file, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		return signingKey{}, fmt.Errorf("signing keys of logins: %w", err)
	}
	return key, nil
}

func loadSigningKey(file string) (signingKey, error) {
	stamp, id, ok := strings.Cut(strings.TrimSuffix(filepath.Base(file), ".key"), "-")
	made, err := time.Parse(keyTime, stamp)
	if !ok || err != nil {
		return signingKey{}, fmt.Errorf("its name is not TIME-ID.key: %w", errdefs.ErrInvalidArgument)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return signingKey{}, err
	}
	// No message below repeats what the file holds.
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "EC PRIVATE KEY" {
		return signingKey{}, fmt.Errorf("it holds no PEM EC private key: %w", errdefs.ErrInvalidArgument)
	}
	private, err := x509.ParseECPrivateKey(block.Bytes)
	if err != nil || private.Curve != elliptic.P256() {
		return signingKey{}, fmt.Errorf("it holds no key of P-256: %w", errdefs.ErrInvalidArgument)
	}
	if have, err := keyID(private); err != nil || have != id {
		return signingKey{}, fmt.Errorf("its name is another key's: %w", errdefs.ErrInvalidArgument)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		return signingKey{}, err
	}
	return signingKey{id: id, made: made, file: file, private: private}, nil
}

func keyID(private *ecdsa.PrivateKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:8]), nil
}
