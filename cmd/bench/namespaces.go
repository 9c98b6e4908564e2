package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/vmware/govmomi"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const (
	// syncedTimeout bounds the wait for all namespaces of one turn.
	syncedTimeout = 30 * time.Minute
	// restPause is what the heap gets to give back what nobody uses.
	restPause = 20 * time.Second
	// changedNamespaces are changed one after another, each alone.
	changedNamespaces = 10
)

// A namespaceBench measures SupervisorNamespaces in a running cluster, on its
// embedded vCenter.
type namespaceBench struct {
	count  int
	idle   time.Duration
	config *rest.Config
	admin  client.WithWatch
	kube   kubernetes.Interface
	vim    *govmomi.Client
	loop   *plainLoop
	pid    int // of the process that has the controllers, and nothing else
}

// metricsAddress of the controllers' process, in the cluster's network.
const metricsAddress = "127.0.0.1:9470"

// measureNamespaces keeps namespaces by a process of its own, so that what it
// takes is not the API server's, etcd's or vCenter's. Its namespaces stay until
// the cluster goes.
func measureNamespaces(ctx context.Context, o options, data string, all *results) (err error) {
	pods, err := newPodBench(data)
	if err != nil {
		return err
	}
	var log bytes.Buffer
	cmd := exec.CommandContext(ctx, "bin/atoll-namespaces",
		"--kubeconfig", filepath.Join(data, "pki", "kubeconfig", "namespaces.kubeconfig"), "--metrics-address", metricsAddress)
	cmd.Stderr = &log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("atoll-namespaces: %w", err)
	}
	defer func() {
		_ = cmd.Cancel() // fails if it has ended, which is told below
		if werr := cmd.Wait(); werr != nil {
			tail := log.Bytes()
			err = errors.Join(err, fmt.Errorf("atoll-namespaces: %w\n%s", werr, tail[max(0, len(tail)-4096):]))
		}
	}()
	return benchNamespaces(ctx, o, pods, cmd.Process.Pid, all)
}

// benchNamespaces takes turns: half of the loop, all of the controller's, the
// other half of the loop. What is there already slows later ones, and so both.
func benchNamespaces(ctx context.Context, o options, pods *podBench, pid int, all *results) error {
	b := &namespaceBench{count: o.namespaces, idle: o.idle, config: pods.config, kube: pods.client, pid: pid}
	scheme := runtime.NewScheme()
	err := v1alpha1.AddToScheme(scheme)
	if err != nil {
		return err
	}
	if b.admin, err = client.NewWithWatch(pods.config, client.Options{Scheme: scheme}); err != nil {
		return err
	}
	if b.vim, err = dialVCenter(ctx); err != nil {
		return err
	}
	defer func() { _ = b.vim.Logout(context.WithoutCancel(ctx)) }()
	if err := makeVCenterUsers(ctx, pods.data); err != nil {
		return err
	}
	// The first one makes what all others share, and is what the loop copies.
	if _, err := b.create(ctx, "bench-pattern-", 1); err != nil {
		return err
	}
	if b.loop, err = b.newPlainLoop(ctx, "bench-pattern-0"); err != nil {
		return err
	}
	if _, err := b.loop.run(ctx, "bench-warm-", 2); err != nil {
		return err
	}
	b.loop.recording = 0
	before, err := b.rest(ctx, "before the first")
	if err != nil {
		return err
	}
	if err := b.turns(ctx, all, before); err != nil {
		return err
	}
	return b.changes(ctx, all)
}

// turns measures what making them takes, and what those that are there cost.
func (b *namespaceBench) turns(ctx context.Context, all *results, before state) error {
	half := b.count / 2
	say("%d namespaces by the loop", half)
	first, err := b.loop.run(ctx, "bench-loop-a-", half)
	if err != nil {
		return err
	}
	say("%d SupervisorNamespaces", b.count)
	took, err := b.create(ctx, "bench-", b.count)
	if err != nil {
		return err
	}
	after, err := b.rest(ctx, "with all of them")
	if err != nil {
		return err
	}
	steady, err := b.steady(ctx)
	if err != nil {
		return err
	}
	say("%d namespaces by the loop", b.count-half)
	second, err := b.loop.run(ctx, "bench-loop-b-", b.count-half)
	if err != nil {
		return err
	}
	loop := all.add("ns_create_loop", "s", []float64{(first + second).Seconds()})
	loop.Beside = fmt.Sprintf("%d, the first %d before the controller's turn in %.1f s, the others after it in %.1f s; the records took %.1f s of it",
		b.count, half, first.Seconds(), second.Seconds(), b.loop.recording.Seconds())
	made := all.add("ns_create", "s", []float64{took.Seconds()})
	made.to(*all, "ns_create_loop", 0.7)
	made.Beside = fmt.Sprintf("%d, applied one after another; %.2f x the loop without its records",
		b.count, took.Seconds()/(first+second-b.loop.recording).Seconds())
	b.steadyFigures(all, before, after, steady)
	return nil
}

