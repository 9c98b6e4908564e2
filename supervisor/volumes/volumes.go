// Package volumes is the controller service of volumes in vSphere: it runs in
// the supervisor and makes, expands and deletes the disks of claims whose
// StorageClass names a storage policy of the Supervisor's vCenter, and takes and
// deletes the snapshots of these disks. What it makes
// in vSphere follows the claim (name, namespace, labels); what vSphere says
// (whether the policy is kept) it writes onto the claim. What interrupted calls
// left behind it finds, tells of, and takes away where it is provably nobody's.
//
// It keeps nothing of its own: vCenter has the volumes, the API server who has
// them.
package volumes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/containerd/errdefs"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/vsphere"
	"github.com/openatoll/atoll/storage"
)

const (
	// restartAfter a start that failed, as before the CRDs are there.
	restartAfter = time.Second
	// defaultOrphanEvery is how often vCenter is asked for what nobody has, and
	// defaultOrphanGrace how long that must have been so before any of it goes.
	defaultOrphanEvery, defaultOrphanGrace = 10 * time.Minute, 10 * time.Minute
	// component is the source of events.
	component = "atoll-volumes"
)

// A Store is the volumes of one vCenter: storage/vmdk's Disks.
type Store interface {
	storage.Disks
	// Run watches vCenter until ctx ends.
	Run(ctx context.Context) error
	// VCenter is the instance UUID of the vCenter that answers.
	VCenter(ctx context.Context) (string, error)
	// Relabel makes a volume's labels those given.
	Relabel(ctx context.Context, id string, labels map[string]string) error
	// Audit says of all volumes whether they are kept as their policies say.
	Audit(ctx context.Context) (map[string]storage.Compliance, error)
	// Inventory are all volumes, with what they take and who has them.
	Inventory(ctx context.Context) ([]storage.Item, error)
	// Orphans are what nobody has; claimed is asked of each.
	Orphans(ctx context.Context, claimed func(id, name string) bool) ([]storage.Orphan, error)
	// Discard deletes one that is Disposable, if it still is.
	Discard(ctx context.Context, o storage.Orphan) error
}

// Options of New.
type Options struct {
	// Config reaches the API server, with the rights of the ClusterRole
	// atoll:volumes. Required.
	Config *rest.Config
	// Open makes the Store of a vCenter without a call to it; cluster is the id
	// that marks volumes as this cluster's, policyName what a storage policy is
	// called in Kubernetes. Required.
	Open func(vcenter vsphere.Config, cluster string, policyName func(id, name string) string) (Store, error)
	// OrphanEvery and OrphanGrace; 10 minutes each if zero.
	OrphanEvery, OrphanGrace time.Duration
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// A Controller serves the volumes of the Supervisor's vCenter.
type Controller struct {
	options Options
	log     *slog.Logger
}

// New returns a Controller that does nothing before Run.
func New(o Options) (*Controller, error) {
	if o.Config == nil || o.Open == nil {
		return nil, fmt.Errorf("volumes: Config and Open are required: %w", errdefs.ErrInvalidArgument)
	}
	if o.OrphanEvery == 0 {
		o.OrphanEvery = defaultOrphanEvery
	}
	if o.OrphanGrace == 0 {
		o.OrphanGrace = defaultOrphanGrace
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	registerMetrics()
	return &Controller{options: o, log: o.Logger.With("component", "volumes")}, nil
}

// Run serves until ctx ends, when it returns nil. It waits for the CRDs, and
// begins anew after a failure: nothing is lost by that.
func (c *Controller) Run(ctx context.Context) error {
	for {
		err := c.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		level := slog.LevelWarn
		if meta.IsNoMatchError(err) || apierrors.IsNotFound(err) { // the CRDs are on their way
			level = slog.LevelInfo
		}
		c.log.Log(ctx, level, "volumes of vCenter are not served; trying again", "err", err, "again in", restartAfter)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(restartAfter):
		}
	}
}

// A base is what outlives a connection.
type base struct {
	*Controller
	client  kubernetes.Interface
	kinds   snapshotclient.Interface
	objects client.Reader // Supervisors and StoragePolicies, from a cache
	events  record.EventRecorder
	cluster string
	// changed has the Supervisor looked at.
	changed chan struct{}
	// failed has a connection made anew.
	failed chan struct{}
	// policies is told when a StoragePolicy changed.
	policies signal
}

func (c *Controller) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	scheme, err := newScheme()
	if err != nil {
		return err
	}
	b, err := c.open(ctx, scheme)
	if err != nil {
		return err
	}
	broadcaster := record.NewBroadcaster()
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: b.client.CoreV1().Events("")})
	b.events = broadcaster.NewRecorder(scheme, corev1.EventSource{Component: component})
	return b.follow(ctx)
}

