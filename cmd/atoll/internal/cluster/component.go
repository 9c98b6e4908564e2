package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/openatoll/atoll/cmd/atoll/internal/process"
)

// The components of a cluster that are processes of their own.
const (
	Supervisor = "supervisor"
	Spherelet  = "spherelet"
)

// A component is one running process of a cluster.
type component struct {
	name string
	id   process.Identity
	log  string
	// from is the log's length when the process was started by this call.
	from int64
	// since is when that was; zero if it ran before.
	since time.Time
}

// A ComponentError says that a component did not come up, with the lines of
// its log that tell why.
type ComponentError struct {
	Component string
	Log       string
	Lines     []string
	Err       error
}

func (e *ComponentError) Error() string { return fmt.Sprintf("%s: %v", e.Component, e.Err) }
func (e *ComponentError) Unwrap() error { return e.Err }

// fail wraps an error with what the component logged since it was started.
func (c component) fail(err error) error {
	return &ComponentError{Component: c.name, Log: c.log, Lines: tellingLines(c.log, c.from, 12), Err: err}
}

// start starts a component and records it. extra files are passed from
// descriptor 3 on.
func start(l Layout, name string, argv []string, extra ...*os.File) (component, error) {
	c := component{name: name, log: l.Log(name)}
	if err := os.MkdirAll(l.LogDir(), 0o700); err != nil {
		return c, fmt.Errorf("start %s: %w", name, err)
	}
	if err := os.MkdirAll(l.RunDir(), 0o700); err != nil {
		return c, fmt.Errorf("start %s: %w", name, err)
	}
	if st, err := os.Stat(c.log); err == nil {
		c.from = st.Size()
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = componentEnv()
	cmd.ExtraFiles = extra
	c.since = time.Now()
	id, err := process.Start(cmd, c.log, l.Record(name))
	if err != nil {
		return c, fmt.Errorf("start %s: %w", name, err)
	}
	c.id = id
	return c, nil
}

// componentEnv is the little that daemons need of the caller's environment:
// proxies, for pulls, and where programs are.
func componentEnv() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"}
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		switch strings.ToUpper(name) {
		case "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "GOTRACEBACK", "GOMEMLIMIT", "GOGC", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR":
			env = append(env, kv)
		}
	}
	return env
}

// watched returns a context that ends, with the component's error as its
// cause, when the component does.
func (c component) watched(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		if c.id.Wait(ctx) == nil {
			cancel(c.fail(errors.New("it ended")))
		}
	}()
	return ctx, func() { cancel(nil) }
}

// telling matches the log lines that tell why a process gave up: klog's
// errors, slog's, panics and plain "error:".
var telling = regexp.MustCompile(`^[EF]\d{4} |level=ERROR|"level":"(error|ERROR)"|^panic:|^fatal error|(?i)^(atoll|spherelet|error)\b.*:`)

// tellingLines returns at most n lines of a log after offset from: those that
// tell of an error, or else the last ones.
func tellingLines(file string, from int64, n int) []string {
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	// What a process said last matters; a megabyte of it is plenty.
	if st, err := f.Stat(); err == nil && st.Size()-from > 1<<20 {
		from = st.Size() - 1<<20
	}
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return nil
	}
	var last, errs []string
	sc := bufio.NewScanner(f)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		if len(line) > 500 {
			line = line[:500] + "…"
		}
		last = keep(last, line, n)
		if telling.MatchString(line) {
			errs = keep(errs, line, n)
		}
	}
	if len(errs) > 0 {
		return errs
	}
	return last
}

func keep(lines []string, line string, n int) []string {
	lines = append(lines, line)
	if len(lines) > n {
		lines = lines[1:]
	}
	return lines
}

// stopComponent ends a recorded process and forgets it.
func stopComponent(ctx context.Context, l Layout, name string, grace time.Duration) (killed bool, err error) {
	id, ok := process.Running(l.Record(name))
	if ok {
		killed, err = id.Stop(ctx, grace)
	} else {
		err = process.Settle(ctx, l.Record(name))
	}
	if err != nil {
		return killed, fmt.Errorf("stop %s: %w", name, err)
	}
	if err := os.Remove(l.Record(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return killed, err
	}
	return killed, nil
}
