package volumes

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/csi/controllers"
)

const (
	// surveyAfter is how long after a change volumes are surveyed, so that many
	// changes cost one survey: a call for each 500 volumes and one for each 100
	// of a policy.
	surveyAfter = 500 * time.Millisecond
	// surveyTimeout bounds one; the next goes on where it ended.
	surveyTimeout = 5 * time.Minute
	// surveyRetry is when one that failed is made again.
	surveyRetry = 15 * time.Second
	// defaultEvery is the Supervisor's own default.
	defaultEvery = 5 * time.Minute
	// ownLabels are no user's.
	ownLabels = "atoll.dev/"
)

// survey runs until ctx ends: when something changed, and every so often.
func (c *connection) survey(ctx context.Context) error {
	if c.every <= 0 {
		c.every = defaultEvery
	}
	stop := c.policies.listen(c.wake)
	defer stop()
	c.factory.Start(ctx.Done())
	c.factory.WaitForCacheSync(ctx.Done())
	var orphansAt time.Time
	for ctx.Err() == nil {
		wait := c.every
		err := c.once(ctx)
		shownDisks.ask(c.address, err)
		if err == nil && time.Since(orphansAt) >= c.orphansEvery() {
			if err = c.lookForOrphans(ctx); err == nil {
				orphansAt = time.Now()
			}
		}
		if err != nil && ctx.Err() == nil {
			c.log.Warn("volumes were not surveyed; trying again", "vcenter", c.address, "err", err)
			wait = min(wait, surveyRetry)
		}
		c.rest(ctx, min(wait, c.orphansEvery()))
	}
	return nil
}

// orphansEvery is sooner while one waits for its grace.
func (c *connection) orphansEvery() time.Duration {
	if len(c.orphans) > 0 {
		return min(c.options.OrphanEvery, c.options.OrphanGrace)
	}
	return c.options.OrphanEvery
}

// rest waits for a while, or for a change and what follows it.
func (c *connection) rest(ctx context.Context, wait time.Duration) {
	select {
	case <-ctx.Done():
		return
	case <-time.After(wait):
		return
	case <-c.wake:
	}
	select {
	case <-ctx.Done():
	case <-time.After(surveyAfter):
	}
}

// A bound volume is one that a claim has.
type bound struct {
	pv    *corev1.PersistentVolume
	claim *corev1.PersistentVolumeClaim
}

// once compares what claims say with what vCenter has, and writes either onto the
// other.
func (c *connection) once(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, surveyTimeout)
	defer cancel()
	uuid, err := c.store.VCenter(ctx)
	if err != nil {
		return err
	}
	all, err := c.bound(uuid)
	if err != nil {
		showVolumes(nil)
		return err
	}
	listed, err := c.store.Inventory(ctx)
	if err != nil {
		return err
	}
	shownDisks.show(c.address, uuid, listed)
	if len(all) == 0 {
		showVolumes(nil)
		return nil
	}
	byID := map[string]storage.Volume{}
	for _, v := range listed {
		if v.Unfinished == "" {
			byID[v.ID] = v.Volume
		}
	}
	var failed error
	for _, b := range all {
		v, ok := byID[b.pv.Spec.CSI.VolumeHandle]
		if want := wanted(b); ok && !maps.Equal(v.Labels, want) {
			if err := c.store.Relabel(ctx, v.ID, want); err != nil {
				failed = fmt.Errorf("claim %s/%s: %w", b.claim.Namespace, b.claim.Name, err)
			}
		}
	}
	if err := c.audit(ctx, all); err != nil {
		return err
	}
	return failed
}

// bound are the volumes of this vCenter that claims have.
func (c *connection) bound(uuid string) (all []bound, err error) {
	volumes, err := c.factory.Core().V1().PersistentVolumes().Lister().List(labels.Everything())
	if err != nil {
		return nil, err
	}
	claims := c.factory.Core().V1().PersistentVolumeClaims().Lister()
	for _, pv := range volumes {
		if !controllers.OfVCenter(pv) || pv.Spec.CSI.VolumeAttributes[controllers.VCenterAttribute] != uuid || pv.Spec.ClaimRef == nil || pv.DeletionTimestamp != nil {
			continue
		}
		claim, err := claims.PersistentVolumeClaims(pv.Spec.ClaimRef.Namespace).Get(pv.Spec.ClaimRef.Name)
		if err != nil || claim.UID != pv.Spec.ClaimRef.UID || claim.Spec.VolumeName != pv.Name {
			continue // it is gone, or not bound yet
		}
		all = append(all, bound{pv, claim})
	}
	return all, nil
}

