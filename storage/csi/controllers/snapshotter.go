package controllers

import (
	"context"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	snapshotscheme "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/scheme"
	snapshotinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	snapshotlisters "github.com/kubernetes-csi/external-snapshotter/client/v8/listers/volumesnapshot/v1"
	sidecar "github.com/kubernetes-csi/external-snapshotter/v8/pkg/sidecar-controller"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/utils"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/util/workqueue"

	atollcsi "github.com/openatoll/atoll/storage/csi"
)

const (
	// ContentKeeper is the label that names who cares for a content: a node, or
	// the supervisor (v1alpha1.ContentOfVCenter).
	ContentKeeper = utils.VolumeSnapshotContentManagedByLabel
	// snapshotPrefix and the VolumeSnapshot's UID are a snapshot's name.
	snapshotPrefix  = "snapshot"
	snapshotWorkers = 4
)

// Upstream records events by client-go's own scheme, which has no lock: its kinds
// must be in it before anything runs.
var errScheme = snapshotscheme.AddToScheme(scheme.Scheme)

// takeSnapshots takes and deletes snapshots until ctx ends. It waits until it is
// known for which contents, and begins anew should these become others.
func (g *group) takeSnapshots(ctx context.Context) {
	wait := retryFirst
	for ctx.Err() == nil {
		keeper, err := g.scope.Keeper(ctx)
		if err == nil {
			newSnapshotting(g, g.snapshotClient, keeper).run(ctx)
			wait = retryFirst
		}
		if ctx.Err() != nil {
			return
		}
		g.Logger.Warn("snapshots are not served; trying again", "err", err, "again in", wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
			wait = min(2*wait, retryAtMost)
		}
	}
}

// snapshotting takes and deletes the snapshots of the contents with one keeper. It
// is upstream's sidecar controller, which, other than provisioner and resizer,
// registers no gate of the kubelet's and ends no process; it gets the driver as we
// reach it, not over upstream's connection.
type snapshotting struct {
	*group
	keeper string
	// mine are the contents with the keeper's label, others those that lack it.
	mine, others, classes snapshotinformers.SharedInformerFactory
	adopter               *adopter
	handover              *handover
	calls                 *snapshotter
	controller            interface {
		Run(workers int, stop <-chan struct{}, wg *sync.WaitGroup)
	}
}

func newSnapshotting(g *group, client snapshotclient.Interface, keeper string) *snapshotting {
	factory := func(selector string) snapshotinformers.SharedInformerFactory {
		return snapshotinformers.NewSharedInformerFactoryWithOptions(client, resyncPeriod, snapshotinformers.WithTransform(withoutManagedFields),
			snapshotinformers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = selector }))
	}
	limiter := func() workqueue.TypedRateLimiter[string] {
		return workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryAtMost)
	}
	others := "!" + ContentKeeper
	if g.NodeName == "" { // of its volumes upstream may have given some to a node
		others = ContentKeeper + "!=" + keeper
	}
	s := &snapshotting{group: g, keeper: keeper, mine: factory(ContentKeeper + "=" + keeper), others: factory(others), classes: factory("")}
	s.handover = newHandover(g, s.mine.Snapshot().V1().VolumeSnapshotContents())
	s.calls = &snapshotter{group: g, keeper: keeper, contents: s.mine.Snapshot().V1().VolumeSnapshotContents().Lister(), handover: s.handover}
	const wholeUID, withMetadata, withGroups = -1, true, false
	s.controller = sidecar.NewCSISnapshotSideCarController(
		client, g.client, g.Driver,
		s.mine.Snapshot().V1().VolumeSnapshotContents(), s.classes.Snapshot().V1().VolumeSnapshotClasses(),
		s.calls, nil, callTimeout, resyncPeriod, snapshotPrefix, wholeUID, "", wholeUID, withMetadata,
		limiter(), withGroups, nil, nil, limiter(),
	)
	s.adopter = newAdopter(g, s.others, keeper)
	return s
}

// run returns when ctx ends, or the keeper has become another, and no call is under
// way any more. Until the kinds of snapshots are served it waits: a node may be of a
// cluster that has none.
func (s *snapshotting) run(ctx context.Context) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s.calls.begin(ctx, stop)
	defer s.calls.end()
	for _, f := range []snapshotinformers.SharedInformerFactory{s.mine, s.others, s.classes} {
		f.Start(ctx.Done())
		defer f.Shutdown()
	}
	var parts sync.WaitGroup
	parts.Go(func() { s.adopter.run(ctx) })
	parts.Go(func() { s.handover.run(ctx) })
	s.controller.Run(snapshotWorkers, ctx.Done(), &sync.WaitGroup{})
	parts.Wait()
}

// A snapshotter is upstream's interface on the driver. Upstream's workers outlive
// its Run: their calls do not.
type snapshotter struct {
	*group
	keeper   string
	contents snapshotlisters.VolumeSnapshotContentLister
	handover *handover

	mu    sync.Mutex
	ctx   context.Context // while calls may be made; else nil
	stop  func()          // has all begun anew
	calls sync.WaitGroup
}