func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	return s, errors.Join(clientgoscheme.AddToScheme(s), v1alpha1.AddToScheme(s), snapshotv1.AddToScheme(s))
}

// open reads what there is.
func (c *Controller) open(ctx context.Context, scheme *runtime.Scheme) (_ *base, err error) {
	b := &base{Controller: c, changed: make(chan struct{}, 1), failed: make(chan struct{}, 1), policies: newSignal()}
	if b.client, err = kubernetes.NewForConfig(c.options.Config); err != nil {
		return nil, err
	}
	if b.kinds, err = snapshotclient.NewForConfig(c.options.Config); err != nil {
		return nil, err
	}
	objects, err := cache.New(c.options.Config, cache.Options{Scheme: scheme, DefaultTransform: cache.TransformStripManagedFields()})
	if err != nil {
		return nil, err
	}
	b.objects = objects
	for kind, tell := range map[client.Object]func(){
		&v1alpha1.Supervisor{}:    func() { poke(b.changed) },
		&v1alpha1.StoragePolicy{}: b.policies.tell,
	} {
		informer, err := objects.GetInformer(ctx, kind, cache.BlockUntilSynced(false))
		if err != nil {
			return nil, err
		}
		if _, err := informer.AddEventHandler(toolscache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { tell() }, UpdateFunc: func(any, any) { tell() }, DeleteFunc: func(any) { tell() },
		}); err != nil {
			return nil, err
		}
	}
	go func() { _ = objects.Start(ctx) }() // it fails once ctx is done
	if !objects.WaitForCacheSync(ctx) {
		return nil, fmt.Errorf("Supervisors and StoragePolicies: %w", errdefs.ErrUnavailable) //nolint:staticcheck // kinds' names
	}
	system, err := b.client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("the cluster's id, the UID of namespace %s: %w", metav1.NamespaceSystem, err)
	}
	b.cluster = string(system.UID)
	return b, nil
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// follow has one connection at a time: to the vCenter that the Supervisor names
// now. Without a Supervisor there is none, and claims wait.
func (b *base) follow(ctx context.Context) error {
	key, stop := "", func() {}
	defer func() { stop() }()
	for {
		sup := &v1alpha1.Supervisor{}
		err := b.objects.Get(ctx, client.ObjectKey{Name: v1alpha1.SupervisorName}, sup)
		switch now := keyOf(sup); {
		case apierrors.IsNotFound(err):
			stop()
			key, stop = "", func() {}
		case err != nil:
			return err
		case now != key:
			stop()
			key, stop = now, func() {}
			connection, err := b.connect(sup)
			if err != nil {
				// The Supervisor's own conditions say so, too.
				b.log.Warn("volumes of vCenter are not served", "vcenter", sup.Spec.VCenter.Server, "err", err)
				break
			}
			stop = connection.start(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.changed:
		case <-b.failed:
			stop()
			key, stop = "", func() {}
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(restartAfter):
			}
		}
	}
}

// keyOf changes with whatever a connection is made from.
func keyOf(sup *v1alpha1.Supervisor) string {
	b, err := json.Marshal([]any{sup.Spec.VCenter, sup.Spec.PolicyPollSeconds, sup.UID})
	if err != nil {
		panic(err) // plain data
	}
	return string(b)
}

// secret reads a Secret from the API server: it is in no cache.
func (b *base) secret(ctx context.Context, namespace, name string) (map[string][]byte, error) {
	s, err := b.client.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return s.Data, nil
}

// policy is the StoragePolicy of vSphere's id; nil: there is none.
func (b *base) policy(ctx context.Context, id string) (*v1alpha1.StoragePolicy, error) {
	list := &v1alpha1.StoragePolicyList{}
	if err := b.objects.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	var found *v1alpha1.StoragePolicy
	for i := range list.Items {
		if o := &list.Items[i]; o.Spec.ID == id && (found == nil || o.Name < found.Name) {
			found = o
		}
	}
	return found, nil
}

// policyName is what vmdk writes onto volumes; empty: it makes one up.
func (b *base) policyName(id, _ string) string {
	if p, err := b.policy(context.Background(), id); err == nil && p != nil {
		return p.Name
	}
	return ""
}
