package keylock

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l Locks[string]
		lock := func(key string) func() {
			t.Helper()
			unlock, err := l.Lock(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			return unlock
		}
		unlock := lock("a")
		lock("b")() // is another's
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := l.Lock(ended, "a"); !errors.Is(err, context.Canceled) {
			t.Errorf("a caller whose time is over: %v", err)
		}
		inside, most, done := 0, 0, 0
		for range 3 {
			go func() {
				free := lock("a")
				inside++
				most = max(most, inside)
				time.Sleep(time.Second) // the others come
				inside--
				done++
				free()
			}()
		}
		synctest.Wait()
		if inside != 0 || done != 0 {
			t.Fatalf("%d inside, %d done while the lock was held", inside, done)
		}
		unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		if done != 3 || most != 1 {
			t.Errorf("%d done, %d at once", done, most)
		}
		if len(l.held) != 0 {
			t.Errorf("%d locks are kept", len(l.held))
		}
	})
}
