package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
	"sigs.k8s.io/yaml"
)

const (
	// calm bounds how long after all was back the next kill may come.
	calm = 4 * time.Second
	// early bounds how long after a start the kill comes when it does not
	// wait until all is back; one kill in earlyOneIn does not.
	early      = 2500 * time.Millisecond
	earlyOneIn = 5
	// checkTime is what the checks after the last kill may need of the run's
	// time.
	checkTime = 6 * time.Minute
	// settleLimit is how long what was half made may stay after the last
	// kill: spherelet leaves what it does not know alone for a minute.
	settleLimit = 150 * time.Second
)

// A trial is the run inside the cluster.
type trial struct {
	o        options
	c        *client
	a        *agent
	f        *findings
	rng      *rand.Rand
	data     string
	nodeDir  string
	cgroup   string
	target   target
	steady   []*corev1.Pod
	machines map[string]vm
	recovery []recovery
}

func inside(ctx context.Context, in handover) error {
	ctx, cancel := context.WithTimeoutCause(ctx, in.Options.Timeout, fmt.Errorf("the run took longer than %s", in.Options.Timeout))
	defer cancel()
	t, err := newTrial(in)
	if err != nil {
		return err
	}
	r, err := t.run(ctx)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return err
	}
	return r.writeJSON(in.Result)
}

func newTrial(in handover) (*trial, error) {
	klog.SetLogger(logr.Discard()) // a connection that broke is no news here
	c, err := newClient(filepath.Join(in.Data, "kubeconfig"))
	if err != nil {
		return nil, err
	}
	a, err := findAgent(filepath.Join(in.Options.Bin, "atoll"), in.Data)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(a.argv[slices.Index(a.argv, "--config")+1])
	if err != nil {
		return nil, err
	}
	var config struct{ NodeName, DataDir, RunDir string }
	if err := yaml.Unmarshal(text, &config); err != nil {
		return nil, err
	}
	return &trial{
		o: in.Options, c: c, a: a, data: in.Data, nodeDir: config.DataDir,
		cgroup: "atoll/" + filepath.Base(config.RunDir),
		f:      &findings{began: time.Now()},
		rng:    rand.New(rand.NewPCG(in.Options.Seed, 1)), //nolint:gosec // to be repeated, not to be secret
		target: target{client: c, socket: filepath.Join(config.RunDir, "cri.sock"), node: config.NodeName},
	}, nil
}

