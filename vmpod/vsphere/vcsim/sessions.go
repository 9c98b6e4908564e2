package vcsim

import (
	"context"
	"sync"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

const (
	// sessionIdle is a vCenter's own limit.
	sessionIdle = 30 * time.Minute
	// maxSessions of all users; a login beyond ends the one idle for longest.
	maxSessions = 500
)

// sessions are those of SOAP. The simulator has its own list; this one knows
// when they were used and what they hold, and ends them.
type sessions struct {
	mu   sync.Mutex
	live map[string]*liveSession
}

type liveSession struct {
	session *simulator.Session
	used    time.Time
}

func (l *sessions) touch(session *simulator.Session, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.live == nil {
		l.live = map[string]*liveSession{}
	}
	l.live[session.Key] = &liveSession{session: session, used: now}
}

// stale takes out the sessions that a login at now ends.
func (l *sessions) stale(now time.Time) (keys []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var oldest string
	for key, s := range l.live {
		if now.Sub(s.used) > sessionIdle {
			keys = append(keys, key)
		}
		if oldest == "" || s.used.Before(l.live[oldest].used) {
			oldest = key
		}
	}
	if len(keys) == 0 && len(l.live) >= maxSessions {
		keys = append(keys, oldest)
	}
	return keys
}

func (l *sessions) take(key string) *liveSession {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.live[key]
	delete(l.live, key)
	return s
}

func (l *sessions) has(key string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.live[key] != nil
}

// ofUser are the keys of a user's sessions; empty name: of all.
func (l *sessions) ofUser(name string) (keys []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, s := range l.live {
		if name == "" || s.session.UserName == name {
			keys = append(keys, key)
		}
	}
	return keys
}

// EndSessions ends the SOAP and REST sessions of a user (with the domain), or
// of everyone, as a vCenter that restarts does.
func (s *Server) EndSessions(name string) {
	principal := ""
	if name != "" {
		principal = s.principal(name)
	}
	for _, key := range s.sessions.ofUser(principal) {
		s.endSession(key)
	}
	s.tokens.end(name)
}

// endSession forgets a session and what it holds: watches, views, collectors.
func (s *Server) endSession(key string) {
	live := s.sessions.take(key)
	s.hub.removeSession(key)
	ctx := &simulator.Context{Context: context.Background(), Map: s.vim, Session: &simulator.Session{Registry: simulator.NewRegistry(), Map: s.vim}}
	s.vim.SessionManager().TerminateSession(ctx, &types.TerminateSession{SessionId: []string{key}})
	if live == nil {
		return
	}
	ctx.Session = live.session
	for _, o := range live.session.AllReference("") {
		switch c := o.(type) {
		case *simulator.EventHistoryCollector:
			c.DestroyCollector(ctx, &types.DestroyCollector{This: o.Reference()})
		case *simulator.TaskHistoryCollector:
			c.DestroyCollector(ctx, &types.DestroyCollector{This: o.Reference()})
		}
	}
}

// beforeLogin makes room for one more session.
func (s *Server) beforeLogin() {
	for _, key := range s.sessions.stale(time.Now()) {
		s.endSession(key)
	}
}
