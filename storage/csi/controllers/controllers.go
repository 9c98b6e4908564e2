// Package controllers does for a CSI driver what its sidecars do elsewhere, in
// the process that serves it: it provisions and deletes volumes (on upstream's
// sig-storage-lib-external-provisioner), takes and deletes snapshots (by upstream's
// sidecar controller), expands volumes, and publishes how much room there is.
//
// Each node's instance cares for the datastores that the node reaches: for
// claims whose node the scheduler has selected, and for volumes that can be
// reached from it, as external-provisioner does with --node-deployment.
// Upstream's provisioner and resizer themselves cannot be linked into a process
// with the kubelet: both register feature gates of the same names.
package controllers

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/typed/volumesnapshot/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	atollcsi "github.com/openatoll/atoll/storage/csi"
)

// Config of a node's controllers.
type Config struct {
	// Client reaches the API server. Required.
	Client *rest.Config
	// Socket is the driver's. Required.
	Socket string
	// NodeName is the node for whose datastores the controllers care. Required.
	NodeName string
	// Namespace has the CSIStorageCapacity objects. Required.
	Namespace string
	// Logger; default slog.Default().
	Logger *slog.Logger
}

const (
	// callTimeout bounds one call of the driver; what was begun is found again
	// by the next one.
	callTimeout = time.Minute
	// startTimeout bounds the wait for the driver's socket.
	startTimeout = 10 * time.Second
	// resyncPeriod is how often everything is looked at without a cause.
	resyncPeriod = 10 * time.Minute
)

// A group is what the controllers of one driver share.
type group struct {
	Config
	// Driver is the driver's name.
	Driver    string
	client    kubernetes.Interface
	snapshots snapshotv1.SnapshotV1Interface
	// snapshotClient is what snapshots is of.
	snapshotClient snapshotclient.Interface
	controller     csi.ControllerClient
	factory        informers.SharedInformerFactory
	events         record.EventRecorder
	// segments are the topology of the node.
	segments map[string]string
	capacity *capacityController
}

// Run runs the controllers until ctx ends.
func Run(ctx context.Context, c Config) error {
	if c.Client == nil || c.Socket == "" || c.NodeName == "" || c.Namespace == "" {
		return fmt.Errorf("CSI controllers: Client, Socket, NodeName and Namespace are required: %w", errdefs.ErrInvalidArgument)
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if errScheme != nil {
		return fmt.Errorf("CSI controllers: %w", errScheme)
	}
	c.Logger = c.Logger.With("component", "csi-controllers")
	g := &group{Config: c, Driver: atollcsi.Name}
	stop, err := g.open(ctx)
	if err != nil {
		return err
	}
	defer stop()
	resizer := newResizer(g)
	g.capacity = newCapacityController(g)
	provisioner := newProvisionController(ctx, g)
	snapshotting := newSnapshotting(g, g.snapshotClient)

	g.factory.Start(ctx.Done())
	defer g.factory.Shutdown()
	for kind, ok := range g.factory.WaitForCacheSync(ctx.Done()) {
		if !ok {
			return fmt.Errorf("%v: %w", kind, context.Cause(ctx))
		}
	}
	go g.capacity.run(ctx)
	go resizer.run(ctx)
	go snapshotting.run(ctx)
	provisioner.Run(ctx)
	return nil
}

// open connects to the driver and asks where the node is.
func (g *group) open(ctx context.Context) (stop func(), err error) {
	// Upstream's connection would end the process with the driver.
	conn, err := grpc.NewClient("unix://"+g.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	g.controller = csi.NewControllerClient(conn)
	infoCtx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	info, err := csi.NewNodeClient(conn).NodeGetInfo(infoCtx, &csi.NodeGetInfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return nil, fmt.Errorf("CSI driver at %s: %w", g.Socket, err)
	}
	g.segments = info.GetAccessibleTopology().GetSegments()
	if g.client, err = kubernetes.NewForConfig(g.Client); err != nil {
		return nil, err
	}
	if g.snapshotClient, err = snapshotclient.NewForConfig(g.Client); err != nil {
		return nil, err
	}
	g.snapshots = g.snapshotClient.SnapshotV1()
	g.factory = informers.NewSharedInformerFactoryWithOptions(g.client, resyncPeriod, informers.WithTransform(withoutManagedFields))
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: g.client.CoreV1().Events("")})
	g.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: g.Driver, Host: g.NodeName})
	return func() {
		broadcaster.Shutdown()
		_ = conn.Close()
	}, nil
}

// withoutManagedFields keeps out of memory what nobody here reads.
func withoutManagedFields(o any) (any, error) {
	if m, err := meta.Accessor(o); err == nil {
		m.SetManagedFields(nil)
	}
	return o, nil
}

// mine tells whether this node reaches a volume.
func (g *group) mine(pv *corev1.PersistentVolume) bool {
	if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != g.Driver {
		return false
	}
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return true
	}
	for _, term := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
		if g.meets(term) {
			return true
		}
	}
	return false
}

// meets tells whether this node meets a term that topologies were turned into.
func (g *group) meets(term corev1.NodeSelectorTerm) bool {
	if len(term.MatchExpressions) == 0 || len(term.MatchFields) > 0 {
		return false
	}
	for _, e := range term.MatchExpressions {
		have, ok := g.segments[e.Key]
		if !ok || e.Operator != corev1.NodeSelectorOpIn || !slices.Contains(e.Values, have) {
			return false
		}
	}
	return true
}
