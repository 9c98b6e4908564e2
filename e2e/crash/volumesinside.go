package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	"sigs.k8s.io/yaml"
)

// killWeights are the kinds of kills and how often each comes, beside the one
// time that all do.
var killWeights = map[string]int{
	"pod":       3, // deleted
	"spherelet": 3, // SIGKILL, of either node
	"qemu":      3, // SIGKILL, of one pod's VM
	"node":      2, // SIGKILL of a spherelet and all its VMs; it is back at once
	"lost":      1, // the same, but it stays away until it is declared out of service
}

const (
	// volumeBack is how soon every counter must go on after a kill; a node that
	// is lost must first be found NotReady.
	volumeBack = 4 * time.Minute
	// lostTime is what a lost node takes, about: no such kill comes later than
	// that before the end.
	lostTime = 2 * time.Minute
	// volumesCalm bounds the wait before the next kill.
	volumesCalm = 5 * time.Second
	// volumesRest bounds what is done before and after the kills.
	volumesRest = 12 * time.Minute
)

// A nodeConfig is what is needed of the first node's configuration.
type nodeConfig struct {
	NodeName, DataDir, RunDir, ClusterCIDR string
	ClusterDNS                             []string
	Hypervisor                             struct{ Guest string }
	Images                                 struct{ HostsDir string }
}

// A volumesTrial is the run inside the cluster.
type volumesTrial struct {
	o        volumesOptions
	c        *client
	f        *findings
	rng      *rand.Rand
	data     string
	bin      string
	config   nodeConfig
	first    *agent
	second   *secondNode
	observer *observer
	opened   *openWatch
	refusal  string
	pods     []string
	kills    []volumeKill
}

// A volumeKill is one kill and how long it took until every counter went on.
type volumeKill struct {
	Kind string `json:"kind"`
	What string `json:"what"`
	// Back is in seconds from the kill; 0 if the next one followed at once.
	Back float64 `json:"back"`
}

func insideVolumes(ctx context.Context, in handover) (err error) {
	o := *in.Volumes
	ctx, cancel := context.WithTimeoutCause(ctx, o.For+volumesRest, fmt.Errorf("the run took longer than %s", o.For+volumesRest))
	defer cancel()
	t, err := newVolumesTrial(in)
	if err != nil {
		return err
	}
	if t.second, err = newSecondNode(t); err != nil {
		return errors.Join(err, t.leave(ctx))
	}
	r, err := t.run(ctx)
	if leaveErr := t.leave(context.WithoutCancel(ctx)); leaveErr != nil {
		if r == nil {
			return errors.Join(err, leaveErr)
		}
		t.f.add("left", "%v", leaveErr)
		r.Violations = slices.Clone(t.f.all)
	}
	if err != nil {
		return err
	}
	return r.writeJSON(in.Result)
}

func newVolumesTrial(in handover) (*volumesTrial, error) {
	klog.SetLogger(logr.Discard()) // a connection that broke is no news here
	o := *in.Volumes
	t := &volumesTrial{
		o: o, data: in.Data, bin: o.Bin, f: &findings{began: time.Now()},
		rng:  rand.New(rand.NewPCG(o.Seed, 1)), //nolint:gosec // to be repeated, not to be secret
		pods: []string{"counter-0", "counter-1", "counter-2"},
	}
	var err error
	if t.c, err = newClient(filepath.Join(in.Data, "kubeconfig")); err != nil {
		return nil, err
	}
	if t.first, err = findAgent(filepath.Join(o.Bin, "atoll"), in.Data); err != nil {
		return nil, err
	}
	file := t.first.argv[slices.Index(t.first.argv, "--config")+1]
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if err := yaml.Unmarshal(text, &t.config); err != nil {
		return nil, err
	}
	if err := os.Mkdir(sharedDir(o.Work), 0o700); err != nil {
		return nil, err
	}
	return t, share(file, o.Work)
}

func (t *volumesTrial) run(ctx context.Context) (r *volumesResult, err error) {
	fmt.Printf("seed %d: %d volumes, kills for %s\n", t.o.Seed, len(t.pods), t.o.For)
	if err := t.restart(t.first); err != nil { // with the shared datastore
		return nil, err
	}
	if err := t.join(ctx); err != nil {
		return nil, err
	}
	if err := t.c.makeNamespace(ctx); err != nil {
		return nil, err
	}
	serving, stop := context.WithCancel(ctx)
	defer stop()
	if t.observer, err = observe(serving, t.f, firstIP); err != nil {
		return nil, err
	}
	if err := t.startCounters(ctx); err != nil {
		return nil, err
	}
	if err := t.checkBeside(ctx); err != nil {
		return nil, err
	}
	t.opened = watchOpen(serving, t.f, sharedDir(t.o.Work))
	began := time.Now()
	fmt.Printf("all count after %.0f s\n", began.Sub(t.f.began).Seconds())
	if err := t.killFor(ctx, began); err != nil {
		return nil, err
	}
	killed := time.Since(began)
	r = &volumesResult{For: t.o.For.Seconds(), Seconds: killed.Seconds(), Seed: t.o.Seed, Kills: t.kills}
	t.checkCounters(ctx, r)
	t.checkFormats(r)
	if r.Accelerator, err = (&trial{c: t.c, target: target{node: t.config.NodeName}}).accelerator(ctx); err != nil {
		return nil, err
	}
	r.Looks, r.Refusal = t.opened.looks(), t.refusal
	t.checkLeft(ctx)
	t.f.mu.Lock()
	defer t.f.mu.Unlock()
	r.Violations = slices.Clone(t.f.all)
	return r, nil
}