// wanted is what vSphere is to show of a volume: who has it, and that claim's
// labels.
func wanted(b bound) map[string]string {
	out := map[string]string{}
	for k, v := range b.claim.Labels {
		if !strings.HasPrefix(k, ownLabels) {
			out[k] = v
		}
	}
	out[storage.LabelPVC], out[storage.LabelNamespace], out[storage.LabelPV] = b.claim.Name, b.claim.Namespace, b.pv.Name
	return out
}

// audit writes onto claims whether their volumes are kept as the policies say.
// While vCenter does not answer, its last answers stay.
func (c *connection) audit(ctx context.Context, all []bound) error {
	answers, err := c.store.Audit(ctx)
	if err != nil {
		return err
	}
	counts := map[storage.ComplianceState]int{}
	var failed error
	for _, b := range all {
		id := b.pv.Spec.CSI.VolumeHandle
		answer, ok := answers[id]
		if !ok {
			answer = storage.Compliance{State: storage.ComplianceUnknown, Message: "vCenter " + c.address + " shows no volume " + id + ": it was deleted there, or Atoll may not see it"}
		}
		counts[answer.State]++
		if err := c.tell(ctx, b, answer); err != nil {
			failed = err
		}
	}
	showVolumes(counts)
	return failed
}

// tell says it on the claim, and in an event when it is news to the worse, or
// back to the better.
func (c *connection) tell(ctx context.Context, b bound, answer storage.Compliance) error {
	had := storage.ComplianceState(b.claim.Annotations[v1alpha1.AnnotationPolicyCompliance])
	if had == answer.State && b.claim.Annotations[v1alpha1.AnnotationPolicyComplianceReason] == answer.Message {
		return nil
	}
	var reason any // null takes the annotation away
	if answer.Message != "" {
		reason = answer.Message
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": b.claim.UID, "annotations": map[string]any{
		v1alpha1.AnnotationPolicyCompliance: answer.State, v1alpha1.AnnotationPolicyComplianceReason: reason,
	}}})
	if err != nil {
		return err
	}
	_, err = c.client.CoreV1().PersistentVolumeClaims(b.claim.Namespace).Patch(ctx, b.claim.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // another claim by now, or none
	}
	if err != nil {
		return fmt.Errorf("claim %s/%s: %w", b.claim.Namespace, b.claim.Name, err)
	}
	switch {
	case had == answer.State: // for another reason
	case answer.State == storage.NonCompliant:
		c.events.Event(b.claim, corev1.EventTypeWarning, "PolicyNotCompliant", answer.Message)
	case answer.State == storage.ComplianceUnknown:
		c.events.Event(b.claim, corev1.EventTypeWarning, "PolicyComplianceUnknown", answer.Message)
	case had != "":
		c.events.Event(b.claim, corev1.EventTypeNormal, "PolicyCompliant", "the volume is kept again as its storage policy says")
	}
	return nil
}

// claimChanged wakes the survey where it has something to do.
func (c *connection) claimChanged(before, now any) {
	claim, ok := now.(*corev1.PersistentVolumeClaim)
	if !ok || claim.Spec.VolumeName == "" {
		return
	}
	old, _ := before.(*corev1.PersistentVolumeClaim)
	if old != nil && old.Spec.VolumeName == claim.Spec.VolumeName && maps.Equal(old.Labels, claim.Labels) &&
		old.Annotations[v1alpha1.AnnotationPolicyCompliance] == claim.Annotations[v1alpha1.AnnotationPolicyCompliance] {
		return
	}
	if pv, err := c.factory.Core().V1().PersistentVolumes().Lister().Get(claim.Spec.VolumeName); err == nil && !controllers.OfVCenter(pv) {
		return
	}
	poke(c.wake)
}

func (c *connection) volumeChanged(before, now any) {
	pv, ok := now.(*corev1.PersistentVolume)
	old, _ := before.(*corev1.PersistentVolume)
	if ok && controllers.OfVCenter(pv) && (old == nil || old.Status.Phase != pv.Status.Phase) {
		poke(c.wake)
	}
}
