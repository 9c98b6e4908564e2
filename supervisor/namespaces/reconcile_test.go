package namespaces

import (
	"testing"
	"time"
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
