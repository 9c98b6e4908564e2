//go:build failpoints

package failpoint

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Enabled says whether this build has failpoints.
const Enabled = true

// env is the variable that chooses.
const env = "ATOLL_FAILPOINT"

type action int

const (
	kill action = iota
	fail
	sleep
)

// An order is what was asked of one point: to act at the hits from first on,
// count times.
type order struct {
	action action
	first  int
	count  int
	pause  time.Duration
}

var (
	mu     sync.Mutex
	hits   = map[Point]int{}
	orders = sync.OnceValue(func() map[Point]order {
		m, err := parse(os.Getenv(env))
		if err != nil {
			quit(err.Error())
		}
		return m
	})
)

// Hit is where a process may be ended or made to wait.
func Hit(p Point) {
	if o, ok := due(p); ok {
		if o.action == fail {
			quit(fmt.Sprintf("%s cannot give an error", p))
		}
		o.act(p)
	}
}

// Err is like Hit, where the caller can also be given an error.
func Err(p Point) error {
	o, ok := due(p)
	if !ok {
		return nil
	}
	if o.action == fail {
		say(p, "error")
		return fmt.Errorf("failpoint %s: %w", p, errInjected)
	}
	o.act(p)
	return nil
}

var errInjected = errors.New("injected error")

// due counts a hit and reports whether something is to happen at it.
func due(p Point) (order, bool) {
	o, ok := orders()[p]
	if !ok {
		return o, false
	}
	mu.Lock()
	defer mu.Unlock()
	hits[p]++
	n := hits[p]
	return o, n >= o.first && n < o.first+o.count
}

func (o order) act(p Point) {
	if o.action == sleep {
		say(p, "sleep")
		time.Sleep(o.pause)
		return
	}
	say(p, "kill")
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // nothing behind the point happens
}

// say writes past every buffer: the next moment may be the last.
func say(p Point, what string) { fmt.Fprintf(os.Stderr, "failpoint %s: %s\n", p, what) }

func quit(why string) {
	fmt.Fprintf(os.Stderr, "failpoint: %s\n", why)
	os.Exit(3)
}

// parse reads the variable's form; see the package's doc.
func parse(s string) (map[Point]order, error) {
	m := map[Point]order{}
	for part := range strings.SplitSeq(s, ";") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		where, what, ok := strings.Cut(part, "=")
		if !ok {
			return nil, fmt.Errorf("%s: %q is not NAME[@N]=ACTION", env, part)
		}
		o := order{first: 1, count: 1}
		name, nth, counted := strings.Cut(where, "@")
		if counted {
			if n, err := strconv.Atoi(nth); err == nil && n > 0 {
				o.first = n
			} else {
				return nil, fmt.Errorf("%s: %q: hits are counted from 1", env, part)
			}
		}
		if !slices.Contains(All, Point(name)) && !slices.Contains(Volumes, Point(name)) {
			return nil, fmt.Errorf("%s: there is no point %q", env, name)
		}
		if err := o.parseAction(what); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", env, part, err)
		}
		m[Point(name)] = o
	}
	return m, nil
}

func (o *order) parseAction(s string) error {
	what, times, repeated := strings.Cut(s, "*")
	if repeated {
		n, err := strconv.Atoi(times)
		if err != nil || n < 1 {
			return errors.New("an action happens at least once")
		}
		o.count = n
	}
	pause, isSleep := strings.CutPrefix(what, "sleep(")
	switch {
	case what == "kill":
		o.action = kill
	case what == "error":
		o.action = fail
	case isSleep && strings.HasSuffix(pause, ")"):
		o.action = sleep
		var err error
		o.pause, err = time.ParseDuration(strings.TrimSuffix(pause, ")"))
		return err
	default:
		return errors.New("the actions are kill, error and sleep(DURATION)")
	}
	return nil
}
