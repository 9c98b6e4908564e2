package cri

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/openatoll/atoll/vmpod"
)

// waiter takes a turn behind the test's back and notes when it has it.
func waiter(t *testing.T, turns *turns, ctx context.Context, name string, ahead bool, got *[]string, done map[string]func()) {
	t.Helper()
	go func() {
		give, err := turns.take(ctx, nil, ahead)
		if err != nil {
			*got = append(*got, name+": "+err.Error())
			return
		}
		*got, done[name] = append(*got, name), give
	}()
	synctest.Wait()
}

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		turns, clock := newTurns(2, 5*time.Second), newStartClock()
		ctx, cancel := context.WithCancelCause(t.Context())
		var got []string
		done := map[string]func(){}
		said := func(want ...string) {
			t.Helper()
			synctest.Wait()
			if len(got) != len(want) {
				t.Fatalf("turns of %q, want %q", got, want)
			}
			for i := range want {
				if got[i] != want[i] {
					t.Fatalf("turns of %q, want %q", got, want)
				}
			}
		}
		waiter(t, turns, t.Context(), "a", false, &got, done)
		waiter(t, turns, t.Context(), "b", true, &got, done)
		waiter(t, turns, t.Context(), "c", false, &got, done)
		waiter(t, turns, ctx, "d", false, &got, done)
		waiter(t, turns, t.Context(), "e", false, &got, done)
		waiter(t, turns, t.Context(), "f", true, &got, done)
		said("a", "b")
		done["a"]() // f goes before those that begin
		done["a"]() // gives nothing more
		said("a", "b", "f")
		cancel(errors.New("gone"))
		said("a", "b", "f", "d: gone")
		done["f"]()
		said("a", "b", "f", "d: gone", "c")
		time.Sleep(5 * time.Second) // b's and c's turns are over
		said("a", "b", "f", "d: gone", "c", "e")
		done["b"]() // too late, and gives nothing
		done["c"]()
		if _, err := turns.take(t.Context(), clock, false); err != nil { // e has the other
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := turns.take(t.Context(), clock, false); err != nil || time.Since(start) != 5*time.Second {
			t.Fatalf("a turn that is not free: after %s, %v", time.Since(start), err)
		}
		if s, _ := clock.finish(time.Time{}, time.Now()); s.Total(vmpod.PhaseQueue) != 5*time.Second {
			t.Errorf("the clock has %s of waiting", s.Total(vmpod.PhaseQueue))
		}
		time.Sleep(5 * time.Second) // no timer outlives the test
	})
	give, err := newTurns(0, time.Second).take(t.Context(), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	give()
}