func (t *trial) run(ctx context.Context) (*result, error) {
	fmt.Printf("seed %d: %d pods, %d kills\n", t.o.Seed, t.o.Pods, t.o.Kills)
	if err := t.c.makeNamespace(ctx); err != nil {
		return nil, err
	}
	var err error
	if t.steady, err = t.c.startSteady(ctx, t.o.Pods); err != nil {
		return nil, err
	}
	fmt.Printf("%d pods are ready after %.0f s\n", t.o.Pods, time.Since(t.f.began).Seconds())
	if err := t.remember(); err != nil {
		return nil, err
	}
	watching, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	w, err := t.c.watch(watching, t.f, t.steady)
	if err != nil {
		return nil, err
	}
	var churned atomic.Int64
	stop := make(chan struct{})
	var churners sync.WaitGroup
	for i := range t.o.Churners {
		h := &churner{c: t.c, f: t.f, n: &churned, rng: rand.New(rand.NewPCG(t.o.Seed, uint64(i)+2))} //nolint:gosec // likewise
		churners.Go(func() { h.churn(ctx, stop) })
	}
	err = t.killAll(ctx)
	killed := time.Since(t.f.began)
	close(stop)
	churners.Wait()
	if err != nil {
		return nil, err
	}
	logLines := t.checkLogs(ctx)
	t.checkMachines()
	if err := t.checkOrphans(ctx); err != nil {
		return nil, err
	}
	events, err := w.result()
	if err != nil {
		return nil, err
	}
	stopWatching()
	r := t.result(int(churned.Load()), events, logLines)
	r.KillSeconds = killed.Seconds()
	if r.Accelerator, err = t.accelerator(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// remember notes what must stay as it is.
func (t *trial) remember() error {
	all, err := vms(t.cgroup)
	if err != nil {
		return err
	}
	t.machines = map[string]vm{}
	for _, p := range t.steady {
		name := string(p.UID) + "_0"
		m, ok := all[name]
		if !ok {
			return fmt.Errorf("pod %s has no QEMU process atoll-%s in cgroup %s", p.Name, name, t.cgroup)
		}
		t.machines[name] = m
		t.target.podUIDs = append(t.target.podUIDs, string(p.UID))
		t.target.pods = append(t.target.pods, p.Name)
		for _, s := range statuses(p) {
			if s.State.Running != nil {
				t.target.containers = append(t.target.containers, strings.TrimPrefix(s.ContainerID, "atoll://"))
			}
		}
	}
	return nil
}

// killAll kills spherelet at random instants. After all but the early kills
// it waits until everything is back.
func (t *trial) killAll(ctx context.Context) error {
	wait := time.Duration(t.rng.Int64N(int64(calm)))
	for i := 1; i <= t.o.Kills; i++ {
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		if ran := time.Since(t.f.began); ran > t.o.Timeout-min(checkTime, t.o.Timeout/3) {
			fmt.Printf("%s have passed: no more kills\n", ran.Round(time.Second))
			return nil
		}
		r := recovery{Kill: i, Alive: time.Since(t.a.started).Seconds(), Load: load()}
		at := time.Now()
		if err := t.a.kill(); err != nil {
			return err
		}
		t.f.killed()
		if err := sleep(ctx, restartDelay); err != nil {
			return err
		}
		if err := t.a.start(); err != nil {
			return err
		}
		if i < t.o.Kills && t.rng.IntN(earlyOneIn) == 0 {
			wait = time.Duration(t.rng.Int64N(int64(early)))
			r.Interrupted = true
		} else {
			wait = time.Duration(t.rng.Int64N(int64(calm)))
			if err := t.measure(ctx, at, &r); err != nil {
				return fmt.Errorf("after kill %d: %w", i, err)
			}
			if limit := t.o.Within.Seconds(); r.Back > limit {
				t.f.add("slow", "after kill %d all was back after %.2f s, more than %g s: lists %.2f, agents %.2f, exec %.2f, node %.2f; the load was %.1f", i, r.Back, limit, r.Listed, r.Agents, r.Exec, r.Node, r.Load)
			}
		}
		t.checkMachines()
		t.recovery = append(t.recovery, r)
		fmt.Println(r.line())
	}
	return nil
}

// measure waits until all is back, or until the spherelet it waits for is gone.
func (t *trial) measure(ctx context.Context, at time.Time, r *recovery) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-t.a.ended:
			cancel(t.a.endedItself())
		case <-ctx.Done():
		}
	}()
	err := t.target.measure(ctx, at, r)
	if err != nil && context.Cause(ctx) != nil {
		return context.Cause(ctx)
	}
	return err
}

func (r recovery) line() string {
	if r.Interrupted {
		return fmt.Sprintf("kill %3d of one that had run %5.2f s: the next one follows at once", r.Kill, r.Alive)
	}
	return fmt.Sprintf("kill %3d of one that had run %5.2f s: lists %.2f agents %.2f exec %.2f node %.2f s (load %.1f)", r.Kill, r.Alive, r.Listed, r.Agents, r.Exec, r.Node, r.Load)
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// load is the host's load average of the last minute.
func load() float64 {
	b, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(b), " ")
	l, _ := strconv.ParseFloat(first, 64)
	return l
}

