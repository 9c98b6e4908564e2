package cri

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A guest whose agent breaks the protocol loses the session; one that does so
// maxWrongs times within wrongsWithin is given up, as what it says next is
// not worth an attach each. One wrong alone is not the end: no honest agent
// is known to do it, and none that has a flaw should cost its pod a restart.
const (
	maxWrongs    = 3
	wrongsWithin = time.Minute
)

// A wrongCount decides, with the times it is given, when a guest is given up.
type wrongCount []time.Time

// add notes one wrong and returns true when it was one too many.
func (w *wrongCount) add(now time.Time) bool {
	recent := (*w)[:0]
	for _, at := range *w {
		if now.Sub(at) < wrongsWithin {
			recent = append(recent, at)
		}
	}
	*w = append(recent, now)
	return len(*w) >= maxWrongs
}

// blame looks at why a session, or the attempt to begin one, has ended. It
// ends the link for good when the guest has done wrong too often.
func (l *link) blame(wrongs *wrongCount, err error) {
	if !errors.Is(err, agentapi.ErrMisbehaved) {
		return
	}
	last := clip(err.Error(), 1024)
	l.log.Warn("the guest's agent broke the protocol", "err", last)
	if wrongs.add(time.Now()) {
		l.cancel(fmt.Errorf("%w %d times within %s, the last time so: %s", errAgentMisbehaved, maxWrongs, wrongsWithin, last))
	}
}

var errAgentMisbehaved = errors.New("the guest's agent broke the protocol")

// watchManners gives the pod up when its link was ended for the agent's wrongs.
func (p *pod) watchManners() {
	select {
	case <-p.link.ctx.Done():
	case <-p.ctx.Done():
		return
	}
	if cause := context.Cause(p.link.ctx); errors.Is(cause, errAgentMisbehaved) {
		p.giveUp(vmpod.ExitAgentWrong, cause.Error())
	}
}
