package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions/volumesnapshot/v1"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/utils"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/openatoll/atoll/internal/keyqueue"
)

// Reasons of events.
const (
	reasonHandedOver = "SnapshotHandedOver"
	reasonWaits      = "SnapshotWaits"
)

// A handover gives a content to the node that alone can take its snapshot. Upstream
// gives the contents of a shared volume to any node that reaches it; where blocks
// cannot be shared, only the node whose pod writes to the volume can copy it. That one
// finds what it would have found as the first: records lie in the shared datastore,
// and a snapshot's name is of the VolumeSnapshot's UID. When the pod has moved
// meanwhile, it hands the content on: there are no more handovers than moves.
//
// Contents are given away between two tries, when upstream's controller has written
// how the last one went. Had it begun the next one, the version would be another, and
// what it began later is refused by admission: the content is no longer its node's.
type handover struct {
	*group
	contents snapshotinformers.VolumeSnapshotContentInformer
	queue    keyqueue.Queue

	mu sync.Mutex
	to map[string]string // the node that was named by the last try, by content
}

func newHandover(g *group, mine snapshotinformers.VolumeSnapshotContentInformer) *handover {
	h := &handover{group: g, contents: mine, queue: keyqueue.New(retryFirst, retryAtMost), to: map[string]string{}}
	keyqueue.Handle(mine.Informer(), func(c *snapshotv1.VolumeSnapshotContent) {
		if h.named(c.Name) != "" {
			h.queue.Add(c.Name)
		}
	})
	return h
}

func (h *handover) run(ctx context.Context) {
	keyqueue.Run(ctx, h.queue, h.Logger, "content", h.give)
}

// tried notes how a try of a content ended: node is who could do better, or empty.
// What upstream's controller then writes is what wakes give.
func (h *handover) tried(content, node string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if node == "" {
		delete(h.to, content)
	} else {
		h.to[content] = node
	}
}

func (h *handover) named(content string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.to[content]
}

// between: the last try has ended without a snapshot, and upstream's controller has
// written so; a next one has not begun.
func between(c *snapshotv1.VolumeSnapshotContent) bool {
	_, trying := c.Annotations[utils.AnnVolumeSnapshotBeingCreated]
	return !trying && c.Status != nil && c.Status.Error != nil && c.Status.SnapshotHandle == nil && c.Status.CreationTime == nil
}

// give hands a content over, if its time has come. While the other node does not
// work it stays, and is looked at after each try.
func (h *handover) give(ctx context.Context, name string) error {
	node := h.named(name)
	c, err := h.contents.Lister().Get(name)
	if node == "" || apierrors.IsNotFound(err) || err == nil && c.DeletionTimestamp != nil {
		h.tried(name, "") // nothing is kept of what goes
		return nil
	}
	if err != nil || !between(c) {
		return err
	}
	if works, err := h.works(ctx, node); err != nil {
		return err
	} else if !works {
		h.tell(c, corev1.EventTypeWarning, reasonWaits, fmt.Sprintf("node %s, whose pod writes to the volume, could take this snapshot, but it is not ready: it waits for that node, or until nobody has the volume", node))
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": c.ResourceVersion, "labels": map[string]string{ContentKeeper: node},
	}})
	if err != nil {
		return err
	}
	_, err = h.snapshots.VolumeSnapshotContents().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // gone, or back in the queue as it is now
	}
	if err != nil {
		return fmt.Errorf("content %s: %w", name, err)
	}
	h.tried(name, "")
	h.tell(c, corev1.EventTypeNormal, reasonHandedOver, fmt.Sprintf("node %s takes this snapshot: its pod writes to the volume, which it alone can copy", node))
	h.Logger.Info("a snapshot is handed over", "content", name, "node", node)
	return nil
}
