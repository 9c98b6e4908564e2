package namespaces

import (
	"testing"
	"time"

	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

// Nothing is kept of a namespace that is gone: names come and go for years.
func TestForget(t *testing.T) {
	r := &reconciler{conn: &connection{usage: map[string]time.Time{}}, failures: map[string]int{}, written: map[string]uint64{}}
	r.conn.setLastUsage("shop", time.Now())
	r.failures["shop"], r.written["shop"] = 1, 1
	r.forget("shop")
	if len(r.conn.usage)+len(r.failures)+len(r.written) != 0 {
		t.Errorf("kept: usage %v, failures %v, written %v", r.conn.usage, r.failures, r.written)
	}
}

// asked is a vCenter that says at each question whether it is connected.
type asked struct {
	VCenter
	connected []bool
}

func (a *asked) Health() vc.Health {
	now := a.connected[0]
	a.connected = a.connected[1:]
	return vc.Health{Connected: now}
}

// A namespace that finds a new connection lost is not forgotten: it is looked at
// when vCenter is back, or at once if that was in the meantime.
func TestNamespaceAwaitsANewConnection(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct {
		age       time.Duration
		connected []bool
		wait      bool
		awaited   bool
	}{
		"there":          {time.Second, []bool{true}, false, false},
		"lost":           {time.Second, []bool{false, false}, true, true},
		"back meanwhile": {time.Second, []bool{false, true}, false, true},
		"lost for long":  {settleTime, nil, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := &connection{vcenter: &asked{connected: tt.connected}, since: now.Add(-tt.age)}
			if wait := c.awaitSettled(now); wait != tt.wait || c.takeAwaited() != tt.awaited {
				t.Errorf("waits: %v", wait)
			}
		})
	}
}
