package controllers

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	snapshotscheme "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/scheme"
	snapshotinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	sidecar "github.com/kubernetes-csi/external-snapshotter/v8/pkg/sidecar-controller"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/utils"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
)

const (
	// contentNode is the label that names the node which cares for a content.
	contentNode = utils.VolumeSnapshotContentManagedByLabel
	// snapshotPrefix and the VolumeSnapshot's UID are a snapshot's name.
	snapshotPrefix  = "snapshot"
	snapshotWorkers = 4
)

// Upstream records events by client-go's own scheme, which has no lock: its kinds
// must be in it before anything runs.
var errScheme = snapshotscheme.AddToScheme(scheme.Scheme)

// snapshotting takes and deletes the snapshots of the contents that the node
// cares for. It is upstream's sidecar controller, which, other than provisioner
// and resizer, registers no gate of the kubelet's and ends no process; it gets the
// driver as we reach it, not over upstream's connection.
type snapshotting struct {
	*group
	// mine are the contents with this node's label, others those without any.
	mine, others, classes snapshotinformers.SharedInformerFactory
	adopter               *adopter
	controller            interface {
		Run(workers int, stop <-chan struct{}, wg *sync.WaitGroup)
	}
}

func newSnapshotting(g *group, client snapshotclient.Interface) *snapshotting {
	factory := func(selector string) snapshotinformers.SharedInformerFactory {
		return snapshotinformers.NewSharedInformerFactoryWithOptions(client, resyncPeriod, snapshotinformers.WithTransform(withoutManagedFields),
			snapshotinformers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = selector }))
	}
	limiter := func() workqueue.TypedRateLimiter[string] {
		return workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryAtMost)
	}
	s := &snapshotting{group: g, mine: factory(contentNode + "=" + g.NodeName), others: factory("!" + contentNode), classes: factory("")}
	const wholeUID, withMetadata, withGroups = -1, true, false
	s.controller = sidecar.NewCSISnapshotSideCarController(
		client, g.client, g.Driver,
		s.mine.Snapshot().V1().VolumeSnapshotContents(), s.classes.Snapshot().V1().VolumeSnapshotClasses(),
		snapshotter{g}, nil, callTimeout, resyncPeriod, snapshotPrefix, wholeUID, "", wholeUID, withMetadata,
		limiter(), withGroups, nil, nil, limiter(),
	)
	s.adopter = newAdopter(g, s.others)
	return s
}

// run returns when ctx ends. Until the kinds of snapshots are served it waits:
// a node may be of a cluster that has none.
func (s *snapshotting) run(ctx context.Context) {
	for _, f := range []snapshotinformers.SharedInformerFactory{s.mine, s.others, s.classes} {
		f.Start(ctx.Done())
		defer f.Shutdown()
	}
	var parts sync.WaitGroup
	parts.Go(func() { s.adopter.run(ctx) })
	s.controller.Run(snapshotWorkers, ctx.Done(), &sync.WaitGroup{})
	parts.Wait()
}

// A snapshotter is upstream's interface on the driver.
type snapshotter struct{ *group }

// CreateSnapshot implements upstream's Snapshotter.
func (s snapshotter) CreateSnapshot(ctx context.Context, name, volume string, parameters, secrets map[string]string) (driver, id string, at time.Time, bytes int64, ready bool, err error) {
	resp, err := s.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume, Parameters: parameters, Secrets: secrets})
	if err != nil {
		return "", "", time.Time{}, 0, false, readable(err)
	}
	s.capacity.changed()
	snap := resp.GetSnapshot()
	return s.Driver, snap.GetSnapshotId(), snap.GetCreationTime().AsTime(), snap.GetSizeBytes(), snap.GetReadyToUse(), nil
}

// DeleteSnapshot implements upstream's Snapshotter.
func (s snapshotter) DeleteSnapshot(ctx context.Context, id string, secrets map[string]string) error {
	if _, err := s.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id, Secrets: secrets}); err != nil {
		return readable(err)
	}
	s.capacity.changed()
	return nil
}

// GetSnapshotStatus implements upstream's Snapshotter; there are no groups.
func (s snapshotter) GetSnapshotStatus(ctx context.Context, id string, _ map[string]string) (ready bool, at time.Time, bytes int64, group string, err error) {
	snap, err := s.find(ctx, id)
	if err != nil {
		return false, time.Time{}, 0, "", readable(err)
	}
	if snap == nil {
		return false, time.Time{}, 0, "", readable(status.Errorf(codes.NotFound, "there is no snapshot %s on node %s", id, s.NodeName))
	}
	return snap.GetReadyToUse(), snap.GetCreationTime().AsTime(), snap.GetSizeBytes(), "", nil
}

// find returns nil if the snapshot is not on a datastore that the node reaches.
func (g *group) find(ctx context.Context, id string) (*csi.Snapshot, error) {
	resp, err := g.controller.ListSnapshots(ctx, &csi.ListSnapshotsRequest{SnapshotId: id})
	if err != nil || len(resp.GetEntries()) == 0 {
		return nil, err
	}
	return resp.Entries[0].GetSnapshot(), nil
}

// readable is a status whose text is its message alone, as users shall read it in
// events.
func readable(err error) error {
	if s, ok := status.FromError(err); ok {
		return plainStatus{s}
	}
	return err
}

type plainStatus struct{ s *status.Status }

func (p plainStatus) Error() string              { return p.s.Message() }
func (p plainStatus) GRPCStatus() *status.Status { return p.s }

// An adopter takes contents that no node cares for, if their snapshots or
// volumes are here: those that an admin has made for snapshots that are there,
// and those of nodes that have left the cluster.
type adopter struct {
	*group
	informer cache.SharedIndexInformer
	contents snapshotinformers.SharedInformerFactory
	queue    workqueue.TypedRateLimitingInterface[string]
}

func newAdopter(g *group, contents snapshotinformers.SharedInformerFactory) *adopter {
	a := &adopter{group: g, contents: contents, informer: contents.Snapshot().V1().VolumeSnapshotContents().Informer(),
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryAtMost))}
	add := func(o any) {
		if c, ok := o.(*snapshotv1.VolumeSnapshotContent); ok && c.Spec.Driver == g.Driver {
			a.queue.Add(c.Name)
		}
	}
	_, _ = a.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: add, UpdateFunc: func(_, o any) { add(o) }})
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
	if err != nil || content.Labels[contentNode] != "" {
		return err
	}
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if here, err := a.here(callCtx, content); err != nil || !here {
		return err
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": content.ResourceVersion, "labels": map[string]string{contentNode: a.NodeName},
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
	a.Logger.Info("the node cares for a snapshot from now on", "content", name)
	return nil
}

// here tells whether the node has a content's snapshot or, as long as that is not
// taken, the volume.
func (a *adopter) here(ctx context.Context, c *snapshotv1.VolumeSnapshotContent) (bool, error) {
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
