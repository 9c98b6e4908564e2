package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// churnLimit is how long a pod may take to be what it should be once nobody
// kills any more: each kill undoes a VM that has not booted yet, which on a
// slow machine is every one.
const churnLimit = 3 * time.Minute

// A churner makes pods, uses them and deletes them, one at a time.
type churner struct {
	c   *client
	f   *findings
	rng *rand.Rand
	n   *atomic.Int64
}

// churn goes on until stop is closed, and then ends the pod it is at.
func (h *churner) churn(ctx context.Context, stop <-chan struct{}) {
	whole := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		<-stop
		time.AfterFunc(churnLimit, func() { cancel(fmt.Errorf("%s after the last kill", churnLimit)) })
	}()
	for {
		select {
		case <-stop:
			return
		case <-ctx.Done():
			return
		default:
		}
		name := fmt.Sprintf("churn-%d", h.n.Add(1))
		var err error
		switch h.rng.IntN(4) {
		case 0:
			err = h.job(ctx, name)
		case 1:
			err = h.early(ctx, name)
		default:
			err = h.used(ctx, name)
		}
		if err != nil && whole.Err() == nil {
			h.f.add("churn", "pod %s: %v", name, err)
			_ = h.remove(whole, name, 0)
		}
	}
}

// used is a pod that becomes ready, is used, and is deleted.
func (h *churner) used(ctx context.Context, name string) error {
	if err := h.create(ctx, name, func(*corev1.PodSpec) {}); err != nil {
		return err
	}
	p, err := h.c.awaitPod(ctx, name, "to be ready", isReady)
	if err != nil {
		return err
	}
	h.restarts(p)
	// Users repeat what failed because the node agent was away.
	err = until(ctx, "exec", func(ctx context.Context) error {
		out, err := h.c.exec(ctx, name, writer, "echo", "here")
		if err == nil && out != "here\n" {
			err = fmt.Errorf("printed %q", out)
		}
		return err
	})
	if err == nil {
		err = until(ctx, "logs", func(ctx context.Context) error {
			text, err := h.c.log(ctx, name, writer)
			if err == nil && !strings.HasPrefix(text, "line 1\n") {
				err = fmt.Errorf("begins with %.40q", text)
			}
			return err
		})
	}
	if err != nil {
		return err
	}
	return h.remove(ctx, name, int64(h.rng.IntN(2)))
}

// jobLines is how many lines a job writes.
const jobLines = 30

// job is a pod that ends by itself. That it ended well, and all that it said,
// must be known, though spherelet may have been away just then.
func (h *churner) job(ctx context.Context, name string) error {
	script := fmt.Sprintf(`i=0; while [ $i -lt %d ]; do i=$((i+1)); echo "line $i"; done; sleep %d; echo "end $i"`, jobLines, h.rng.IntN(3))
	err := h.create(ctx, name, func(s *corev1.PodSpec) {
		s.RestartPolicy = corev1.RestartPolicyNever
		s.Containers[0].Command = []string{"sh", "-c", script}
	})
	if err != nil {
		return err
	}
	p, err := h.c.awaitPod(ctx, name, "to succeed", func(p *corev1.Pod) bool {
		return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
	})
	if err != nil {
		return err
	}
	if p.Status.Phase != corev1.PodSucceeded {
		return fmt.Errorf("a job that exits with 0 is said to have failed: %s %s %+v", p.Status.Reason, p.Status.Message, p.Status.ContainerStatuses)
	}
	h.restarts(p)
	var text string
	err = until(ctx, "logs", func(ctx context.Context) (err error) {
		text, err = h.c.log(ctx, name, writer)
		return err
	})
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if err := judgeLog(lines); err != nil || len(lines) != jobLines+1 {
		h.f.add("log", "pod %s, which has ended: %d lines: %v", name, len(lines), err)
	}
	return h.remove(ctx, name, 0)
}

// early is a pod that is deleted while it is being made.
func (h *churner) early(ctx context.Context, name string) error {
	if err := h.create(ctx, name, func(*corev1.PodSpec) {}); err != nil {
		return err
	}
	select {
	case <-time.After(time.Duration(h.rng.Int64N(int64(4 * time.Second)))):
	case <-ctx.Done():
	}
	return h.remove(ctx, name, int64(h.rng.IntN(2)))
}

func (h *churner) create(ctx context.Context, name string, change func(*corev1.PodSpec)) error {
	_, err := h.c.pods().Create(ctx, newPod(name, change), metav1.CreateOptions{})
	return err
}

// restarts counts those of pods that were caught half made.
func (h *churner) restarts(p *corev1.Pod) {
	for name, s := range statuses(p) {
		if s.RestartCount > 0 {
			fmt.Printf("  pod %s: container %s has restartCount %d (%+v)\n", p.Name, name, s.RestartCount, s.LastTerminationState)
			h.f.mu.Lock()
			h.f.churnRestarts++
			h.f.mu.Unlock()
		}
	}
}

// remove deletes a pod, with a grace in seconds (0 takes it out of the API at
// once), and waits until it is gone.
func (h *churner) remove(ctx context.Context, name string, grace int64) error {
	if err := h.c.pods().Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	for {
		_, err := h.c.pods().Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("deleted with a grace of %d s, and still there %w", grace, context.Cause(ctx))
		}
	}
}
