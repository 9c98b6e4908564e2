package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/cmd/atoll/internal/hostnet"
	"github.com/openatoll/atoll/cmd/atoll/internal/process"
	"github.com/openatoll/atoll/supervisor/login"
)

// Limits on how long a step of `up` may take, generous for a machine without
// KVM and with a slow disk.
const (
	supervisorLimit = 3 * time.Minute
	nodeLimit       = 2 * time.Minute
	addonLimit      = time.Minute
	stopGrace       = 30 * time.Second
)

// Options of `up`.
type Options struct {
	// Isolated is nil to keep what the data directory was made with.
	Isolated *bool
	// NamespacesApart is nil to keep what was chosen before.
	NamespacesApart *bool
	// TokenLifetime of logins, 5 min to 24 h; nil to keep what was chosen before.
	TokenLifetime *time.Duration
	// Node is the Node's name; empty: as recorded, else the host's name.
	Node string
	// Assets are the binaries, guest and images to use.
	Assets Assets
	// Preflight is called before anything is changed, unless all runs.
	Preflight func(ctx context.Context, l Layout, s State) error
	// Progress is told each step as it ends.
	Progress func(Step)
}

// A Step is one thing that was done.
type Step struct {
	// What is a short noun phrase, such as "kube-apiserver".
	What string
	// Detail may be empty.
	Detail string
	Took   time.Duration
}

// Result of an `up`.
type Result struct {
	State State
	// AlreadyUp says that everything ran before.
	AlreadyUp bool
}

// An up is one call of Up.
type up struct {
	Layout
	opt   Options
	state State
	last  time.Time
	// fresh says that nothing ran before, and something was changed since.
	fresh bool
	// undo takes back what this call started beside what ran, last first.
	undo []func(context.Context) error
}

// Up brings the cluster up and returns when pods can be run. What runs
// already is kept; what has died is started again. When it fails it takes
// back what this call did. The caller holds the cluster's Lock.
func Up(ctx context.Context, l Layout, opt Options) (Result, error) {
	u := &up{Layout: l, opt: opt, last: time.Now()}
	if u.opt.Progress == nil {
		u.opt.Progress = func(Step) {}
	}
	state, err := chooseState(l, opt)
	if err != nil {
		return Result{}, err
	}
	u.state = state
	already, err := u.run(ctx)
	if err != nil {
		// Taken back even if ctx has ended, but not for ever.
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		return Result{}, errors.Join(err, u.takeBack(cctx))
	}
	return Result{State: u.state, AlreadyUp: already}, nil
}

// chooseState joins what is recorded and what is asked for.
func chooseState(l Layout, opt Options) (State, error) {
	s, err := ReadState(l)
	if err != nil && !errdefs.IsNotFound(err) {
		return s, err
	}
	if opt.Isolated != nil {
		if s.Isolated != *opt.Isolated && len(Running(l)) > 0 {
			return s, fmt.Errorf("the cluster in %s runs with --isolated=%v; `atoll down` first, or leave the flag out: %w", l.DataDir(), s.Isolated, errdefs.ErrFailedPrecondition)
		}
		s.Isolated = *opt.Isolated
	}
	if opt.NamespacesApart != nil {
		if s.NamespacesApart != *opt.NamespacesApart && len(Running(l)) > 0 {
			return s, fmt.Errorf("the cluster in %s runs with --namespaces-apart=%v; `atoll down` first, or leave the flag out: %w", l.DataDir(), s.NamespacesApart, errdefs.ErrFailedPrecondition)
		}
		s.NamespacesApart = *opt.NamespacesApart
	}
	if opt.TokenLifetime != nil {
		if err := login.CheckTokenLifetime(*opt.TokenLifetime); err != nil {
			return s, err
		}
		was := s.TokenLifetime
		if was == 0 {
			was = login.DefaultTokenLifetime
		}
		if was != *opt.TokenLifetime && len(Running(l)) > 0 {
			return s, fmt.Errorf("the cluster in %s runs with --token-lifetime=%v; `atoll down` first, or leave the flag out: %w", l.DataDir(), was, errdefs.ErrFailedPrecondition)
		}
		s.TokenLifetime = *opt.TokenLifetime
	}
	if opt.Node == "" && s.Node == "" {
		s.Node, err = DefaultNodeName()
		return s, err
	}
	if opt.Node != "" && s.Node != "" && opt.Node != s.Node {
		return s, fmt.Errorf("the node of the cluster in %s is %q, not %q; leave the flag out or use another data directory: %w", l.DataDir(), s.Node, opt.Node, errdefs.ErrFailedPrecondition)
	}
	if s.Node == "" {
		s.Node, err = nodeName(opt.Node)
		return s, err
	}
	return s, nil
}