// killFor kills until the time is up, each kind once to begin with.
func (t *volumesTrial) killFor(ctx context.Context, began time.Time) error {
	kinds := t.o.Kinds
	if len(kinds) == 0 {
		kinds = []string{"pod", "spherelet", "qemu", "node", "lost"}
	}
	first := slices.Clone(kinds)
	t.rng.Shuffle(len(first), func(i, j int) { first[i], first[j] = first[j], first[i] })
	var bag []string
	for _, k := range kinds {
		for range killWeights[k] {
			bag = append(bag, k)
		}
	}
	for i := 0; time.Since(began) < t.o.For; i++ {
		kind := bag[t.rng.IntN(len(bag))]
		if i < len(first) {
			kind = first[i]
		}
		if kind == "lost" && time.Since(began) > t.o.For-lostTime && t.o.For > lostTime {
			continue
		}
		if err := sleep(ctx, time.Duration(t.rng.Int64N(int64(volumesCalm)))); err != nil {
			return err
		}
		if err := t.kill(ctx, kind); err != nil {
			return fmt.Errorf("kill %d (%s): %w", i+1, kind, err)
		}
	}
	return t.back(ctx, nil, nil, time.Now(), &volumeKill{})
}

// kill does one kill and waits until every counter goes on; one in five is
// followed by the next at once.
func (t *volumesTrial) kill(ctx context.Context, kind string) error {
	k := volumeKill{Kind: kind}
	at, before := time.Now(), t.observer.begun()
	again, err := map[string]func(context.Context, *volumeKill) ([]string, error){
		"pod": t.deletePod, "spherelet": t.killSpherelet, "qemu": t.killQEMU, "node": t.killNode, "lost": t.loseNode,
	}[kind](ctx, &k)
	if err != nil {
		return err
	}
	t.f.killed()
	if t.rng.IntN(earlyOneIn) != 0 {
		if err := t.back(ctx, before, again, at, &k); err != nil {
			return err
		}
	}
	t.kills = append(t.kills, k)
	fmt.Printf("%4.0f s  %-9s %s: back after %.1f s; acknowledged %v\n", time.Since(t.f.began).Seconds(), kind, k.What, k.Back, t.observer.acked())
	return nil
}

// back waits until the writers named have begun again and all go on.
func (t *volumesTrial) back(ctx context.Context, before map[string]int, again []string, at time.Time, k *volumeKill) error {
	ctx, cancel := context.WithTimeoutCause(ctx, volumeBack, fmt.Errorf("not back after %s", volumeBack))
	defer cancel()
	err := t.observer.awaitBegun(ctx, before, again)
	if err == nil {
		err = t.observer.awaitProgress(ctx, t.pods)
	}
	k.Back = time.Since(at).Seconds()
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, t.c.explain(context.WithoutCancel(ctx)))
	}
	return err
}

func (t *volumesTrial) deletePod(ctx context.Context, k *volumeKill) ([]string, error) {
	pod := t.pods[t.rng.IntN(len(t.pods))]
	grace := int64(t.rng.IntN(2)) // 0 takes it out of the API at once
	k.What = fmt.Sprintf("%s, with a grace of %d s", pod, grace)
	err := t.c.pods().Delete(ctx, pod, metav1.DeleteOptions{GracePeriodSeconds: &grace})
	return []string{pod}, ignoreNotFound(err)
}

func (t *volumesTrial) restart(a *agent) error {
	if err := a.kill(); err != nil {
		return err
	}
	time.Sleep(restartDelay)
	return a.start()
}

func (t *volumesTrial) killSpherelet(_ context.Context, k *volumeKill) ([]string, error) {
	a, name := t.first, t.config.NodeName
	if t.rng.IntN(2) == 1 {
		a, name = t.second.agent, secondName
	}
	k.What = "of " + name
	return nil, t.restart(a)
}

func (t *volumesTrial) killQEMU(ctx context.Context, k *volumeKill) ([]string, error) {
	pod := t.pods[t.rng.IntN(len(t.pods))]
	pids, err := t.qemusOf(ctx, pod)
	if err != nil {
		return nil, err
	}
	k.What = fmt.Sprintf("of %s (%d running)", pod, len(pids))
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return nil, err
		}
	}
	if len(pids) == 0 {
		return nil, nil
	}
	return []string{pod}, nil
}

