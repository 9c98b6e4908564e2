package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
	"github.com/openatoll/atoll/cmd/atoll/internal/process"
	"github.com/openatoll/atoll/supervisor/controlplane"
)

// A report is one line that a starting supervisor writes to its caller.
type report struct {
	Phase  string        `json:"phase,omitempty"`
	Detail string        `json:"detail,omitempty"`
	Took   time.Duration `json:"took,omitempty"`
	// Error is the last thing said when it gives up.
	Error string `json:"error,omitempty"`
}

// A Reporter tells the `up` that started this supervisor how it gets on.
// That `up` may be gone: nothing that is reported is ever waited for.
type Reporter struct{ w io.WriteCloser }

// NewReporter returns the reporter to the caller's end of descriptor fd; one
// that tells nobody if fd is below 3.
func NewReporter(fd int) *Reporter {
	if fd < 3 {
		return &Reporter{}
	}
	return &Reporter{w: os.NewFile(uintptr(fd), "progress")}
}

// Phase reports a completed phase; after the last one the channel is closed.
func (r *Reporter) Phase(p controlplane.Phase) {
	r.send(report{Phase: p.Name, Detail: p.Detail, Took: p.Took})
	if p.Name == controlplane.PhaseReady && r.w != nil {
		_ = r.w.Close()
		r.w = nil
	}
}

// Fail reports why the supervisor gives up.
func (r *Reporter) Fail(err error) { r.send(report{Error: err.Error()}) }

func (r *Reporter) send(rep report) {
	if r.w == nil {
		return
	}
	b, err := json.Marshal(rep)
	if err == nil {
		_, _ = r.w.Write(append(b, '\n'))
	}
}

// supervisor starts the control plane unless it runs, and waits until it is
// ready.
func (u *up) supervisor(ctx context.Context) (component, bool, error) {
	cfg := ControlPlaneConfig(u.Layout, u.state)
	c := component{name: Supervisor, log: u.Log(Supervisor)}
	if id, ok := process.Running(u.Record(Supervisor)); ok {
		c.id = id
		return c, true, u.awaitHealthy(ctx, c, cfg)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return c, false, err
	}
	defer r.Close()
	self, err := os.Executable()
	if err != nil {
		w.Close()
		return c, false, err
	}
	u.onFailure(func(ctx context.Context) error {
		_, err := stopComponent(ctx, u.Layout, Supervisor, stopGrace)
		return err
	})
	// Born inside the cluster's network namespace.
	err = hostnet.Do(u.state.Netns(u.Layout), func() (err error) {
		argv := []string{self, "supervisor", "--data-dir", u.DataDir(), "--progress-fd", "3"}
		if u.opt.Assets.Images != "" {
			argv = append(argv, "--images", u.opt.Assets.Images)
		}
		c, err = start(u.Layout, Supervisor, argv, w)
		return err
	})
	w.Close()
	if err != nil {
		return c, false, err
	}
	return c, false, u.followReports(ctx, c, r)
}

// followReports shows the phases until the last; the pipe's end without it
// means that the supervisor has died.
func (u *up) followReports(ctx context.Context, c component, r *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, supervisorLimit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = r.SetReadDeadline(time.Now()) })
	defer stop()
	for dec := json.NewDecoder(r); ; {
		var rep report
		if err := dec.Decode(&rep); err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("not ready after %v: %w", supervisorLimit, ctx.Err())
			} else {
				err = errors.New("ended before it was ready")
			}
			return c.fail(err)
		}
		if rep.Error != "" {
			return c.fail(errors.New(rep.Error))
		}
		u.opt.Progress(Step{What: rep.Phase, Detail: rep.Detail, Took: rep.Took})
		u.last = time.Now()
		if rep.Phase == controlplane.PhaseReady {
			return nil
		}
	}
}

// awaitHealthy waits for a control plane that another `up` has started.
func (u *up) awaitHealthy(ctx context.Context, c component, cfg controlplane.Config) error {
	ctx, cancel := c.watched(ctx)
	defer cancel()
	err := until(ctx, supervisorLimit, 200*time.Millisecond, func(ctx context.Context) error {
		return Unhealthy(controlplane.Health(ctx, cfg))
	})
	if err != nil {
		return c.fail(err)
	}
	u.step(Supervisor, "runs already, pid "+strconv.Itoa(c.id.PID))
	return nil
}

// Unhealthy returns an error that names the components that are not well.
func Unhealthy(components []controlplane.ComponentHealth) error {
	var errs []error
	for _, c := range components {
		if !c.Healthy {
			errs = append(errs, fmt.Errorf("%s: %s", c.Name, c.Message))
		}
	}
	return errors.Join(errs...)
}
