package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

// resizer expands volumes whose claims ask for more, with the states of
// external-resizer (KEP-1790): the driver first, then the PersistentVolume, then
// the kubelet's part is announced on the claim. It has one goroutine: to expand
// is quick.
type resizer struct {
	*group
	queue workqueue.TypedRateLimitingInterface[string]
}

func newResizer(g *group) *resizer {
	r := &resizer{group: g, queue: workqueue.NewTypedRateLimitingQueueWithConfig(
		workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryAtMost),
		workqueue.TypedRateLimitingQueueConfig[string]{Name: "atoll-csi-resize"})}
	add := func(o any) {
		if claim, ok := o.(*corev1.PersistentVolumeClaim); ok && wantsMore(claim) {
			r.queue.Add(claim.Namespace + "/" + claim.Name)
		}
	}
	_, _ = g.factory.Core().V1().PersistentVolumeClaims().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: add, UpdateFunc: func(_, o any) { add(o) },
	})
	// Instantiated before the factory starts.
	g.factory.Core().V1().PersistentVolumes().Informer()
	return r
}

// wantsMore: a bound claim asks for more than it has.
func wantsMore(c *corev1.PersistentVolumeClaim) bool {
	asked, has := c.Spec.Resources.Requests[corev1.ResourceStorage], c.Status.Capacity[corev1.ResourceStorage]
	return c.Status.Phase == corev1.ClaimBound && c.Spec.VolumeName != "" && asked.Cmp(has) > 0
}

func (r *resizer) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, r.queue.ShutDown)
	defer stop()
	for {
		key, down := r.queue.Get()
		if down {
			return
		}
		if err := r.sync(ctx, key); err != nil && ctx.Err() == nil {
			r.Logger.Warn("a volume could not be expanded; trying again", "claim", key, "err", err)
			r.queue.AddRateLimited(key)
		} else {
			r.queue.Forget(key)
		}
		r.queue.Done(key)
	}
}

func (r *resizer) sync(ctx context.Context, key string) error {
	namespace, name, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	claim, err := r.factory.Core().V1().PersistentVolumeClaims().Lister().PersistentVolumeClaims(namespace).Get(name)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil || !wantsMore(claim) {
		return err
	}
	pv, err := r.factory.Core().V1().PersistentVolumes().Lister().Get(claim.Spec.VolumeName)
	if err != nil || pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != claim.UID || !r.mine(pv) {
		return ignoreNotFound(err)
	}
	asked, has := claim.Spec.Resources.Requests[corev1.ResourceStorage], pv.Spec.Capacity[corev1.ResourceStorage]
	if asked.Cmp(has) <= 0 {
		if pending(claim) {
			return nil // the kubelet's turn
		}
		return r.announce(ctx, claim, has)
	}
	return r.expand(ctx, claim, pv, asked)
}

// ignoreNotFound: what the cache has not seen yet comes with its own event.
func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

func pending(c *corev1.PersistentVolumeClaim) bool {
	switch c.Status.AllocatedResourceStatuses[corev1.ResourceStorage] {
	case corev1.PersistentVolumeClaimNodeResizePending, corev1.PersistentVolumeClaimNodeResizeInProgress, corev1.PersistentVolumeClaimNodeResizeInfeasible:
		return true
	}
	return false
}

