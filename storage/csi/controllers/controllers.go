// Package controllers does for a CSI driver what its sidecars do elsewhere, in
// the process that serves it: it provisions and deletes volumes (on upstream's
// sig-storage-lib-external-provisioner), takes and deletes snapshots (by upstream's
// sidecar controller), expands volumes, publishes how much room there is, and says
// which volumes are not kept as their policies say. A Scope says which volumes are
// an instance's: a node's, or vSphere's in the supervisor.
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
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned/typed/volumesnapshot/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	"github.com/openatoll/atoll/storage"
	atollcsi "github.com/openatoll/atoll/storage/csi"
)

// Config of a node's controllers.
type Config struct {
	// Client reaches the API server. Required.
	Client *rest.Config
	// Socket is the driver's. Required with NodeName.
	Socket string
	// NodeName is the node for whose datastores the controllers care; or there
	// are Scope and Controller.
	NodeName string
	// Namespace has the CSIStorageCapacity objects. Required with NodeName.
	Namespace string
	// Auditor judges the node's volumes; nil: nobody does.
	Auditor storage.Auditor
	// Changed has them judged soon, where somebody else has seen that there is
	// something new; nil: nobody tells.
	Changed <-chan struct{}
	// Scope is what the controllers care for, where that is no node's.
	Scope Scope
	// Controller is the driver that has it.
	Controller csi.ControllerClient
	// Component is the source of events and the logger's; default the driver's
	// name, and csi-controllers.
	Component string
	// Factory has the claims, volumes and classes; default one of Client.
	Factory informers.SharedInformerFactory
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
	scope          Scope
	// segments are the topology of the node.
	segments map[string]string
	// capacity and refusals are nil where no node is.
	capacity *capacityController
	refusals *refusals
}

// Run runs the controllers until ctx ends.
func Run(ctx context.Context, c Config) error {
	ofNode, ofScope := c.Socket != "" && c.NodeName != "" && c.Namespace != "", c.Scope != nil && c.Controller != nil
	if c.Client == nil || ofNode == ofScope {
		return fmt.Errorf("CSI controllers: Client is required, and either Socket, NodeName and Namespace or Scope and Controller: %w", errdefs.ErrInvalidArgument)
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if errScheme != nil {
		return fmt.Errorf("CSI controllers: %w", errScheme)
	}
	component := "csi-controllers"
	if c.Component != "" {
		component = c.Component
	} else {
		c.Component = atollcsi.Name
	}
	c.Logger = c.Logger.With("component", component)
	g := &group{Config: c, Driver: atollcsi.Name, scope: c.Scope, controller: c.Controller}
	stop, err := g.open(ctx)
	if err != nil {
		return err
	}
	defer stop()
	resizer := newResizer(g)
	var auditor *auditController
	if ofNode {
		g.capacity, g.refusals, auditor = newCapacityController(g), newRefusals(g), newAuditController(g)
	}
	provisioner := newProvisionController(ctx, g)

	g.factory.Start(ctx.Done())
	defer g.factory.Shutdown()
	for kind, ok := range g.factory.WaitForCacheSync(ctx.Done()) {
		if !ok {
			return fmt.Errorf("%v: %w", kind, context.Cause(ctx))
		}
	}
	if ofNode {
		go g.capacity.run(ctx)
		go auditor.run(ctx)
	}
	go resizer.run(ctx)
	// Its calls end before this does: whoever comes after it makes none beside them.
	var snapshots sync.WaitGroup
	defer snapshots.Wait()
	snapshots.Go(func() { g.takeSnapshots(ctx) })
	provisioner.Run(ctx)
	return nil
}

// connect connects to the driver and asks where the node is.
func (g *group) connect(ctx context.Context) (stop func(), err error) {
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
		_ = conn.Close()
		return nil, fmt.Errorf("CSI driver at %s: %w", g.Socket, err)
	}
	g.segments = info.GetAccessibleTopology().GetSegments()
	g.scope = nodeScope{g.NodeName, g.segments}
	return func() { _ = conn.Close() }, nil
}

// open makes what the controllers share.
func (g *group) open(ctx context.Context) (stop func(), err error) {
	disconnect := func() {}
	if g.controller == nil {
		if disconnect, err = g.connect(ctx); err != nil {
			return nil, err
		}
	}
	if g.client, err = kubernetes.NewForConfig(g.Client); err != nil {
		return nil, err
	}
	if g.snapshotClient, err = snapshotclient.NewForConfig(g.Client); err != nil {
		return nil, err
	}
	g.snapshots = g.snapshotClient.SnapshotV1()
	if g.factory = g.Factory; g.factory == nil {
		g.factory = NewFactory(g.client)
	}
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: g.client.CoreV1().Events("")})
	g.events = broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: g.Component, Host: g.NodeName})
	return func() {
		broadcaster.Shutdown()
		disconnect()
	}, nil
}

// NewFactory makes the informers that the controllers share with their owner.
func NewFactory(client kubernetes.Interface) informers.SharedInformerFactory {
	return informers.NewSharedInformerFactoryWithOptions(client, resyncPeriod, informers.WithTransform(withoutManagedFields))
}

// withoutManagedFields keeps out of memory what nobody here reads.
func withoutManagedFields(o any) (any, error) {
	if m, err := meta.Accessor(o); err == nil {
		m.SetManagedFields(nil)
	}
	return o, nil
}

// mine tells whether a volume is deleted and expanded here.
func (g *group) mine(pv *corev1.PersistentVolume) bool {
	return pv.Spec.CSI != nil && pv.Spec.CSI.Driver == g.Driver && g.scope.Volume(pv)
}

// works says whether another node is there and ready.
func (g *group) works(ctx context.Context, name string) (bool, error) {
	node, err := g.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return false, ignoreNotFound(err)
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue, nil
		}
	}
	return false, nil
}
