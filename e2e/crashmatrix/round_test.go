package crashmatrix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	fp "github.com/openatoll/atoll/internal/failpoint"
)

// A result is one row of the table.
type result struct {
	visit
	op                            operation
	died, retry, orphans, noticed string // "" is well
	recovery                      time.Duration
}

func (r result) ok() bool { return r.died+r.retry+r.orphans+r.noticed == "" }

// A round is one pod's life, with a crash in every operation that has one.
type round struct {
	t         *testing.T
	node      *node
	registry  *testRegistry
	neighbour *neighbour
	image     imageFixture
	number    int
	visits    map[operation]visit
	report    func(result)

	pod       *pod
	main      *runtimeapi.ContainerConfig
	container string          // main's ID
	fresh     *csiVolume      // the pod's own
	intents   map[string]bool // that may be open when the daemon is killed
	released  bool            // the pod is stopped
}

// errRound ends a round whose pod is beyond use.
var errRound = errors.New("the round ends")

func (r *round) run() {
	r.pod = r.node.newPod(fmt.Sprintf("%sround-%d", uidPrefix(), r.number))
	r.intents = map[string]bool{}
	for _, step := range []func() error{r.pulls, r.recovers, r.prepares, r.forgets, r.runs, r.createsVolumes, r.creates, r.starts, r.expandsVolume, r.stops, r.removes, r.stopsPod, r.removesPod, r.deletesVolume, r.removesImage} {
		if err := step(); err != nil {
			if !errors.Is(err, errRound) {
				r.t.Errorf("round %d: %v", r.number, err)
			}
			r.clear()
			return
		}
	}
}

// clear takes what a failed round left out of the next one's way.
func (r *round) clear() {
	r.node.kill() // it may be armed, or dead
	if _, err := r.node.start(""); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), rpcTimeout)
	defer cancel()
	if v, err := r.node.look(ctx); err == nil {
		if s := v.sandboxOf(r.pod.uid()); s != nil {
			r.pod.sandbox = s.Id
			_ = r.node.removePod(ctx, r.pod)
		}
	}
	r.clearVolumes(ctx)
	_ = r.node.hint(ctx, "/forget?uid="+r.pod.uid(), nil)
	_ = r.node.removeImage(ctx, r.image.ref)
}

// do does an operation: with the crash that the round has for it and once
// more, or just once.
func (r *round) do(op operation, act func(context.Context) error) error {
	v, crash := r.visits[op]
	if !crash {
		return r.once(op, act)
	}
	return r.crash(op, v, act, act)
}

func (r *round) once(op operation, act func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(r.t.Context(), rpcTimeout)
	defer cancel()
	if err := act(ctx); err != nil {
		return fmt.Errorf("%s, without a crash: %w", op, err)
	}
	return nil
}

// crash is one cell of the matrix. An error says that the round cannot go on.
func (r *round) crash(op operation, v visit, act, again func(context.Context) error) error {
	res := result{visit: v, op: op}
	err := r.cell(&res, act, again)
	return r.done(res, err)
}

// done reports a cell; err is what kept it from being looked at to its end.
func (r *round) done(res result, err error) error {
	if err != nil && res.retry == "" {
		res.retry = err.Error()
	}
	r.report(res)
	if !res.ok() {
		return errRound
	}
	return nil
}

func (r *round) cell(res *result, act, again func(context.Context) error) error {
	if err := r.arm(res.visit); err != nil {
		return err
	}
	acted := make(chan error, 1)
	ctx, cancel := context.WithTimeout(r.t.Context(), rpcTimeout)
	defer cancel()
	go func() { acted <- act(ctx) }()
	if err := r.node.awaitDeath(res.visit, patience); err != nil {
		res.died = err.Error()
		return nil
	}
	cancel()
	<-acted
	return r.comeBack(res, again)
}

// arm starts the daemon anew, with a point armed, and looks at the records
// meanwhile.
func (r *round) arm(v visit) error {
	if err := r.rest(); err != nil {
		return err
	}
	died, err := r.node.start(fmt.Sprintf("%s@%d=kill", v.point, max(v.nth, 1)))
	if died {
		err = fmt.Errorf("the daemon, armed with %s, died at its start:\n%s", v.point, r.node.tail())
	}
	if err != nil || !clones(string(v.point)) {
		return err
	}
	// There must be what the pod can be cloned from.
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*patience)
	defer cancel()
	what := fmt.Sprintf(`"template is ready" cpus=1 memory=%d`, podMemory)
	if v.point == fp.CloneClaimed {
		what = `"clone waits for a pod"`
	}
	return r.awaitSaid(ctx, what)
}

// rest kills the daemon while nothing is asked of it, and compares what it
// said with what it wrote and with what the guests know.
func (r *round) rest() error {
	ctx, cancel := context.WithTimeout(r.t.Context(), rpcTimeout)
	defer cancel()
	v, err := r.node.look(ctx)
	if err != nil {
		return err
	}
	r.node.kill()
	for _, w := range append(r.node.recordsAgree(v, r.intents), r.node.guestsAgree(ctx, v)...) {
		r.t.Errorf("round %d: %s", r.number, w)
	}
	return nil
}