var components = []string{Supervisor, Spherelet}

// settle waits for components that somebody has killed: until they have ended,
// they have their ports and locks.
func settle(ctx context.Context, l Layout) error {
	for _, name := range components {
		if err := process.Settle(ctx, l.Record(name)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// Running returns the names of the components that run.
func Running(l Layout) []string {
	var names []string
	for _, name := range components {
		if _, ok := process.Running(l.Record(name)); ok {
			names = append(names, name)
		}
	}
	return names
}

func (u *up) step(what, detail string) {
	now := time.Now()
	u.opt.Progress(Step{What: what, Detail: detail, Took: now.Sub(u.last)})
	u.last = now
}

func (u *up) onFailure(f func(context.Context) error) { u.undo = append(u.undo, f) }

// takeBack leaves this host as the call found it: a cluster of which nothing
// ran goes down as a whole, one that was repaired keeps what ran before.
func (u *up) takeBack(ctx context.Context) error {
	if u.fresh {
		return Down(ctx, u.Layout, DownOptions{Assets: u.opt.Assets})
	}
	var errs []error
	for i := len(u.undo) - 1; i >= 0; i-- {
		errs = append(errs, u.undo[i](ctx))
	}
	return errors.Join(errs...)
}

func (u *up) run(ctx context.Context) (already bool, err error) {
	if err := settle(ctx, u.Layout); err != nil {
		return false, err
	}
	if len(Running(u.Layout)) < 2 {
		if u.opt.Preflight != nil {
			if err := u.opt.Preflight(ctx, u.Layout, u.state); err != nil {
				return false, err
			}
			u.step("preflight", "")
		}
	}
	u.fresh = len(Running(u.Layout)) == 0
	if err := u.dataDir(); err != nil {
		return false, err
	}
	if err := u.network(ctx); err != nil {
		return false, err
	}
	sup, supRan, err := u.supervisor(ctx)
	if err != nil {
		return false, err
	}
	ctx, cancel := sup.watched(ctx)
	defer cancel()
	node, nodeRan, err := u.spherelet()
	if err != nil {
		return false, err
	}
	ctx, cancel = node.watched(ctx)
	defer cancel()
	if err := u.ready(ctx, sup, node); err != nil {
		return false, err
	}
	return supRan && nodeRan, nil
}

func (u *up) dataDir() error {
	_, err := os.Stat(u.DataDir())
	fresh := errors.Is(err, fs.ErrNotExist)
	if err := WriteState(u.Layout, u.state); err != nil {
		return err
	}
	if fresh {
		u.step("data directory", u.DataDir())
	}
	return nil
}

// network makes the cluster's network namespace and the node link in it.
func (u *up) network(ctx context.Context) error {
	if u.state.Isolated {
		made, err := hostnet.Ensure(u.NetnsName())
		if err != nil {
			return err
		}
		if made {
			u.step("network namespace", u.NetnsName())
		}
	}
	cfg := ControlPlaneConfig(u.Layout, u.state)
	if err := u.ensureLink(ctx, u.state, cfg.Address, cfg.ServiceCIDR); err != nil {
		return err
	}
	u.step("node link", NodeLink+" "+cfg.Address.String())
	return nil
}

// spherelet starts the node agent unless it runs.
func (u *up) spherelet() (component, bool, error) {
	c := component{name: Spherelet, log: u.Log(Spherelet)}
	if id, ok := process.Running(u.Record(Spherelet)); ok {
		c.id = id
		return c, true, nil
	}
	if err := writeSphereletConfig(u.Layout, u.state, u.opt.Assets); err != nil {
		return c, false, err
	}
	u.onFailure(func(ctx context.Context) error {
		// The VMs stay: they may have run before this call.
		_, err := stopComponent(ctx, u.Layout, Spherelet, stopGrace)
		return err
	})
	c, err := start(u.Layout, Spherelet, []string{u.opt.Assets.Spherelet(), "--config", u.SphereletConfig(u.state.Node)})
	if err != nil {
		return c, false, err
	}
	u.step("spherelet", "pid "+strconv.Itoa(c.id.PID))
	return c, false, nil
}