// qemusOf are the processes of a pod's VMs.
func (t *volumesTrial) qemusOf(ctx context.Context, pod string) (pids []int, err error) {
	p, err := t.c.pods().Get(ctx, pod, metav1.GetOptions{})
	if err != nil {
		return nil, ignoreNotFound(err)
	}
	for _, cgroup := range t.cgroups() {
		all, err := vms(cgroup)
		if err != nil {
			return nil, err
		}
		for name, m := range all {
			if strings.HasPrefix(name, string(p.UID)+"_") {
				pids = append(pids, m.PID)
			}
		}
	}
	return pids, nil
}

func (t *volumesTrial) cgroups() []string {
	return []string{"atoll/" + filepath.Base(t.config.RunDir), "atoll/" + filepath.Base(t.second.runDir)}
}

// powerOff ends the second node's spherelet and all its VMs, and returns the
// pods that were there.
func (t *volumesTrial) powerOff(ctx context.Context) ([]string, error) {
	on, err := t.podsOn(ctx, secondName)
	if err != nil {
		return nil, err
	}
	if len(on) == 0 {
		if on, err = t.bringOver(ctx); err != nil {
			return nil, err
		}
	}
	if err := t.second.kill(); err != nil {
		return nil, err
	}
	all, err := vms(t.cgroups()[1])
	if err != nil {
		return nil, err
	}
	if len(all) < len(on) {
		return nil, fmt.Errorf("%d VMs for the pods %v on %s", len(all), on, secondName)
	}
	for _, m := range all {
		if err := syscall.Kill(m.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return nil, err
		}
	}
	return on, nil
}

// killNode is a node that loses its power for a moment.
func (t *volumesTrial) killNode(ctx context.Context, k *volumeKill) ([]string, error) {
	on, err := t.powerOff(ctx)
	if err != nil {
		return nil, err
	}
	k.What = fmt.Sprintf("%s, with %v", secondName, on)
	if err := sleep(ctx, time.Duration(t.rng.Int64N(int64(volumesCalm)))); err != nil {
		return nil, err
	}
	return on, t.second.start()
}

// loseNode is a node that stays away: found NotReady, declared out of service,
// and taken up again when its pods run elsewhere.
func (t *volumesTrial) loseNode(ctx context.Context, k *volumeKill) ([]string, error) {
	before := t.observer.begun()
	on, err := t.powerOff(ctx)
	if err != nil {
		return nil, err
	}
	k.What = fmt.Sprintf("%s, with %v", secondName, on)
	if err := t.awaitNode(ctx, secondName, false, 3*time.Minute); err != nil {
		return nil, err
	}
	if err := t.patchNode(ctx, secondName, `{"spec":{"taints":[{"key":"`+corev1.TaintNodeOutOfService+`","value":"nodeshutdown","effect":"NoExecute"}]}}`); err != nil {
		return nil, err
	}
	if err := t.back(ctx, before, on, time.Now(), &volumeKill{}); err != nil {
		return nil, err
	}
	if err := t.patchNode(ctx, secondName, `{"spec":{"taints":null}}`); err != nil {
		return nil, err
	}
	if err := t.second.start(); err != nil {
		return nil, err
	}
	return nil, t.awaitNode(ctx, secondName, true, 3*time.Minute)
}

func (t *volumesTrial) patchNode(ctx context.Context, name, patch string) error {
	_, err := t.c.CoreV1().Nodes().Patch(ctx, name, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// bringOver moves a pod to the second node, so that there is something to lose.
func (t *volumesTrial) bringOver(ctx context.Context) ([]string, error) {
	pod := t.pods[t.rng.IntN(len(t.pods))]
	if err := t.patchNode(ctx, t.config.NodeName, `{"spec":{"unschedulable":true}}`); err != nil {
		return nil, err
	}
	before, grace := t.observer.begun(), int64(0)
	if err := t.c.pods().Delete(ctx, pod, metav1.DeleteOptions{GracePeriodSeconds: &grace}); ignoreNotFound(err) != nil {
		return nil, err
	}
	if err := t.back(ctx, before, []string{pod}, time.Now(), &volumeKill{}); err != nil {
		return nil, err
	}
	if err := t.patchNode(ctx, t.config.NodeName, `{"spec":{"unschedulable":null}}`); err != nil {
		return nil, err
	}
	return t.podsOn(ctx, secondName)
}

func (t *volumesTrial) podsOn(ctx context.Context, node string) (names []string, err error) {
	pods, err := t.c.pods().List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
	if err != nil {
		return nil, err
	}
	for i := range pods.Items {
		if slices.Contains(t.pods, pods.Items[i].Name) && pods.Items[i].DeletionTimestamp == nil {
			names = append(names, pods.Items[i].Name)
		}
	}
	return names, nil
}

// awaitNode waits until a node is Ready, or is not any more.
func (t *volumesTrial) awaitNode(ctx context.Context, name string, ready bool, within time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("after %s", within))
	defer cancel()
	return until(ctx, fmt.Sprintf("node %s to have Ready=%t", name, ready), func(ctx context.Context) error {
		n, err := t.c.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && (c.Status == corev1.ConditionTrue) == ready {
				return nil
			}
		}
		return errors.New("not yet")
	})
}
