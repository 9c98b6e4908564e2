package login

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestLockout reads as what happens, second by second.
func TestLockout(t *testing.T) {
	const here, there = "192.0.2.1", "192.0.2.2"
	for name, script := range map[string]string{
		"five wrong ones lock, for this address, for five minutes": `
			0 ada here wrong
			1 ada here wrong
			2 ada here wrong
			3 ada here wrong
			4 ada here wrong
			5 ada here locked 299s
			5 ada there right
			5 bob here right
			303 ada here locked 1s
			304 ada here right`,
		"a right one takes the wrong ones back": `
			0 ada here wrong
			0 ada here wrong
			0 ada here wrong
			0 ada here wrong
			1 ada here right
			2 ada here wrong
			2 ada here wrong
			2 ada here wrong
			2 ada here wrong
			3 ada here right`,
		"wrong ones are forgotten after three minutes": `
			0 ada here wrong
			0 ada here wrong
			0 ada here wrong
			0 ada here wrong
			180 ada here wrong
			181 ada here right`,
		"what nobody knows does not count": `
			0 ada here unknown
			0 ada here unknown
			0 ada here unknown
			0 ada here unknown
			0 ada here unknown
			0 ada here unknown
			1 ada here right`,
	} {
		t.Run(name, func(t *testing.T) {
			var l lockout
			for line := range strings.Lines(strings.TrimSpace(script)) {
				f := strings.Fields(line)
				var at int
				fmt.Sscan(f[0], &at)
				now := epoch.Add(time.Duration(at) * time.Second)
				from := map[string]string{"here": here, "there": there}[f[2]]
				a, err := l.begin(f[1], from, now)
				if f[3] == "locked" {
					var wait *waitError
					if !errors.As(err, &wait) || wait.wait.String() != (map[string]string{"299s": "4m59s", "1s": "1s"})[f[4]] || !errdefs.IsResourceExhausted(err) {
						t.Fatalf("%s: %v", strings.TrimSpace(line), err)
					}
					continue
				}
				if err != nil {
					t.Fatalf("%s: %v", strings.TrimSpace(line), err)
				}
				switch f[3] {
				case "right":
					a.right(now)
				case "unknown":
					a.unknown()
				}
			}
		})
	}
}

// TestManyAtOnce: tries in flight count, so guessing side by side is no way
// around the lock; and the one of them that is right opens it.
func TestManyAtOnce(t *testing.T) {
	var l lockout
	var tries []*attempt
	for range 100 {
		if a, err := l.begin("ada", "192.0.2.1", epoch); err == nil {
			tries = append(tries, a)
		}
	}
	if len(tries) != maxFailures {
		t.Fatalf("%d tries were let through, want %d", len(tries), maxFailures)
	}
	tries[2].right(epoch)
	if _, err := l.begin("ada", "192.0.2.1", epoch); err != nil {
		t.Errorf("after a right one: %v", err)
	}
}

// TestSpraying: one address for many users, many addresses for one user, and
// logins without end are all stopped.
func TestSpraying(t *testing.T) {
	var l lockout
	count := func(user, from func(int) string, right bool) (n int) {
		for i := range 200 {
			a, err := l.begin(user(i), from(i), epoch)
			if err != nil {
				continue
			}
			if right {
				a.right(epoch)
			}
			n++
		}
		return n
	}
	one := func(s string) func(int) string { return func(int) string { return s } }
	each := func(s string) func(int) string { return func(i int) string { return fmt.Sprint(s, i) } }
	if n := count(each("u"), one("a"), false); n != maxAddressFailures {
		t.Errorf("one address tried %d users", n)
	}
	if n := count(one("v"), each("b"), false); n != maxUserFailures {
		t.Errorf("one user was tried from %d addresses", n)
	}
	if n := count(one("w"), each("c"), true); n != maxLogins {
		t.Errorf("one user signed in %d times", n)
	}
}

// TestBounded: the table does not grow with what strangers send, and they do
// not open a lock by filling it.
func TestBounded(t *testing.T) {
	var l lockout
	for range maxFailures {
		if _, err := l.begin("ada", "192.0.2.1", epoch); err != nil {
			t.Fatal(err)
		}
	}
	for i := range maxCounters + maxCounters/2 {
		_, _ = l.begin(fmt.Sprint("u", i), fmt.Sprint("a", i), epoch)
	}
	if n := len(l.counters); n > maxCounters {
		t.Errorf("%d counters", n)
	}
	if _, err := l.begin("ada", "192.0.2.1", epoch); err == nil {
		t.Error("the lock was opened")
	}
}