// comeBack starts the daemon as it should be, and looks at what it makes of
// the crash.
func (r *round) comeBack(res *result, again func(context.Context) error) error {
	began := time.Now()
	if died, err := r.node.start(""); died || err != nil {
		return fmt.Errorf("after %s the daemon does not start: %v\n%s", res.point, err, r.node.tail())
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), 3*rpcTimeout)
	defer cancel()
	v, err := r.node.look(ctx)
	if err == nil {
		err = r.neighbour.states(v) // at the first answer already
	}
	if err != nil {
		res.noticed = err.Error()
	}
	if wrong := r.settle(ctx, false); len(wrong) > 0 {
		res.orphans = strings.Join(wrong, "; ")
	}
	res.recovery = time.Since(began)
	if err := again(ctx); err != nil {
		res.retry = err.Error()
		return nil
	}
	if wrong := r.settle(ctx, r.released); len(wrong) > 0 && res.orphans == "" {
		res.orphans = "after the retry: " + strings.Join(wrong, "; ")
	}
	if err := r.neighbour.undisturbed(ctx); err != nil && res.noticed == "" {
		res.noticed = err.Error()
	}
	return nil
}

// settlePatience bounds how long the daemon may have something on the host
// that its records do not explain.
const settlePatience = 30 * time.Second

// settle waits until the host has what the records say, and nothing else.
func (r *round) settle(ctx context.Context, released bool) []string {
	for deadline := time.Now().Add(settlePatience); ; time.Sleep(20 * time.Millisecond) {
		v, err := r.node.look(ctx)
		if err != nil {
			return []string{err.Error()}
		}
		e := r.node.expect(v, released, r.registry)
		for key := range r.intents {
			if !e.pods[key] { // being prepared: anything may be there
				return nil
			}
		}
		wrong := r.node.wrong(e)
		if len(wrong) == 0 || time.Now().After(deadline) {
			return wrong
		}
	}
}

func (r *round) pulls() error {
	return r.do(pullImage, func(ctx context.Context) error { return r.node.pull(ctx, r.image.ref) })
}

// recovers lets the daemon die with a VM half made, and then once more while
// it takes that back.
func (r *round) recovers() error {
	v, crash := r.visits[recoverOp]
	if !crash {
		return nil
	}
	first := visit{fp.RunLaunched, 1}
	if err := r.arm(first); err != nil {
		return err
	}
	if err := r.once(recoverOp, func(ctx context.Context) error { return r.node.hint(ctx, "/prepare", r.pod.hint()) }); err != nil {
		return err
	}
	if err := r.node.awaitDeath(first, patience); err != nil {
		return err
	}
	res := result{visit: v, op: recoverOp}
	if v.point == fp.MasterFormatted || v.point == fp.MasterNamed { // met by the first start alone
		if err := os.RemoveAll(filepath.Join(r.node.data, "disks/.masters")); err != nil {
			return err
		}
	}
	if _, err := r.node.start(fmt.Sprintf("%s@%d=kill", v.point, max(v.nth, 1))); err != nil {
		return err
	}
	if err := r.node.awaitDeath(v, patience); err != nil {
		res.died = err.Error()
		return r.done(res, nil)
	}
	err := r.comeBack(&res, func(context.Context) error { return nil })
	return r.done(res, err)
}

// prepares is what the kubelet's admission does.
func (r *round) prepares() error {
	v, crash := r.visits[prepareOp]
	if !crash {
		return nil
	}
	prepare := func(ctx context.Context) error { return r.node.hint(ctx, "/prepare", r.pod.hint()) }
	return r.crash(prepareOp, v, prepare, func(ctx context.Context) error {
		r.intents[r.pod.key()] = true // until the sandbox runs
		return prepare(ctx)
	})
}

// forgets lets go of a VM that was prepared, after all.
func (r *round) forgets() error {
	v, crash := r.visits[forgetOp]
	if !crash {
		return nil
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), 3*patience)
	defer cancel()
	// What an earlier crash had prepared goes first, or the start would take
	// it back and meet the point.
	if r.intents[r.pod.key()] {
		err := r.awaitSaid(ctx, `"pod VM is up" pod_uid=`+r.pod.uid())
		if err == nil {
			err = r.node.hint(ctx, "/forget?uid="+r.pod.uid(), nil)
		}
		if err == nil {
			err = r.awaitSaid(ctx, `"unused pod VM taken back" pod_uid=`+r.pod.uid())
		}
		if err != nil {
			return err
		}
		clear(r.intents)
	}
	if wrong := r.settle(ctx, false); len(wrong) > 0 {
		return fmt.Errorf("a forgotten pod: %s", strings.Join(wrong, "; "))
	}
	if err := r.arm(v); err != nil {
		return err
	}
	res := result{visit: v, op: forgetOp}
	if err := r.node.hint(ctx, "/prepare", r.pod.hint(r.image.ref)); err != nil {
		return err
	}
	if err := r.awaitSaid(ctx, `"pod VM is up" pod_uid=`+r.pod.uid()); err != nil {
		return err
	}
	_ = r.node.hint(ctx, "/forget?uid="+r.pod.uid(), nil) // the answer may come too late
	if err := r.node.awaitDeath(v, patience); err != nil {
		res.died = err.Error()
		return r.done(res, nil)
	}
	err := r.comeBack(&res, func(ctx context.Context) error { return r.node.hint(ctx, "/forget?uid="+r.pod.uid(), nil) })
	return r.done(res, err)
}