// checkMachines compares the QEMU processes with what they were.
func (t *trial) checkMachines() {
	for name, m := range t.machines {
		if start, running := startTime(m.PID); !running || start != m.Start {
			t.f.add("restart", "the QEMU of pod VM %s (pid %d) is gone", name, m.PID)
			delete(t.machines, name)
		}
	}
}

// checkLogs judges the logs of the pods that must not notice.
func (t *trial) checkLogs(ctx context.Context) (lines int) {
	for _, p := range t.steady {
		n, err := t.c.checkLog(ctx, p.Name)
		if err != nil {
			t.f.add("log", "pod %s: %v", p.Name, err)
		}
		lines += n
	}
	return lines
}

// checkOrphans waits until the host has what belongs to the pods that must
// not notice, and nothing else of a pod's.
func (t *trial) checkOrphans(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	var extra []string
	for {
		var err error
		if extra, err = t.surplus(ctx); err != nil && ctx.Err() == nil {
			return err
		}
		if err == nil && len(extra) == 0 {
			return nil
		}
		if sleep(ctx, 500*time.Millisecond) != nil {
			for _, e := range extra {
				t.f.add("orphan", "%s after the last kill: %s", settleLimit, e)
			}
			return nil
		}
	}
}

// surplus lists pods, VMs, taps, disks and directories that nobody needs, and
// what is missing of those that somebody does.
func (t *trial) surplus(ctx context.Context) ([]string, error) {
	var out []string
	compare := func(what string, got []string, want []string) {
		for _, g := range got {
			if !slices.Contains(want, g) {
				out = append(out, what+" "+g)
			}
		}
		if len(got) < len(want) {
			out = append(out, fmt.Sprintf("%s: %d, want %d", what, len(got), len(want)))
		}
	}
	pods, err := t.c.pods().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var names, uids, keys, disks []string
	for i := range pods.Items {
		names = append(names, pods.Items[i].Name)
	}
	for _, uid := range t.target.podUIDs {
		uids, keys, disks = append(uids, uid), append(keys, uid+"_0"), append(disks, uid+"_0.ext4")
	}
	compare("pod", names, t.target.pods)
	all, err := vms(t.cgroup)
	if err != nil {
		return nil, err
	}
	var running []string
	for name := range all {
		running = append(running, name)
	}
	compare("QEMU of pod VM", running, keys)
	for _, d := range []struct {
		what, pattern string
		want          []string
	}{
		{"directory of pod VM", "vms/*_*", keys}, {"half-made directory of pod VM", "vms/.[ng]*-*", nil},
		{"disk", "disks/[^.]*", disks}, {"half-made disk", "disks/.making-*", nil},
		{"half-made master of disks", "disks/.masters/*/.making-*", nil}, {"kubelet directory of pod", "kubelet/pods/*", uids},
	} {
		paths, err := filepath.Glob(filepath.Join(t.nodeDir, d.pattern))
		if err != nil {
			return nil, err
		}
		for i := range paths {
			paths[i] = filepath.Base(paths[i])
		}
		compare(d.what, paths, d.want)
	}
	// Not by /sys/class/net, which shows the namespace that mounted it.
	links, err := net.Interfaces()
	taps := 0
	for _, l := range links {
		if strings.HasPrefix(l.Name, "atl") && len(l.Name) == len("atl")+11 {
			taps++
		}
	}
	if taps != len(keys) {
		out = append(out, fmt.Sprintf("%d taps for %d pods", taps, len(keys)))
	}
	if sockets, _ := filepath.Glob(filepath.Join(filepath.Dir(t.target.socket), "vm", "*.agent")); len(sockets) != len(keys) {
		out = append(out, fmt.Sprintf("%d agent sockets for %d pods", len(sockets), len(keys)))
	}
	return out, err
}

func (t *trial) accelerator(ctx context.Context) (string, error) {
	n, err := t.c.CoreV1().Nodes().Get(ctx, t.target.node, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	return n.Labels["atoll.dev/accelerator"], nil
}
