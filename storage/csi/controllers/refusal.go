package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/openatoll/atoll/api/v1alpha1"
	atollcsi "github.com/openatoll/atoll/storage/csi"
)

// lostAfter is how long a datastore does not answer before a claim that waits for
// it is given back: a mount may come a moment later than the node.
const lostAfter = 10 * time.Second

// Reasons of v1alpha1.ClaimRefused, beside v1alpha1.ClaimOfNode.
const (
	reasonNoRoom = "NoRoom"
	reasonLost   = "DatastoreUnavailable"
)

// refusals give claims back whose volumes this node cannot make although it was
// selected: to the scheduler, or to the node that alone can copy their source.
// Upstream's provisioner takes the annotation selected-node away itself, which a node
// may not; so the node says it by a condition of the claim, and the supervisor does
// it. From then on the node makes no volume of the claim, even if it could again:
// there would be two.
type refusals struct {
	*group
	mu sync.Mutex
	of map[types.UID]refusal
	// now is the time.
	now func() time.Time
}

// A refusal is what is known of one claim.
type refusal struct {
	// failing is since when each attempt found the datastore away; zero: it did not.
	failing time.Time
	// written is the claim's version on which the condition was written; the cache
	// may have that version for a moment more.
	written string
}

func newRefusals(g *group) *refusals {
	return &refusals{group: g, of: map[types.UID]refusal{}, now: time.Now}
}

// forget: the claim is not this node's, or its volume is made.
func (r *refusals) forget(uid types.UID) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.of, uid)
}

// stands tells whether a node has refused the claim and the supervisor has not
// acted on it.
func (r *refusals) stands(claim *corev1.PersistentVolumeClaim) bool {
	if slices.ContainsFunc(claim.Status.Conditions, func(c corev1.PersistentVolumeClaimCondition) bool {
		return c.Type == v1alpha1.ClaimRefused && c.Status == corev1.ConditionTrue
	}) {
		return true
	}
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	written := r.of[claim.UID].written
	return written != "" && written == claim.ResourceVersion
}

// consider refuses the claim of an attempt that failed, if another node might do
// better and this one has made nothing. It tells whether it did.
func (r *refusals) consider(ctx context.Context, claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass, failed error) bool {
	if r == nil {
		return false
	}
	reason := ""
	if node := atollcsi.HeldBy(failed); node != "" {
		if works, err := r.works(ctx, node); err != nil || !works {
			return false // its volume may be free before the node is back
		}
		reason = v1alpha1.ClaimOfNode + node
	} else if waitsForPod(class) && claim.Spec.DataSource == nil && claim.Spec.DataSourceRef == nil {
		reason = r.judge(claim.UID, status.Code(failed))
	}
	if reason == "" {
		return false
	}
	// Whoever selects again shall see what this node sees.
	if err := r.capacity.publish(ctx); err != nil {
		r.Logger.Warn("room for volumes could not be published; trying again", "err", err)
	}
	if err := r.write(ctx, claim, reason, status.Convert(failed).Message()); err != nil {
		r.Logger.Warn("a claim could not be given back; trying again", "namespace", claim.Namespace, "claim", claim.Name, "err", err)
		return false
	}
	r.Logger.Info("a claim is given back", "namespace", claim.Namespace, "claim", claim.Name, "reason", reason, "err", failed)
	return true
}

// waitsForPod: the scheduler selects the node, by a pod.
func waitsForPod(class *storagev1.StorageClass) bool {
	return class.VolumeBindingMode != nil && *class.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer
}

// judge returns why the claim is to be refused; "": it is not, yet.
func (r *refusals) judge(uid types.UID, code codes.Code) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.of[uid]
	switch code {
	case codes.ResourceExhausted:
		return reasonNoRoom
	case codes.Unavailable:
		if was.failing.IsZero() {
			was.failing = r.now()
		} else if r.now().Sub(was.failing) >= lostAfter {
			return reasonLost
		}
	default:
		was.failing = time.Time{} // it may be in the making
	}
	r.of[uid] = was
	return ""
}

// write puts the condition onto a claim that is as it was when it was tried.
func (r *refusals) write(ctx context.Context, claim *corev1.PersistentVolumeClaim, reason, why string) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": claim.UID, "resourceVersion": claim.ResourceVersion},
		"status": map[string]any{"conditions": []corev1.PersistentVolumeClaimCondition{{
			Type: v1alpha1.ClaimRefused, Status: corev1.ConditionTrue, Reason: reason, LastTransitionTime: metav1.NewTime(r.now()),
			Message: fmt.Sprintf("node %s: %s", r.NodeName, why),
		}}},
	})
	if err != nil {
		return err
	}
	if _, err := r.client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.of[claim.UID] = refusal{written: claim.ResourceVersion}
	return nil
}