// awaitSaid waits until the daemon has logged something.
func (r *round) awaitSaid(ctx context.Context, what string) error {
	for !strings.Contains(r.node.tail(), what) {
		select {
		case <-r.node.ended:
			return fmt.Errorf("the daemon died before it said %s:\n%s", what, r.node.tail())
		case <-ctx.Done():
			return fmt.Errorf("the daemon never said %s:\n%s", what, r.node.tail())
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

func (r *round) runs() error {
	run := func(ctx context.Context) error { return r.node.runPod(ctx, r.pod) }
	first := run
	if r.visits[runPod].point == fp.RunClaimed {
		first = func(ctx context.Context) error {
			if err := r.node.hint(ctx, "/prepare", r.pod.hint()); err != nil {
				return err
			}
			return run(ctx)
		}
	}
	v, crash := r.visits[runPod]
	done := func(ctx context.Context) error {
		err := run(ctx)
		clear(r.intents)
		return err
	}
	if !crash {
		return r.once(runPod, done)
	}
	return r.crash(runPod, v, first, done)
}

func (r *round) creates() (err error) {
	r.main, err = r.node.container(r.pod, "main", r.image.ref, `trap 'echo bye; exit 7' TERM; `+r.volumeScript()+`echo started; while :; do sleep 0.1; done`)
	if err != nil {
		return err
	}
	if err := r.publishes(); err != nil {
		return err
	}
	return r.do(createContainer, func(ctx context.Context) (err error) {
		id, err := r.node.create(ctx, r.pod, r.main)
		if err == nil {
			r.container = id
		}
		return err
	})
}

func (r *round) starts() error {
	if err := r.do(startContainer, func(ctx context.Context) error { return r.node.startContainer(ctx, r.container) }); err != nil {
		return err
	}
	if err := r.logHas("started"); err != nil {
		return err
	}
	r.node.keptRounds++
	return nil
}

// logHas waits until the container's log has these lines, and no others.
func (r *round) logHas(want ...string) error {
	var have []string
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		have = nil
		text, err := os.ReadFile(r.pod.logFile(r.main))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) == 4 {
				have = append(have, f[3])
			}
		}
		if strings.Join(have, " ") == strings.Join(want, " ") {
			return nil
		}
		if len(have) > len(want) || time.Now().After(deadline) {
			return fmt.Errorf("the container's log is %q, must be %q", have, want)
		}
	}
}

func (r *round) stops() error {
	err := r.do(stopContainer, func(ctx context.Context) error {
		_, err := r.node.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: r.container, Timeout: 30})
		return err
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), rpcTimeout)
	defer cancel()
	st, err := r.node.status(ctx, r.container)
	if err != nil {
		return err
	}
	if st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 7 {
		return fmt.Errorf("the stopped container is %s with code %d (%s), must have exited with 7", st.State, st.ExitCode, st.Reason)
	}
	return r.logHas("started", "bye")
}

func (r *round) removes() error {
	return r.do(removeContainer, func(ctx context.Context) error {
		_, err := r.node.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: r.container})
		return err
	})
}

// stopsPod stops the pod with a container running.
func (r *round) stopsPod() error {
	late := ""
	if _, crash := r.visits[stopPod]; crash {
		c, err := r.node.container(r.pod, "late", r.image.ref, "while :; do sleep 1; done")
		if err != nil {
			return err
		}
		err = r.once(createContainer, func(ctx context.Context) (err error) {
			if late, err = r.node.create(ctx, r.pod, c); err != nil {
				return err
			}
			return r.node.startContainer(ctx, late)
		})
		if err != nil {
			return err
		}
	}
	err := r.do(stopPod, func(ctx context.Context) error {
		err := r.node.stopPod(ctx, r.pod)
		r.released = err == nil
		return err
	})
	if err != nil || late == "" {
		return err
	}
	ctx, cancel := context.WithTimeout(r.t.Context(), rpcTimeout)
	defer cancel()
	st, err := r.node.status(ctx, late)
	if err == nil && (st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 137) {
		err = fmt.Errorf("the killed container is %s with code %d, must have exited with 137", st.State, st.ExitCode)
	}
	return err
}

func (r *round) removesPod() error {
	return r.do(removePod, func(ctx context.Context) error { return r.node.removePod(ctx, r.pod) })
}

func (r *round) removesImage() error {
	return r.do(removeImage, func(ctx context.Context) error { return r.node.removeImage(ctx, r.image.ref) })
}
