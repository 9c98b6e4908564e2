package snapshots

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/utils"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/keyqueue"
)

// managedBy is the label that names the node which cares for a content, or the
// vCenter that has it (v1alpha1.ContentOfVCenter).
const managedBy = utils.VolumeSnapshotContentManagedByLabel

// takeTime is how long nodes, and vCenter, have to find a snapshot before it is said
// that none has it: several times what one needs that is there and not busy.
const takeTime = time.Minute

// A keeper sees to it that each content has a node.
type keeper struct {
	*cluster
	queue keyqueue.Queue
	now   func() time.Time
}

func newKeeper(w *cluster) *keeper {
	k := &keeper{cluster: w, queue: keyqueue.New(retryFirst, retryAtMost), now: time.Now}
	keyqueue.Handle(w.kinds.Snapshot().V1().VolumeSnapshotContents().Informer(), func(c *snapshotv1.VolumeSnapshotContent) { k.queue.Add(c.Name) })
	_, _ = w.core.Core().V1().Nodes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{DeleteFunc: func(any) { k.all() }})
	return k
}

func (k *keeper) all() {
	contents, _ := k.kinds.Snapshot().V1().VolumeSnapshotContents().Lister().List(labels.Everything())
	for _, c := range contents {
		k.queue.Add(c.Name)
	}
}

func (k *keeper) run(ctx context.Context) { keyqueue.Run(ctx, k.queue, k.log, "content", k.keep) }

func (k *keeper) keep(ctx context.Context, name string) error {
	content, err := k.kinds.Snapshot().V1().VolumeSnapshotContents().Lister().Get(name)
	if err != nil || content.Spec.Driver != v1alpha1.CSIDriverName {
		return client.IgnoreNotFound(err)
	}
	switch node := content.Labels[managedBy]; {
	case strings.HasPrefix(node, v1alpha1.ContentOfVCenter):
		return nil
	case node != "":
		return k.leave(ctx, content, node)
	}
	if content.DeletionTimestamp != nil && content.Spec.DeletionPolicy == snapshotv1.VolumeSnapshotContentRetain {
		return k.release(ctx, content)
	}
	if left := takeTime - k.now().Sub(content.CreationTimestamp.Time); left > 0 {
		k.queue.AddAfter(name, left)
		return nil
	}
	message := "neither a node nor vCenter is known to have this snapshot: correct the handle in spec.source, or bring back the node or the vCenter that has it"
	if content.DeletionTimestamp != nil {
		message = "it cannot be deleted where it is: neither a node nor vCenter is known to have this snapshot: bring back who has it, or set spec.deletionPolicy to Retain, which lets the content go and leaves the snapshot"
	}
	k.events.Event(content, corev1.EventTypeWarning, "NoNodeHasSnapshot", message)
	if ref := content.Spec.VolumeSnapshotRef; ref.UID != "" {
		k.events.Event(&ref, corev1.EventTypeWarning, "NoNodeHasSnapshot", message+" ("+content.Name+")")
	}
	return nil
}

// release lets a content go whose snapshot is to be left where it is, wherever that
// may be: nobody else is there to do so.
func (k *keeper) release(ctx context.Context, content *snapshotv1.VolumeSnapshotContent) error {
	if content.Spec.VolumeSnapshotRef.UID != "" && content.Annotations[utils.AnnVolumeSnapshotBeingDeleted] == "" {
		return nil // its VolumeSnapshot is there
	}
	rest := slices.DeleteFunc(slices.Clone(content.Finalizers), func(f string) bool { return f == utils.VolumeSnapshotContentFinalizer })
	if len(rest) == len(content.Finalizers) {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"resourceVersion": content.ResourceVersion, "finalizers": rest}})
	if err != nil {
		return err
	}
	_, err = k.snapshots.SnapshotV1().VolumeSnapshotContents().Patch(ctx, content.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	return client.IgnoreNotFound(err)
}

// leave takes the label of a node that has left the cluster from a content.
func (k *keeper) leave(ctx context.Context, content *snapshotv1.VolumeSnapshotContent, node string) error {
	if _, err := k.core.Core().V1().Nodes().Lister().Get(node); !apierrors.IsNotFound(err) {
		return err
	}
	// The cache may be behind.
	if _, err := k.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return err
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": content.ResourceVersion, "labels": map[string]any{managedBy: nil},
	}})
	if err != nil {
		return err
	}
	if _, err := k.snapshots.SnapshotV1().VolumeSnapshotContents().Patch(ctx, content.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return client.IgnoreNotFound(err)
	}
	k.events.Event(content, corev1.EventTypeWarning, "NodeGone", fmt.Sprintf("node %s has left the cluster: another one that has the snapshot takes it", node))
	return nil
}