func (r *resizer) expand(ctx context.Context, claim *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume, asked resource.Quantity) error {
	if claim.Status.AllocatedResourceStatuses[corev1.ResourceStorage] != corev1.PersistentVolumeClaimControllerResizeInProgress || !allocated(claim, asked) {
		r.events.Event(claim, corev1.EventTypeNormal, "Resizing", "the volume "+pv.Name+" is being expanded")
		var err error
		if claim, err = r.mark(ctx, claim, asked, corev1.PersistentVolumeClaimControllerResizeInProgress, corev1.PersistentVolumeClaimResizing, ""); err != nil {
			return err
		}
	}
	if err := r.scope.Reach(ctx, pv); err != nil {
		return r.failed(ctx, claim, pv, asked, err)
	}
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := r.controller.ControllerExpandVolume(callCtx, &csi.ControllerExpandVolumeRequest{
		VolumeId: pv.Spec.CSI.VolumeHandle, CapacityRange: &csi.CapacityRange{RequiredBytes: asked.Value()},
	})
	if err != nil {
		return r.failed(ctx, claim, pv, asked, err)
	}
	size := resource.NewQuantity(resp.CapacityBytes, resource.BinarySI)
	if asked.Cmp(*size) > 0 {
		size = &asked
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"capacity": corev1.ResourceList{corev1.ResourceStorage: *size}}})
	if err != nil {
		return err
	}
	if _, err := r.client.CoreV1().PersistentVolumes().Patch(ctx, pv.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return err
	}
	r.capacity.changed()
	return r.announce(ctx, claim, *size)
}

func allocated(c *corev1.PersistentVolumeClaim, asked resource.Quantity) bool {
	have, ok := c.Status.AllocatedResources[corev1.ResourceStorage]
	return ok && have.Cmp(asked) == 0
}

// failed tells why. What can never succeed is said so on the claim, whose owner
// may then ask for less.
func (r *resizer) failed(ctx context.Context, claim *corev1.PersistentVolumeClaim, pv *corev1.PersistentVolume, asked resource.Quantity, err error) error {
	message := status.Convert(err).Message()
	r.events.Event(claim, corev1.EventTypeWarning, "VolumeResizeFailed", fmt.Sprintf("volume %s: %s", pv.Name, message))
	switch status.Code(err) {
	case codes.InvalidArgument, codes.OutOfRange, codes.NotFound:
		if _, merr := r.mark(ctx, claim, asked, corev1.PersistentVolumeClaimControllerResizeInfeasible, corev1.PersistentVolumeClaimControllerResizeError, message); merr != nil {
			return merr
		}
	}
	return err
}

// announce leaves the rest to the kubelet.
func (r *resizer) announce(ctx context.Context, claim *corev1.PersistentVolumeClaim, size resource.Quantity) error {
	_, err := r.mark(ctx, claim, size, corev1.PersistentVolumeClaimNodeResizePending, corev1.PersistentVolumeClaimFileSystemResizePending,
		"the kubelet grows the device and the file system when a pod has the volume")
	return err
}

// mark writes the state of an expansion onto the claim, which must not have
// changed meanwhile.
func (r *resizer) mark(ctx context.Context, claim *corev1.PersistentVolumeClaim, size resource.Quantity, state corev1.ClaimResourceStatus, condition corev1.PersistentVolumeClaimConditionType, message string) (*corev1.PersistentVolumeClaim, error) {
	next := claim.DeepCopy()
	next.Status.AllocatedResources = corev1.ResourceList{corev1.ResourceStorage: size}
	next.Status.AllocatedResourceStatuses = map[corev1.ResourceName]corev1.ClaimResourceStatus{corev1.ResourceStorage: state}
	next.Status.Conditions = []corev1.PersistentVolumeClaimCondition{{
		Type: condition, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(time.Now()), Message: message,
	}}
	for _, c := range claim.Status.Conditions {
		if !resizeCondition(c.Type) {
			next.Status.Conditions = append(next.Status.Conditions, c)
		}
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": claim.UID, "resourceVersion": claim.ResourceVersion},
		"status": map[string]any{
			"allocatedResources": next.Status.AllocatedResources, "allocatedResourceStatuses": next.Status.AllocatedResourceStatuses, "conditions": next.Status.Conditions,
		},
	})
	if err != nil {
		return nil, err
	}
	return r.client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
}

func resizeCondition(t corev1.PersistentVolumeClaimConditionType) bool {
	switch t {
	case corev1.PersistentVolumeClaimResizing, corev1.PersistentVolumeClaimFileSystemResizePending,
		corev1.PersistentVolumeClaimControllerResizeError, corev1.PersistentVolumeClaimNodeResizeError:
		return true
	}
	return false
}
