package namespaces

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/apiutil"
	"sigs.k8s.io/controller-runtime/pkg/config"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const (
	leaseName = "atoll-namespaces"
	// workers are namespaces that are reconciled at a time; vCenter gets 32
	// calls at a time at most (internal/vsphere).
	workers = 24
	// The lease: long, since a process that comes back holds its own still, and
	// one that is starved for a moment should not begin anew.
	leaseDuration, renewDeadline, retryPeriod = time.Minute, 45 * time.Second, 5 * time.Second
	// restartAfter a lost lease.
	restartAfter = 2 * time.Second
)

// Options of Run.
type Options struct {
	// Config reaches the API server, with the rights of the ClusterRole
	// atoll:namespaces.
	Config *rest.Config
	// Identity of this process among those that might lead: the same after a
	// restart, so that it need not wait for its own lease, and of no other
	// process that can run at the same time.
	Identity string
	// OrphanGrace is how long what a namespace left in vSphere is kept after it
	// is gone; 10 minutes if zero.
	OrphanGrace time.Duration
	// Logger; default slog.Default().
	Logger *slog.Logger
}

// A Controller keeps namespaces in step.
type Controller struct {
	options Options

	mu      sync.Mutex
	current *reconciler // nil while it does not lead
	failure error       // why the last attempt ended
}

// New returns a Controller that does nothing before Run. Options that lack
// something are ErrInvalidArgument.
func New(o Options) (*Controller, error) {
	if o.Config == nil || o.Identity == "" {
		return nil, fmt.Errorf("namespaces: Config and Identity are required: %w", errdefs.ErrInvalidArgument)
	}
	if o.OrphanGrace == 0 {
		o.OrphanGrace = defaultOrphanGrace
	}
	if o.Logger == nil {
		o.Logger = slog.Default()
	}
	o.Logger = o.Logger.With("component", "namespaces")
	return &Controller{options: o}, nil
}

// Run keeps namespaces in step until ctx ends, when it returns nil. Of several
// processes, the one that holds the lease kube-system/atoll-namespaces works. It
// waits for the CRDs, and begins anew when it lost the lease or could not start:
// no work is lost by that.
func (c *Controller) Run(ctx context.Context) error {
	for {
		err := c.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		c.options.Logger.Error("namespaces are not kept in step", "error", err, "again in", restartAfter)
		c.set(nil, err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(restartAfter):
		}
	}
}

func (c *Controller) run(ctx context.Context) error {
	if err := waitForCRDs(ctx, c.options.Config); err != nil {
		return err
	}
	mgr, err := newManager(c.options)
	if err != nil {
		return err
	}
	id, err := liveSupervisorID(ctx, mgr.GetAPIReader())
	if err != nil {
		return err
	}
	r := newReconciler(mgr, id, c.options)
	defer r.conn.drop(nil)
	if err := setup(mgr, r); err != nil {
		return err
	}
	go func() {
		select {
		case <-ctx.Done():
		case <-mgr.Elected():
			c.set(r, nil)
		}
	}()
	defer c.set(nil, nil)
	return mgr.Start(ctx)
}

func (c *Controller) set(r *reconciler, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.current, c.failure = r, err
}

// Health is what it does, for people, or why it does not.
func (c *Controller) Health(ctx context.Context) (string, error) {
	c.mu.Lock()
	r, err := c.current, c.failure
	c.mu.Unlock()
	switch {
	case err != nil:
		return "", err
	case r == nil:
		return "standing by: starting, or another process leads", nil
	}
	vcenter, err := r.conn.client()
	if err != nil {
		return "no Supervisor: namespaces are Kubernetes' alone", nil
	}
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return "", err
	}
	synced := 0
	for i := range list.Items {
		if meta.IsStatusConditionTrue(list.Items[i].Status.Conditions, v1alpha1.ConditionSynced) {
			synced++
		}
	}
	h := vcenter.Health()
	text := fmt.Sprintf("vCenter %s answers, %d of %s in step", h.Address, synced, count(len(list.Items), false, "namespace"))
	if !h.Connected {
		text = fmt.Sprintf("vCenter %s does not answer, %s", h.Address, count(len(list.Items), false, "namespace"))
	}
	return text, nil
}