// create applies namespaces, and returns how long it took until all of them
// were Synced, from the first apply.
func (b *namespaceBench) create(ctx context.Context, prefix string, n int) (time.Duration, error) {
	names := map[string]int64{}
	for i := range n {
		names[fmt.Sprint(prefix, i)] = 0
	}
	return b.untilSynced(ctx, names, func() error {
		began := time.Now()
		for i := range n {
			if err := b.admin.Create(ctx, benchSpec(fmt.Sprint(prefix, i))); err != nil {
				return err
			}
		}
		say("%d are applied after %.1f s", n, time.Since(began).Seconds())
		return nil
	})
}

// benchSpec is a namespace with something of each kind.
func benchSpec(name string) *v1alpha1.SupervisorNamespace {
	quantity := func(s string) *resource.Quantity {
		q := resource.MustParse(s)
		return &q
	}
	pods := int64(20)
	ns := &v1alpha1.SupervisorNamespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	ns.Spec.Description = "of a benchmark"
	ns.Spec.CPU = &v1alpha1.CPUAllocation{Limit: quantity("4")}
	ns.Spec.Memory = &v1alpha1.MemoryAllocation{Limit: quantity("8Gi")}
	ns.Spec.ContainerDefaults = &v1alpha1.ContainerDefaults{CPULimit: quantity("1"), MemoryLimit: quantity("512Mi")}
	ns.Spec.ObjectCounts = &v1alpha1.ObjectCounts{Pods: &pods}
	ns.Spec.Access = []v1alpha1.AccessEntry{
		{Kind: v1alpha1.UserSubject, Name: benchUser, Role: v1alpha1.RoleOwner},
		{Kind: v1alpha1.GroupSubject, Name: benchGroup, Role: v1alpha1.RoleEdit},
	}
	return ns
}

// untilSynced returns the time from the start of act until each of the names is
// Synced for a generation above the one that is given.
func (b *namespaceBench) untilSynced(ctx context.Context, names map[string]int64, act func() error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, syncedTimeout)
	defer cancel()
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := b.admin.List(ctx, list); err != nil {
		return 0, err
	}
	w, err := b.admin.Watch(ctx, &v1alpha1.SupervisorNamespaceList{}, &client.ListOptions{Raw: &metav1.ListOptions{ResourceVersion: list.ResourceVersion}})
	if err != nil {
		return 0, err
	}
	defer w.Stop()
	total, began := len(names), time.Now()
	acted := make(chan error, 1)
	go func() { acted <- act() }()
	told := time.Now()
	for len(names) > 0 {
		select {
		case err := <-acted:
			if err != nil {
				return 0, err
			}
			acted = nil // not heard of again
		case e, open := <-w.ResultChan():
			if !open {
				return 0, errors.Join(fmt.Errorf("the watch of namespaces ended with %d of %d not Synced", len(names), total), ctx.Err())
			}
			ns, ok := e.Object.(*v1alpha1.SupervisorNamespace)
			if !ok || e.Type == watch.Deleted {
				return 0, fmt.Errorf("watching namespaces: %s %v", e.Type, e.Object)
			}
			if above, ours := names[ns.Name]; ours && syncedAbove(ns, above) {
				delete(names, ns.Name)
			}
		}
		if time.Since(told) > 10*time.Second {
			told = time.Now()
			say("%d of %d are Synced", total-len(names), total)
		}
	}
	return time.Since(began), nil
}

// syncedAbove tells whether what a namespace says is about a later generation,
// and the latest.
func syncedAbove(ns *v1alpha1.SupervisorNamespace, generation int64) bool {
	c := meta.FindStatusCondition(ns.Status.Conditions, v1alpha1.ConditionSynced)
	return c != nil && c.Status == metav1.ConditionTrue && c.ObservedGeneration == ns.Generation && ns.Generation > generation
}

// changes changes the CPU limit of one among all, some times, and counts what is
// asked of vCenter until nothing more is.
func (b *namespaceBench) changes(ctx context.Context, all *results) error {
	var took, asked []float64
	methods := calls{}
	for i := range min(changedNamespaces, b.count) {
		ns := &v1alpha1.SupervisorNamespace{}
		if err := b.admin.Get(ctx, client.ObjectKey{Name: fmt.Sprint("bench-", i*b.count/min(changedNamespaces, b.count))}, ns); err != nil {
			return err
		}
		before, err := b.quietCalls(ctx)
		if err != nil {
			return err
		}
		patch := client.MergeFrom(ns.DeepCopy())
		limit := resource.MustParse("3")
		ns.Spec.CPU.Limit = &limit
		t, err := b.untilSynced(ctx, map[string]int64{ns.Name: ns.Generation}, func() error { return b.admin.Patch(ctx, ns, patch) })
		if err != nil {
			return err
		}
		after, err := b.quietCalls(ctx)
		if err != nil {
			return err
		}
		made := after.since(before)
		methods.add(made)
		say("change %d: Synced after %.0f ms, vCenter was asked %s", i, float64(t.Microseconds())/1000, made)
		took, asked = append(took, float64(t.Microseconds())/1000), append(asked, made.total())
	}
	r := all.add("ns_change_calls", "calls", asked)
	r.most(3)
	r.Beside = fmt.Sprintf("one of %d, waits of the watch counted; all %d together: %s", b.count, len(asked), methods)
	all.add("ns_change", "ms", took)
	return nil
}
