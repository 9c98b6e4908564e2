package login

import (
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// Limits of attempts. The first two are vSphere SSO's default lockout policy;
// an account is locked for the address that failed, so that a stranger cannot
// lock somebody out from elsewhere, until many addresses have failed.
const (
	maxFailures        = 5 // of one user from one address within failureWindow
	failureWindow      = 3 * time.Minute
	lockTime           = 5 * time.Minute
	maxUserFailures    = 25 // of one user from all addresses
	maxAddressFailures = 50 // of one address for all users: a list of passwords is being tried
	maxLogins          = 60 // right ones of one user within loginWindow
	loginWindow        = 5 * time.Minute
	maxCounters        = 30_000 // some 150 bytes each
)

// A lockout counts attempts to sign in, and decides who has to wait. It is safe
// for concurrent use. Names that do not exist are counted like others, so what
// it says tells nothing about which do.
type lockout struct {
	mu       sync.Mutex
	counters map[counterKey]*counter
}

type counterKey struct {
	kind counterKind
	user string
	from string
}

type counterKind uint8

const (
	userFromAddress counterKind = iota
	userFromAnywhere
	anybodyFromAddress
	userLogins
)

// limits a kind of counter to max events within window; then it is closed for
// wait.
var counterLimits = map[counterKind]struct {
	max          int
	window, wait time.Duration
}{
	userFromAddress:    {maxFailures, failureWindow, lockTime},
	userFromAnywhere:   {maxUserFailures, failureWindow, lockTime},
	anybodyFromAddress: {maxAddressFailures, failureWindow, lockTime},
	userLogins:         {maxLogins, loginWindow, time.Minute},
}

type counter struct {
	n      int
	began  time.Time // of the window
	closed time.Time // until then; zero: open
}

// An attempt is one try that has been let through.
type attempt struct {
	l    *lockout
	keys [3]counterKey
	user string
}

// begin lets a try through, or says with ErrResourceExhausted how long to wait.
// A try counts as failed until right or unknown says otherwise, so that many at
// once do not get more tries than one after the other.
func (l *lockout) begin(user, from string, now time.Time) (*attempt, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := &attempt{l: l, user: user, keys: [3]counterKey{
		{userFromAddress, user, from}, {userFromAnywhere, user, ""}, {anybodyFromAddress, "", from},
	}}
	for _, k := range append(a.keys[:], counterKey{userLogins, user, ""}) {
		if wait := l.wait(k, now); wait > 0 {
			return nil, lockedError(k.kind, wait)
		}
	}
	l.makeRoom(now)
	for _, k := range a.keys {
		l.count(k, now)
	}
	return a, nil
}

func lockedError(kind counterKind, wait time.Duration) error {
	why := "too many wrong passwords"
	if kind == userLogins {
		why = "too many logins"
	}
	return &waitError{why: why, wait: wait}
}

// A waitError is an ErrResourceExhausted that says how long.
type waitError struct {
	why  string
	wait time.Duration
}

func (e *waitError) Error() string {
	return fmt.Sprintf("%s: wait %s and try again", e.why, e.wait.Round(time.Second))
}

func (e *waitError) Unwrap() error { return errdefs.ErrResourceExhausted }

// right takes the user's failures from this address back, and counts the login.
func (a *attempt) right(now time.Time) {
	a.l.mu.Lock()
	defer a.l.mu.Unlock()
	delete(a.l.counters, a.keys[0])
	a.l.takeBack(a.keys[1])
	a.l.takeBack(a.keys[2])
	a.l.count(counterKey{userLogins, a.user, ""}, now)
}

// unknown takes back this try alone: nobody knows whether it was right.
func (a *attempt) unknown() {
	a.l.mu.Lock()
	defer a.l.mu.Unlock()
	for _, k := range a.keys {
		a.l.takeBack(k)
	}
}

// The rest wants the lock.

func (l *lockout) wait(k counterKey, now time.Time) time.Duration {
	c := l.counters[k]
	if c == nil || !now.Before(c.closed) {
		return 0
	}
	return c.closed.Sub(now)
}

func (l *lockout) count(k counterKey, now time.Time) {
	limit := counterLimits[k.kind]
	c := l.counters[k]
	over := c != nil && now.Sub(c.began) >= limit.window
	if c != nil && !c.closed.IsZero() {
		over = !now.Before(c.closed)
	}
	if c == nil || over {
		c = &counter{began: now}
		l.counters[k] = c
	}
	c.n++
	if c.n >= limit.max && c.closed.IsZero() {
		c.closed = now.Add(limit.wait)
	}
}

func (l *lockout) takeBack(k counterKey) {
	c := l.counters[k]
	if c == nil {
		return
	}
	c.n--
	if c.n < counterLimits[k.kind].max {
		c.closed = time.Time{}
	}
	if c.n <= 0 {
		delete(l.counters, k)
	}
}

// makeRoom drops what counts no longer; if that is not enough, open counters.
func (l *lockout) makeRoom(now time.Time) {
	if l.counters == nil {
		l.counters = map[counterKey]*counter{}
	}
	if len(l.counters)+len(attempt{}.keys)+1 <= maxCounters {
		return
	}
	for k, c := range l.counters {
		if !now.Before(c.closed) && now.Sub(c.began) >= counterLimits[k.kind].window {
			delete(l.counters, k)
		}
	}
	for k, c := range l.counters {
		if len(l.counters) <= maxCounters/2 {
			break
		}
		// Those that lock stay: whoever fills the table does not open them.
		if c.closed.IsZero() {
			delete(l.counters, k)
		}
	}
}
