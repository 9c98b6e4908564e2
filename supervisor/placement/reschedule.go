package placement

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	storagehelpers "k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const (
	// A claim that is rescheduled again and again, because a node says that it has
	// room and makes no volume, waits rescheduleFirst, doubling up to
	// rescheduleAtMost, from the second time on.
	rescheduleFirst  = time.Second
	rescheduleAtMost = time.Minute
	forgetAfter      = 5 * rescheduleAtMost
)

// A rescheduling is how often, and when last, a claim was taken from a node.
type rescheduling struct {
	times int
	last  time.Time
}

// left is how long the next one waits.
func (r rescheduling) left(now time.Time) time.Duration {
	if r.times == 0 {
		return 0
	}
	wait := rescheduleAtMost
	if shift := r.times - 1; shift < 6 {
		wait = min(wait, rescheduleFirst<<shift)
	}
	return wait - now.Sub(r.last)
}

// refusal is the condition by which a node gives a claim back, or nil.
func refusal(claim *corev1.PersistentVolumeClaim) *corev1.PersistentVolumeClaimCondition {
	i := slices.IndexFunc(claim.Status.Conditions, func(c corev1.PersistentVolumeClaimCondition) bool { return c.Type == v1alpha1.ClaimRefused })
	if i < 0 {
		return nil
	}
	return &claim.Status.Conditions[i]
}

// reschedule has the scheduler select again for a claim that waits for its first
// pod, when the node that it has makes no volume or has left the cluster. The
// node's word comes last: until it is taken away no node makes one.
func (p *Placer) reschedule(ctx context.Context, key string, claim *corev1.PersistentVolumeClaim) error {
	selected, said := claim.Annotations[storagehelpers.AnnSelectedNode], refusal(claim)
	if selected == "" {
		return p.heard(ctx, claim)
	}
	why := "it has left the cluster"
	if said != nil {
		why = said.Message
	} else if gone, err := p.gone(ctx, selected); err != nil || !gone {
		return err
	}
	if left := p.again[key].left(p.now()); left > 0 {
		p.queue.AddAfter(key, left)
		return nil
	}
	if made, err := p.made(ctx, claim); err != nil || made {
		return err // it is bound in a moment
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": claim.ResourceVersion, "annotations": map[string]any{storagehelpers.AnnSelectedNode: nil},
	}})
	if err != nil {
		return err
	}
	if _, err := p.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return client.IgnoreNotFound(err)
	}
	p.taken(key)
	p.Events.Event(claim, corev1.EventTypeWarning, "Rescheduled", fmt.Sprintf("node %s makes no volume, the scheduler selects again: %s", selected, why))
	p.Log.Info("a claim is scheduled again", "namespace", claim.Namespace, "claim", claim.Name, "node", selected, "reason", why)
	return p.heard(ctx, claim)
}

// taken counts that a claim was taken from a node.
func (p *Placer) taken(key string) {
	maps.DeleteFunc(p.again, func(_ string, r rescheduling) bool { return p.now().Sub(r.last) > forgetAfter })
	p.again[key] = rescheduling{p.again[key].times + 1, p.now()}
}

// handOver gives a claim that begins as another one to the node which that of the
// claim has named as the only one that can copy the source, if it is one of those
// that reach it. The node's word comes last: until it is taken away no node makes a
// volume. If it names none of them, the claim's own node tries again.
func (p *Placer) handOver(ctx context.Context, key string, claim *corev1.PersistentVolumeClaim, nodes []string, reason string) error {
	node, named := strings.CutPrefix(reason, v1alpha1.ClaimOfNode)
	if named && slices.Contains(nodes, node) && claim.Annotations[storagehelpers.AnnSelectedNode] != node {
		if left := p.again[key].left(p.now()); left > 0 {
			p.queue.AddAfter(key, left)
			return nil
		}
		if err := p.selectNode(ctx, claim, node, "PlacedBySource", fmt.Sprintf("the volume is made on node %s, whose pod writes to %s: it alone can copy that", node, sourceOf(claim))); err != nil {
			return err
		}
		p.taken(key)
	}
	return p.heard(ctx, claim)
}

// heard takes the node's word from a claim.
func (p *Placer) heard(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	if refusal(claim) == nil {
		return nil
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": claim.UID},
		"status":   map[string]any{"conditions": []map[string]string{{"type": v1alpha1.ClaimRefused, "$patch": "delete"}}},
	})
	if err != nil {
		return err
	}
	_, err = p.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	return client.IgnoreNotFound(err)
}

// gone: the API server, too, knows no such node.
func (p *Placer) gone(ctx context.Context, node string) (bool, error) {
	if _, err := p.Core.Core().V1().Nodes().Lister().Get(node); !apierrors.IsNotFound(err) {
		return false, err
	}
	_, err := p.Client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	return apierrors.IsNotFound(err), client.IgnoreNotFound(err)
}

// made: there is a PersistentVolume by the name that provisioners give; the cache
// may be behind.
func (p *Placer) made(ctx context.Context, claim *corev1.PersistentVolumeClaim) (bool, error) {
	_, err := p.Client.CoreV1().PersistentVolumes().Get(ctx, "pvc-"+string(claim.UID), metav1.GetOptions{})
	return err == nil, client.IgnoreNotFound(err)
}
