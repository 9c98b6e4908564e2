package login

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/internal/sso"
	"github.com/openatoll/atoll/internal/vsphere"
)

// How soon a user who was removed from vCenter loses the tokens that are open:
// within recheckEvery, and the time that the API server keeps an answer.
const (
	// recheckEvery is how long an answer about one user counts.
	recheckEvery = time.Minute
	// recheckTimeout is how long a request may wait for vCenter to say.
	recheckTimeout = 5 * time.Second
	// recheckPause is how long a vCenter that did not say is left alone.
	recheckPause = 30 * time.Second
	// maxRechecked users are remembered, some 200 bytes each.
	maxRechecked = 10_000
)

// A Directory knows which users vCenter has.
type Directory interface {
	// Exists is false only where vCenter said that it has no such user. Anything
	// else that is not known is an error.
	Exists(ctx context.Context, user sso.Principal) (bool, error)
}

// presence asks a Directory about the bearers of tokens now and then. A user
// that was gone once loses what was issued until then, also if another one of
// the name comes later. It is safe for concurrent use.
type presence struct {
	directory Directory
	now       func() time.Time
	log       *slog.Logger

	mu     sync.Mutex
	users  map[sso.Principal]*bearer
	silent time.Time // until then vCenter is not asked
}

type bearer struct {
	mu    sync.Mutex // held while vCenter is asked about the user
	asked time.Time
	gone  time.Time // when that was last found; zero: never
}

// listed tells at a login whether the directory has the user. Only then is he
// asked about later: of some identity sources vCenter lists nobody.
func (p *presence) listed(ctx context.Context, user sso.Principal) bool {
	if p.directory == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, recheckTimeout)
	defer cancel()
	there, err := p.directory.Exists(ctx, user)
	if err != nil {
		p.log.Warn("vCenter does not say whether it lists a user; the token is good until it expires, also if the user is removed", "user", user.String(), "error", err)
		return false
	}
	return there
}

// gone tells whether the bearer of a token was removed since it was issued.
// While vCenter does not say, what was known last counts.
func (p *presence) gone(ctx context.Context, s Session) bool {
	if p.directory == nil || !s.Identity.Listed {
		return false
	}
	b := p.bearer(s.Identity.User)
	b.mu.Lock()
	defer b.mu.Unlock()
	now := p.now()
	if now.Sub(b.asked) >= recheckEvery && p.speaks(now) {
		ctx, cancel := context.WithTimeout(ctx, recheckTimeout)
		defer cancel()
		there, err := p.directory.Exists(ctx, s.Identity.User)
		switch {
		case err != nil:
			rechecks.WithLabelValues("unknown").Inc()
			p.log.Warn("vCenter does not say whether a user is still there; open tokens stay good", "user", s.Identity.User.String(), "error", err)
			p.leaveAlone(now)
		case there:
			rechecks.WithLabelValues("there").Inc()
			b.asked = now
		default:
			rechecks.WithLabelValues("gone").Inc()
			b.asked, b.gone = now, now
		}
	}
	return !b.gone.IsZero() && !s.Issued.After(b.gone)
}

func (p *presence) bearer(user sso.Principal) *bearer {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.users[user]
	if b == nil {
		if p.users == nil || len(p.users) >= maxRechecked {
			p.users = map[sso.Principal]*bearer{} // they are asked about anew
		}
		b = &bearer{}
		p.users[user] = b
	}
	return b
}

func (p *presence) speaks(now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !now.Before(p.silent)
}

func (p *presence) leaveAlone(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent = now.Add(recheckPause)
}

// A UserDirectory is a vCenter's, asked as the supervisor: System.View is
// enough. It is safe for concurrent use.
type UserDirectory struct {
	// VCenter says which; asked each time, it answers from a cache. Credentials
	// are the supervisor's there, asked at each login.
	VCenter     func(context.Context) (VCenter, error)
	Credentials func(context.Context) (user, password string, err error)

	mu      sync.Mutex
	of      VCenter
	session *vsphere.Session
}

// Exists is Directory's.
func (d *UserDirectory) Exists(ctx context.Context, user sso.Principal) (bool, error) {
	session, err := d.connect(ctx)
	if err != nil {
		return false, err
	}
	if err := session.Login(ctx); err != nil {
		return false, err
	}
	directory := session.Client().ServiceContent.UserDirectory
	if directory == nil {
		return false, fmt.Errorf("vCenter %s has no UserDirectory: %w", session.Address(), errdefs.ErrNotImplemented)
	}
	res, err := methods.RetrieveUserGroups(ctx, session, &types.RetrieveUserGroups{
		This: *directory, Domain: user.Domain, SearchStr: user.Name, ExactMatch: true, FindUsers: true,
	})
	if err != nil {
		return false, vsphere.Error("look for user "+user.String(), err)
	}
	return len(res.Returnval) > 0, nil
}

func (d *UserDirectory) connect(ctx context.Context) (*vsphere.Session, error) {
	v, err := d.VCenter(ctx)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session != nil && d.of.Address == v.Address && d.of.Thumbprint == v.Thumbprint && string(d.of.CA) == string(v.CA) {
		return d.session, nil
	}
	session, err := vsphere.NewSession(vsphere.Config{Address: v.Address, CA: v.CA, Thumbprint: v.Thumbprint, Credentials: d.Credentials, UserAgent: "atoll/login", Timeout: vcenterTimeout})
	if err != nil {
		return nil, err
	}
	d.of, d.session = v, session
	return session, nil
}
