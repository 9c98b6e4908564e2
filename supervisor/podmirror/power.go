package podmirror

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// afterGrace is how long a pod may take to be gone once its grace period is
// over, before a power-off that waits for it is given up.
const afterGrace = 30 * time.Second

// Power does what was asked of a mirror, or refuses it with a reason and the
// alternative (ErrFailedPrecondition); it never changes what the mirror shows,
// which follows from the Pod.
//
// PowerOff and GuestShutdown delete the pod, with its own grace period. Whether
// the user may is for the inventory to know, where his roles in the namespace
// are permissions. PowerOff returns when the mirror is gone or off, or
// ErrUnavailable if that takes longer than the grace period and half a minute:
// then the pod is being deleted all the same. GuestShutdown returns as soon as
// the API server has accepted it, as vSphere's does.
func (c *Controller) Power(ctx context.Context, r PowerRequest) (err error) {
	defer func() { powerRequests.WithLabelValues(string(r.Op), result(err)).Inc() }()
	pod, ok := c.caches.podOfVM(r.UUID)
	if !ok {
		return fmt.Errorf("VM %s has no pod any more, and its mirror is about to go: look again in a moment: %w", r.UUID, errdefs.ErrNotFound)
	}
	if why := refusal(r.Op); why != "" {
		return fmt.Errorf("VM %s is the pod %s/%s of Kubernetes: %s: %w", r.UUID, pod.Namespace, pod.Name, why, errdefs.ErrFailedPrecondition)
	}
	changed := c.watch(r.UUID)
	if err := c.delete(ctx, pod, r); err != nil {
		return err
	}
	if r.Op == GuestShutdown {
		return nil
	}
	return c.awaitOff(ctx, pod, r.UUID, changed)
}

// refusal says why an operation cannot be passed on; empty: it can.
func refusal(op PowerOp) string {
	switch op {
	case PowerOff, GuestShutdown:
		return ""
	case PowerOn:
		return "a pod that has ended does not run again; its workload makes another, or kubectl create does"
	case PowerReset, GuestReboot:
		return "a pod is not restarted in place; kubectl delete pod ends it and its workload makes another, kubectl rollout restart replaces all of a workload's"
	case PowerSuspend, GuestStandby:
		return "a pod cannot be suspended; kubectl scale --replicas=0 stops a workload"
	case Destroy:
		return "its VM goes with it; kubectl delete pod, or powering it off, ends both"
	default:
		return fmt.Sprintf("%q is no operation that a pod has; kubectl changes pods", op)
	}
}

func (c *Controller) delete(ctx context.Context, pod *corev1.Pod, r PowerRequest) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	uid := pod.UID
	// The pod's own grace period, whatever was asked: containers save their work.
	err := c.o.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	switch {
	case apierrors.IsNotFound(err), apierrors.IsConflict(err): // this pod is gone
		return nil
	case apierrors.IsForbidden(err):
		return fmt.Errorf("pod %s/%s may not be deleted: %v: %w", pod.Namespace, pod.Name, err, errdefs.ErrPermissionDenied)
	case err != nil:
		return fmt.Errorf("delete pod %s/%s: %v: %w", pod.Namespace, pod.Name, err, errdefs.ErrUnavailable)
	}
	c.log.Info("pod deleted from vSphere", "pod_uid", pod.UID, "pod", pod.Namespace+"/"+pod.Name, "op", r.Op, "user", r.User)
	c.mu.Lock()
	recorder := c.recorder
	c.mu.Unlock()
	if recorder != nil {
		ref := &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
		recorder.Eventf(ref, corev1.EventTypeNormal, "PoweredOffInVSphere", "%s asked for %s of the pod's VM in vSphere: the pod is deleted", r.User, r.Op)
	}
	return nil
}

// watch returns a channel that is closed when the mirror next changes.
func (c *Controller) watch(uuid string) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.waiting[uuid] == nil {
		c.waiting[uuid] = make(chan struct{})
	}
	return c.waiting[uuid]
}

// awaitOff waits until the inventory does not show the VM running any more.
func (c *Controller) awaitOff(ctx context.Context, pod *corev1.Pod, uuid string, changed <-chan struct{}) error {
	grace := afterGrace
	if s := pod.Spec.TerminationGracePeriodSeconds; s != nil {
		grace += time.Duration(*s) * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	for {
		if !c.showsOn(uuid) {
			return nil
		}
		select {
		case <-changed:
			changed = c.watch(uuid)
		case <-ctx.Done():
			return fmt.Errorf("pod %s/%s is being deleted and still runs: look again in a moment: %w", pod.Namespace, pod.Name, errdefs.ErrUnavailable)
		}
	}
}

func (c *Controller) showsOn(uuid string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.shown {
		if s.vm.UUID == uuid {
			return s.vm.On
		}
	}
	return false
}