func (s *snapshotter) begin(ctx context.Context, stop func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ctx, s.stop = ctx, stop
}

// end returns when no call is under way, and there will be none.
func (s *snapshotter) end() {
	s.mu.Lock()
	s.ctx = nil
	s.mu.Unlock()
	s.calls.Wait()
}

// call makes a call that ends with run. Its error is for users to read.
func (s *snapshotter) call(ctx context.Context, do func(context.Context) error) error {
	s.mu.Lock()
	running, stop := s.ctx, s.stop
	if running == nil {
		s.mu.Unlock()
		return readable(status.Error(codes.Unavailable, "the controllers are about to end"))
	}
	s.calls.Add(1)
	s.mu.Unlock()
	defer s.calls.Done()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(running, cancel)()
	now, err := s.scope.Keeper(ctx)
	switch {
	case err != nil:
		return readable(status.Errorf(codes.Unavailable, "nothing was done: %v", err))
	case now != s.keeper:
		stop()
		return readable(status.Errorf(codes.Unavailable, "nothing was done: the snapshot is %s's, and it is %s that answers", s.keeper, now))
	}
	return readable(do(ctx))
}

// CreateSnapshot implements upstream's Snapshotter.
func (s *snapshotter) CreateSnapshot(ctx context.Context, name, volume string, parameters, secrets map[string]string) (driver, id string, at time.Time, bytes int64, ready bool, err error) {
	var snap *csi.Snapshot
	err = s.call(ctx, func(ctx context.Context) error {
		resp, err := s.controller.CreateSnapshot(ctx, &csi.CreateSnapshotRequest{Name: name, SourceVolumeId: volume, Parameters: parameters, Secrets: secrets})
		snap = resp.GetSnapshot()
		s.handover.tried(parameters[utils.PrefixedVolumeSnapshotContentNameKey], atollcsi.HeldBy(err))
		if status.Code(err) == codes.ResourceExhausted {
			// Upstream takes it for one that may yet be made, and would let its
			// VolumeSnapshot go no sooner than there is room.
			err = status.Error(codes.FailedPrecondition, status.Convert(err).Message())
		}
		return err
	})
	if err != nil {
		return "", "", time.Time{}, 0, false, err
	}
	s.capacity.changed()
	return s.Driver, snap.GetSnapshotId(), snap.GetCreationTime().AsTime(), snap.GetSizeBytes(), snap.GetReadyToUse(), nil
}

// DeleteSnapshot implements upstream's Snapshotter. Upstream's event does not say
// why one could not be deleted; this one does.
func (s *snapshotter) DeleteSnapshot(ctx context.Context, id string, secrets map[string]string) error {
	err := s.call(ctx, func(ctx context.Context) error {
		_, err := s.controller.DeleteSnapshot(ctx, &csi.DeleteSnapshotRequest{SnapshotId: id, Secrets: secrets})
		return err
	})
	if err != nil {
		all, _ := s.contents.List(labels.Everything())
		for _, c := range all {
			if c.Status != nil && c.Status.SnapshotHandle != nil && *c.Status.SnapshotHandle == id {
				s.tell(c, corev1.EventTypeWarning, "SnapshotDeleteFailed", err.Error())
			}
		}
		return err
	}
	s.capacity.changed()
	return nil
}

// tell records an event on a content and on its VolumeSnapshot, whose user may not
// see contents.
func (g *group) tell(c *snapshotv1.VolumeSnapshotContent, kind, reason, message string) {
	g.events.Event(c, kind, reason, message)
	if ref := c.Spec.VolumeSnapshotRef; ref.UID != "" {
		g.events.Event(&ref, kind, reason, message+" ("+c.Name+")")
	}
}

// GetSnapshotStatus implements upstream's Snapshotter; there are no groups.
func (s *snapshotter) GetSnapshotStatus(ctx context.Context, id string, _ map[string]string) (ready bool, at time.Time, bytes int64, group string, err error) {
	var snap *csi.Snapshot
	err = s.call(ctx, func(ctx context.Context) error {
		var err error
		if snap, err = s.find(ctx, id); err == nil && snap == nil {
			err = status.Errorf(codes.NotFound, "there is no snapshot %s %s", id, s.here())
		}
		return err
	})
	if err != nil {
		return false, time.Time{}, 0, "", err
	}
	return snap.GetReadyToUse(), snap.GetCreationTime().AsTime(), snap.GetSizeBytes(), "", nil
}

// here is where the driver's volumes are.
func (g *group) here() string {
	if g.NodeName == "" {
		return "in vCenter"
	}
	return "on node " + g.NodeName
}

// find returns nil if the snapshot is not on a datastore that the node reaches, or
// not in vCenter.
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
	if err == nil {
		return nil
	}
	if s, ok := status.FromError(err); ok {
		return plainStatus{s}
	}
	return err
}

type plainStatus struct{ s *status.Status }

func (p plainStatus) Error() string              { return p.s.Message() }
func (p plainStatus) GRPCStatus() *status.Status { return p.s }
