package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/openatoll/atoll/internal/keyqueue"
)

// unknownAfter is how old a content is before it is told that it is not known
// whether vCenter has its snapshot: until then a node may take it.
const unknownAfter = 10 * time.Second

// An adopter takes contents that nobody cares for, if their snapshots or volumes
// are here: those that an admin has made for snapshots that are there, and those
// of nodes that have left the cluster. The supervisor takes those of volumes in
// vSphere whoever has been given them.
type adopter struct {
	*group
	informer cache.SharedIndexInformer
	contents snapshotinformers.SharedInformerFactory
	queue    keyqueue.Queue
	keeper   string
	now      func() time.Time
}

func newAdopter(g *group, contents snapshotinformers.SharedInformerFactory, keeper string) *adopter {
	a := &adopter{group: g, contents: contents, keeper: keeper, now: time.Now, informer: contents.Snapshot().V1().VolumeSnapshotContents().Informer(),
		queue: keyqueue.New(retryFirst, retryAtMost)}
	keyqueue.Handle(a.informer, func(c *snapshotv1.VolumeSnapshotContent) {
		if c.Spec.Driver == g.Driver {
			a.queue.Add(c.Name)
		}
	})
	return a
}

func (a *adopter) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, a.queue.ShutDown)
	defer stop()
	for {
		name, down := a.queue.Get()
		if down {
			return
		}
		if err := a.adopt(ctx, name); err != nil && ctx.Err() == nil {
			// Not said louder: the datastore may be another node's.
			a.Logger.Debug("a snapshot is not known to be here; trying again", "content", name, "err", err)
			a.queue.AddRateLimited(name)
		} else {
			a.queue.Forget(name)
		}
		a.queue.Done(name)
	}
}

func (a *adopter) adopt(ctx context.Context, name string) error {
	content, err := a.contents.Snapshot().V1().VolumeSnapshotContents().Lister().Get(name)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	switch a.scope.Content(content) {
	case Ours:
	case Theirs:
		return nil
	default:
		callCtx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		here, err := a.has(callCtx, content)
		if err != nil && a.NodeName == "" && a.now().Sub(content.CreationTimestamp.Time) > unknownAfter {
			a.tell(content, corev1.EventTypeWarning, "SnapshotUnknown", "whether vCenter has this snapshot is not known, which is asked again: "+readable(err).Error())
		}
		if err != nil || !here {
			return err
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": content.ResourceVersion, "labels": map[string]string{ContentKeeper: a.keeper},
	}})
	if err != nil {
		return err
	}
	_, err = a.snapshots.VolumeSnapshotContents().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // gone, another node's, or back in the queue as it is now
	}
	if err != nil {
		return fmt.Errorf("content %s: %w", name, err)
	}
	a.Logger.Info("a snapshot is cared for here from now on", "content", name, "keeper", a.keeper)
	return nil
}

// has tells whether the driver has a content's snapshot or, as long as that is not
// taken, the volume.
func (a *adopter) has(ctx context.Context, c *snapshotv1.VolumeSnapshotContent) (bool, error) {
	handle := c.Spec.Source.SnapshotHandle
	if c.Status != nil && c.Status.SnapshotHandle != nil {
		handle = c.Status.SnapshotHandle
	}
	if handle != nil {
		s, err := a.find(ctx, *handle)
		return s != nil, err
	}
	if c.Spec.Source.VolumeHandle == nil {
		return false, nil
	}
	_, err := a.controller.ControllerGetVolume(ctx, &csi.ControllerGetVolumeRequest{VolumeId: *c.Spec.Source.VolumeHandle})
	if status.Code(err) == codes.NotFound {
		return false, nil
	}
	return err == nil, err
}
