// Package snapshots runs the snapshot controller of a cluster: upstream's
// (external-snapshotter's common controller) binds VolumeSnapshots to their
// contents and protects both by finalizers; what is Atoll's beside it concerns
// where volumes lie:
//
//   - Each content is cared for by one node, which its label managed-by names
//     ("distributed snapshotting"). Upstream sets the label once; a content whose
//     node has left the cluster loses it here, and one without it is taken by a
//     node that has the snapshot (storage/csi/controllers). Those of disks in
//     vCenter are the supervisor's (supervisor/volumes), and the label says so.
//   - A claim that begins as a snapshot or as another claim gets its node by
//     supervisor/placement, which runs here, with the same rights and caches.
package snapshots

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	snapshotscheme "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/scheme"
	snapshotinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	common "github.com/kubernetes-csi/external-snapshotter/v8/pkg/common-controller"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/metrics"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/controller-runtime/pkg/cache"

	"github.com/openatoll/atoll/supervisor/placement"
)

const (
	// workers of upstream's controller, for snapshots and for contents each.
	workers = 4
	// resyncPeriod is how often everything is looked at without a cause.
	resyncPeriod = 15 * time.Minute
	// What failed is tried again after retryFirst, doubling up to retryAtMost.
	retryFirst  = 250 * time.Millisecond
	retryAtMost = 30 * time.Second
)

// Upstream records events and makes references by client-go's own scheme, which
// has no lock: its kinds must be in it before anything runs.
var errScheme = snapshotscheme.AddToScheme(scheme.Scheme)

// Options is what New needs.
type Options struct {
	// Config has the rights of atoll:snapshots. Required.
	Config *rest.Config
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// A Controller cares for the snapshots of one cluster.
type Controller struct {
	client    kubernetes.Interface
	snapshots snapshotclient.Interface
	log       *slog.Logger
}

// New returns a Controller that does nothing before Run.
func New(o Options) (*Controller, error) {
	if o.Config == nil {
		return nil, fmt.Errorf("snapshots: Config is required: %w", errdefs.ErrInvalidArgument)
	}
	if errScheme != nil {
		return nil, fmt.Errorf("snapshots: %w", errScheme)
	}
	client, err := kubernetes.NewForConfig(o.Config)
	if err != nil {
		return nil, err
	}
	snapshots, err := snapshotclient.NewForConfig(o.Config)
	if err != nil {
		return nil, err
	}
	return newController(client, snapshots, o.Logger), nil
}

func newController(client kubernetes.Interface, snapshots snapshotclient.Interface, log *slog.Logger) *Controller {
	if log == nil {
		log = slog.Default()
	}
	return &Controller{client: client, snapshots: snapshots, log: log.With("component", "snapshots")}
}

// A cluster is what the parts of the controller see of it.
type cluster struct {
	*Controller
	core   informers.SharedInformerFactory
	kinds  snapshotinformers.SharedInformerFactory
	events record.EventRecorder
}

func (c *Controller) watch(events record.EventRecorder) *cluster {
	strip := cache.TransformStripManagedFields()
	return &cluster{
		Controller: c, events: events,
		core:  informers.NewSharedInformerFactoryWithOptions(c.client, resyncPeriod, informers.WithTransform(strip)),
		kinds: snapshotinformers.NewSharedInformerFactoryWithOptions(c.snapshots, resyncPeriod, snapshotinformers.WithTransform(strip)),
	}
}

// Run cares for snapshots until ctx ends; a second call is no use. While kinds of
// its are not served it waits for them.
func (c *Controller) Run(ctx context.Context) error {
	broadcaster := record.NewBroadcaster()
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: c.client.CoreV1().Events("")})
	w := c.watch(broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "atoll-snapshots"}))
	placer := placement.New(placement.Cluster{Client: w.client, Core: w.core, Kinds: w.kinds, Events: w.events, Log: w.log})
	keeper := newKeeper(w)
	upstream := w.upstream()

	w.core.Start(ctx.Done())
	w.kinds.Start(ctx.Done())
	defer w.core.Shutdown()
	defer w.kinds.Shutdown()
	w.core.WaitForCacheSync(ctx.Done())
	w.kinds.WaitForCacheSync(ctx.Done())
	if ctx.Err() != nil {
		return nil
	}
	var parts sync.WaitGroup
	parts.Go(func() { placer.Run(ctx) })
	parts.Go(func() { keeper.run(ctx) })
	upstream(ctx)
	parts.Wait()
	return nil
}

// upstream is the common controller, in the mode in which each node takes the
// snapshots of its volumes, without groups of snapshots.
func (w *cluster) upstream() func(context.Context) {
	limiter := func() workqueue.TypedRateLimiter[string] {
		return workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryAtMost)
	}
	kinds, groups, core := w.kinds.Snapshot().V1(), w.kinds.Groupsnapshot().V1(), w.core.Core().V1()
	const perNode, keepVolumeMode, withGroups = true, true, false
	controller := common.NewCSISnapshotCommonController(
		w.snapshots, w.client,
		kinds.VolumeSnapshots(), kinds.VolumeSnapshotContents(), kinds.VolumeSnapshotClasses(),
		groups.VolumeGroupSnapshots(), groups.VolumeGroupSnapshotContents(), groups.VolumeGroupSnapshotClasses(),
		core.PersistentVolumeClaims(), core.PersistentVolumes(), core.Nodes(),
		metrics.NewMetricsManager(), resyncPeriod,
		limiter(), limiter(), limiter(), limiter(),
		perNode, keepVolumeMode, withGroups,
	)
	return func(ctx context.Context) { controller.Run(workers, ctx.Done(), &sync.WaitGroup{}) }
}
