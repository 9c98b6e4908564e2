package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	toolswatch "k8s.io/client-go/tools/watch"
)

// A violation is something that a pod, or who uses it, has noticed.
type violation struct {
	// Kind is restart, flip, log, orphan, churn or slow; of volumes lost, order,
	// failed, twice, format or left.
	Kind    string `json:"kind"`
	Message string `json:"message"`
	// Seconds since the run began, and kills before it happened.
	Seconds float64 `json:"seconds"`
	Kills   int     `json:"kills"`
}

// findings collects violations as they are seen.
type findings struct {
	mu    sync.Mutex
	began time.Time
	kills int
	all   []violation
	// churnRestarts counts restarts of the pods that come and go.
	churnRestarts int
}

func (f *findings) add(kind, format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := violation{Kind: kind, Message: fmt.Sprintf(format, args...), Seconds: time.Since(f.began).Seconds(), Kills: f.kills}
	fmt.Printf("  VIOLATION (%s) after kill %d: %s\n", v.Kind, v.Kills, v.Message)
	if len(f.all) < 1000 {
		f.all = append(f.all, v)
	}
}

func (f *findings) killed() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kills++
}

// A watcher holds the pods that must not notice to what they were, at every
// change that the API server tells of, and the node to being Ready.
type watcher struct {
	f *findings

	mu     sync.Mutex
	was    map[string]*corev1.Pod // by name
	events int
	failed error
}

// watch begins to watch and returns; it ends with ctx.
func (c *client) watch(ctx context.Context, f *findings, steady []*corev1.Pod) (*watcher, error) {
	w := &watcher{f: f, was: map[string]*corev1.Pod{}}
	for _, p := range steady {
		w.was[p.Name] = p
	}
	pods, err := c.pods().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for i := range pods.Items {
		w.pod(&pods.Items[i])
	}
	nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for i := range nodes.Items {
		w.node(&nodes.Items[i])
	}
	podEvents, err := toolswatch.NewRetryWatcherWithContext(ctx, pods.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.pods().Watch(ctx, o)
		},
	})
	if err != nil {
		return nil, err
	}
	nodeEvents, err := toolswatch.NewRetryWatcherWithContext(ctx, nodes.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return c.CoreV1().Nodes().Watch(ctx, o)
		},
	})
	if err != nil {
		return nil, err
	}
	go w.follow(ctx, podEvents)
	go w.follow(ctx, nodeEvents)
	return w, nil
}

func (w *watcher) follow(ctx context.Context, events watch.Interface) {
	defer events.Stop()
	for e := range events.ResultChan() {
		w.mu.Lock()
		w.events++
		w.mu.Unlock()
		switch o := e.Object.(type) {
		case *corev1.Pod:
			if e.Type == watch.Deleted {
				w.gone(o)
			} else {
				w.pod(o)
			}
		case *corev1.Node:
			w.node(o)
		default:
			w.fail(fmt.Errorf("a watch failed: %v", o))
			return
		}
	}
	if ctx.Err() == nil {
		w.fail(fmt.Errorf("a watch ended"))
	}
}

// fail says that changes may have been missed, so that nothing is proved.
func (w *watcher) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failed = err
}

// result tells how many changes were seen, or why not all were.
func (w *watcher) result() (events int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.events, w.failed
}

func (w *watcher) gone(p *corev1.Pod) {
	if w.was[p.Name] != nil {
		w.f.add("restart", "pod %s was deleted", p.Name)
	}
}

func (w *watcher) pod(p *corev1.Pod) {
	was := w.was[p.Name]
	if was == nil {
		return
	}
	w.was[p.Name] = p
	for _, cond := range p.Status.Conditions {
		old := condition(was, cond.Type)
		if old == nil || old.Status != cond.Status {
			w.f.add("flip", "pod %s: %s became %s (%s %s)", p.Name, cond.Type, cond.Status, cond.Reason, cond.Message)
		} else if !old.LastTransitionTime.Equal(&cond.LastTransitionTime) {
			w.f.add("flip", "pod %s: %s says it changed at %s", p.Name, cond.Type, cond.LastTransitionTime)
		}
	}
	for _, cond := range was.Status.Conditions {
		if condition(p, cond.Type) == nil {
			w.f.add("flip", "pod %s: %s is there no more", p.Name, cond.Type)
		}
	}
	if p.Status.Phase != was.Status.Phase {
		w.f.add("flip", "pod %s: phase became %s", p.Name, p.Status.Phase)
	}
	if p.Status.PodIP != was.Status.PodIP {
		w.f.add("restart", "pod %s: its address became %q", p.Name, p.Status.PodIP)
	}
	before, after := statuses(was), statuses(p)
	if len(after) != len(before) {
		w.f.add("restart", "pod %s: %d container statuses, had %d", p.Name, len(after), len(before))
	}
	for name, now := range after {
		old := before[name]
		if now.RestartCount != old.RestartCount {
			w.f.add("restart", "pod %s: container %s: restartCount became %d", p.Name, name, now.RestartCount)
		}
		if now.ContainerID != old.ContainerID {
			w.f.add("restart", "pod %s: container %s: became another container", p.Name, name)
		}
		if now.Ready != old.Ready || started(now) != started(old) {
			w.f.add("flip", "pod %s: container %s: ready=%v started=%v", p.Name, name, now.Ready, started(now))
		}
		if (now.State.Running == nil) != (old.State.Running == nil) {
			w.f.add("restart", "pod %s: container %s: state became %+v", p.Name, name, now.State)
		}
	}
}

// started is false for what the kubelet says nothing of.
func started(s corev1.ContainerStatus) bool { return s.Started != nil && *s.Started }

func (w *watcher) node(n *corev1.Node) {
	for _, cond := range n.Status.Conditions {
		if good := cond.Type == corev1.NodeReady; good != (cond.Status == corev1.ConditionTrue) {
			w.f.add("flip", "node %s: %s is %s (%s %s)", n.Name, cond.Type, cond.Status, cond.Reason, cond.Message)
		}
	}
	for _, t := range n.Spec.Taints {
		w.f.add("flip", "node %s is tainted with %s", n.Name, t.Key)
	}
}

func condition(p *corev1.Pod, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == t {
			return &p.Status.Conditions[i]
		}
	}
	return nil
}

// statuses are those of a pod's containers of all sorts, by name.
func statuses(p *corev1.Pod) map[string]corev1.ContainerStatus {
	all := map[string]corev1.ContainerStatus{}
	for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, s := range list {
			all[s.Name] = s
		}
	}
	return all
}