// waitForCRDs returns when all kinds of the group can be listed.
func waitForCRDs(ctx context.Context, c *rest.Config) error {
	httpClient, err := rest.HTTPClientFor(c)
	if err != nil {
		return err
	}
	mapper, err := apiutil.NewDynamicRESTMapper(c, httpClient)
	if err != nil {
		return err
	}
	scheme, err := newScheme()
	if err != nil {
		return err
	}
	live, err := client.New(c, client.Options{Scheme: scheme, Mapper: mapper, HTTPClient: httpClient})
	if err != nil {
		return err
	}
	lists := []client.ObjectList{
		&v1alpha1.SupervisorList{}, &v1alpha1.SupervisorNamespaceList{}, &v1alpha1.StoragePolicyList{},
		&v1alpha1.VirtualMachineClassList{}, &v1alpha1.NamespaceTemplateList{},
	}
	for {
		var err error
		for _, l := range lists {
			if err = live.List(ctx, l, client.Limit(1)); err != nil {
				break
			}
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func newScheme() (*runtime.Scheme, error) {
	s := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(s); err != nil {
		return nil, err
	}
	return s, v1alpha1.AddToScheme(s)
}

func newManager(o Options) (ctrl.Manager, error) {
	scheme, err := newScheme()
	if err != nil {
		return nil, err
	}
	yes, duration, deadline, period := true, leaseDuration, renewDeadline, retryPeriod
	lock, err := resourcelock.NewFromKubeconfig(resourcelock.LeasesResourceLock, metav1.NamespaceSystem, leaseName,
		resourcelock.ResourceLockConfig{Identity: o.Identity}, o.Config, renewDeadline)
	if err != nil {
		return nil, err
	}
	return ctrl.NewManager(o.Config, ctrl.Options{
		Scheme: scheme,
		Logger: logr.FromSlogHandler(o.Logger.Handler()),
		Cache: cache.Options{
			DefaultTransform: cache.TransformStripManagedFields(),
			ByObject:         byObject(),
		},
		Client: client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}, &corev1.ConfigMap{}, &rbacv1.ClusterRoleBinding{}}}},
		// What the process serves already.
		Metrics:                             metricsserver.Options{BindAddress: "0"},
		HealthProbeBindAddress:              "0",
		LeaderElection:                      true,
		LeaderElectionID:                    leaseName,
		LeaderElectionResourceLockInterface: lock,
		LeaderElectionReleaseOnCancel:       true,
		LeaseDuration:                       &duration,
		RenewDeadline:                       &deadline,
		RetryPeriod:                         &period,
		Controller:                          config.Controller{SkipNameValidation: &yes},
	})
}

// byObject narrows the cache to what is used of it.
func byObject() map[client.Object]cache.ByObject {
	all := usageCaches()
	named := func(name string) fields.Selector { return fields.OneTermEqualSelector(metav1.ObjectNameField, name) }
	all[&corev1.ConfigMap{}] = cache.ByObject{Namespaces: map[string]cache.Config{metav1.NamespaceSystem: {FieldSelector: named(selfServiceConfig)}}}
	all[&rbacv1.ClusterRoleBinding{}] = cache.ByObject{Field: named(selfServiceRole)}
	return all
}

func newReconciler(mgr ctrl.Manager, id string, o Options) *reconciler {
	m, log := theMetrics(), o.Logger
	conn := &connection{
		live: mgr.GetAPIReader(), metrics: m, log: log, id: id,
		namespaces: &feed{}, supervisors: &feed{}, policies: &feed{}, usage: map[string]time.Time{},
	}
	return &reconciler{
		client: mgr.GetClient(), live: mgr.GetAPIReader(), conn: conn, events: mgr.GetEventRecorder("atoll-namespaces"),
		metrics: m, log: log, now: time.Now, orphanGrace: o.OrphanGrace, failures: map[string]int{}, written: map[string]uint64{}, told: map[string][]string{},
	}
}

// all has every namespace looked at.
func (r *reconciler) all(ctx context.Context) error {
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return err
	}
	for i := range list.Items {
		r.conn.namespaces.add(list.Items[i].Name)
	}
	return nil
}
