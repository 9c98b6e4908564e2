package login

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/supervisor/controlplane/durable"
)

// maxRevoked bounds the list: 48 bytes each in the file, some 100 in memory.
const maxRevoked = 100_000

// revocations remembers tokens that were given back before they expired, in a
// file of one line each ("<id> <unix time of expiry>"), until they would have
// expired anyway. It is safe for concurrent use.
type revocations struct {
	file string

	mu   sync.RWMutex
	ids  map[string]int64 // expiry, unix seconds
	dead int              // lines in the file that say nothing any more
}

// openRevocations reads the file. missing says that there was none: what was
// revoked before is not known.
func openRevocations(file string, now time.Time) (r *revocations, missing bool, err error) {
	r = &revocations{file: file, ids: map[string]int64{}}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return r, true, r.rewrite()
	}
	if err != nil {
		return nil, false, fmt.Errorf("revoked tokens: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		id, at, ok := strings.Cut(lines.Text(), " ")
		expires, err := strconv.ParseInt(at, 10, 64)
		if !ok || err != nil || len(id) != 32 {
			// The last line of a write that a crash cut short: its revocation
			// was not confirmed to anybody.
			continue
		}
		r.ids[id] = expires
	}
	r.forget(now)
	return r, false, r.rewrite()
}

// add returns once the revocation is on disk. It is idempotent. A list that is
// full is ErrResourceExhausted.
func (r *revocations) add(s Session) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.ids[s.ID]; known {
		return nil
	}
	if len(r.ids) >= maxRevoked {
		return fmt.Errorf("revoke a token: %d are revoked already, which is as many as are remembered: it stays good until %s: %w", maxRevoked, s.Expires.Format(time.RFC3339), errdefs.ErrResourceExhausted)
	}
	f, err := os.OpenFile(r.file, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("revoke a token: %w", err)
	}
	// From the next line on: the one before may be half a line.
	_, err = fmt.Fprintf(f, "\n%s %d\n", s.ID, s.Expires.Unix())
	if err == nil {
		err = f.Sync()
	}
	if err2 := f.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return fmt.Errorf("revoke a token: %w", err)
	}
	r.ids[s.ID] = s.Expires.Unix()
	return nil
}

func (r *revocations) has(id string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, ok := r.ids[id]
	return ok
}

// upkeep forgets what has expired and, once half of the file is about that,
// writes it anew.
func (r *revocations) upkeep(now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forget(now)
	if r.dead <= len(r.ids) {
		return nil
	}
	return r.rewrite()
}

// forget and rewrite want the lock, or to be alone.
func (r *revocations) forget(now time.Time) {
	for id, expires := range r.ids {
		if now.Unix() > expires {
			delete(r.ids, id)
			r.dead++
		}
	}
}

func (r *revocations) rewrite() error {
	var b bytes.Buffer
	for id, expires := range r.ids {
		fmt.Fprintf(&b, "%s %d\n", id, expires)
	}
	if err := durable.WriteFile(r.file, b.Bytes(), 0o600); err != nil {
		return fmt.Errorf("revoked tokens: %w", err)
	}
	r.dead = 0
	return nil
}
