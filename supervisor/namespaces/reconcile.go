package namespaces

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

const (
	// Retries of what failed: doubled each time, with up to a quarter of jitter.
	firstRetry = 500 * time.Millisecond
	lastRetry  = 2 * time.Minute
	// staleRetry is for a cache that has not seen our own last write.
	staleRetry = 25 * time.Millisecond
	// usageEvery bounds how often status is written for use alone.
	usageEvery = 5 * time.Second
)

// A reconciler keeps SupervisorNamespaces in step.
type reconciler struct {
	client  client.Client // reads from the cache
	live    client.Reader
	conn    *connection
	events  events.EventRecorder
	metrics *metrics
	log     *slog.Logger
	now     func() time.Time

	orphanGrace time.Duration

	mu       sync.Mutex
	failures map[string]int      // in a row
	written  map[string]uint64   // resource version of our own last write
	told     map[string][]string // what somebody changed, and is not mended yet
}

// A problem is why a namespace is not in step.
type problem struct {
	reason, text string
	// unknown: nothing is known, in place of something being wrong.
	unknown bool
	// waits for an event, not for time.
	waits bool
}

// A pass is one reconcile.
type pass struct {
	*reconciler
	ns       *v1alpha1.SupervisorNamespace // as read; status is what will be
	before   *v1alpha1.SupervisorNamespace
	sup      *v1alpha1.Supervisor
	problems []problem
	notes    []v1alpha1.Message // what happened, for people
	found    []string           // of others' changes, as they were told
	posts    []string           // for the events of the pools
	retry    bool
	usable   bool // the namespace is there on both sides
}

func (p *pass) fail(reason, format string, args ...any) {
	p.problems = append(p.problems, problem{reason: reason, text: fmt.Sprintf(format, args...)})
	p.retry = true
}

// wait is a problem whose end comes as an event.
func (p *pass) wait(reason, format string, args ...any) {
	p.problems = append(p.problems, problem{reason: reason, text: fmt.Sprintf(format, args...), waits: true})
}

// Reconcile brings one namespace into step, or says in its status why not.
func (r *reconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	began := r.now()
	name := req.Name
	ns := &v1alpha1.SupervisorNamespace{}
	if err := r.client.Get(ctx, req.NamespacedName, ns); err != nil {
		if apierrors.IsNotFound(err) {
			r.forget(name)
			return reconcile.Result{}, nil
		}
		return reconcile.Result{}, err
	}
	if r.stale(ns) {
		return reconcile.Result{RequeueAfter: staleRetry}, nil
	}
	p := &pass{reconciler: r, ns: ns.DeepCopy(), before: ns}
	var result reconcile.Result
	var err error
	if ns.DeletionTimestamp.IsZero() {
		result, err = p.sync(ctx)
	} else {
		result, err = p.delete(ctx)
	}
	p.keepTold(err == nil)
	p.post(ctx)
	outcome := "ok"
	switch {
	case apierrors.IsConflict(err):
		outcome, result, err = "conflict", reconcile.Result{RequeueAfter: staleRetry}, nil
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		outcome, err = "stopped", nil
	case err != nil:
		// The API server's, mostly: what status could not say.
		r.log.Error("namespace not reconciled", "namespace", name, "error", err)
		outcome, result, err = "error", reconcile.Result{RequeueAfter: r.backoff(name)}, nil
	case len(p.problems) > 0:
		outcome = "not-synced"
	}
	r.metrics.reconciled("namespace", outcome, r.now().Sub(began))
	return result, err
}

// sync is for namespaces that are to be.
func (p *pass) sync(ctx context.Context) (reconcile.Result, error) {
	p.sup = &v1alpha1.Supervisor{}
	err := p.client.Get(ctx, client.ObjectKey{Name: v1alpha1.SupervisorName}, p.sup)
	if apierrors.IsNotFound(err) {
		p.wait(v1alpha1.ReasonNoSupervisor, "there is no Supervisor %s, which says where vCenter is: make one", v1alpha1.SupervisorName)
		return p.finish(ctx)
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	if p.conn.awaitSettled(p.now()) {
		// After a start: every namespace would be written twice.
		return reconcile.Result{}, nil
	}
	found, err := p.namespace(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	if done, err := p.foreign(ctx, found); done || err != nil {
		if err != nil {
			return reconcile.Result{}, err
		}
		return p.finish(ctx)
	}
	if err := p.readUsage(ctx); err != nil {
		return reconcile.Result{}, err
	}
	if controllerutil.AddFinalizer(p.ns, v1alpha1.NamespaceFinalizer) {
		if err := p.update(ctx); err != nil {
			return reconcile.Result{}, err
		}
	}
	classes, err := p.references(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	changed, err := p.syncVSphere(ctx)
	if changed || err != nil {
		return reconcile.Result{}, err // a changed spec comes back as an event
	}
	changed, err = p.syncKubernetes(ctx, found, classes)
	if changed || err != nil {
		return reconcile.Result{}, err
	}
	return p.finish(ctx)
}

// namespace is the Kubernetes Namespace, nil if there is none.
func (p *pass) namespace(ctx context.Context) (*corev1.Namespace, error) {
	n := &corev1.Namespace{}
	err := p.client.Get(ctx, client.ObjectKey{Name: p.ns.Name}, n)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return n, nil
}

// ours tells whether the Namespace was made for the SupervisorNamespace, or
// handed over to it by its label.
func ours(n *corev1.Namespace) bool { return n.Labels[v1alpha1.LabelNamespace] == n.Name }

// foreign is done with a Namespace that we may not touch.
func (p *pass) foreign(ctx context.Context, n *corev1.Namespace) (done bool, err error) {
	switch {
	case n == nil:
		return false, nil
	case !ours(n):
		p.wait(v1alpha1.ReasonNamespaceNotOurs, "Kubernetes has a namespace %[1]s already: hand it over by `kubectl label namespace %[1]s %[2]s=%[1]s`, or choose another name", n.Name, v1alpha1.LabelNamespace)
		return true, nil
	case n.DeletionTimestamp.IsZero():
		return false, nil
	case p.ns.Labels[v1alpha1.LabelTemplate] != "":
		// Its owner deleted what its owner made.
		p.event(corev1.EventTypeNormal, "NamespaceDeleted", "Delete", "the owner deleted namespace %s: its pool and folder go too", n.Name)
		return true, client.IgnoreNotFound(p.client.Delete(ctx, p.ns, client.Preconditions{UID: &p.ns.UID}))
	}
	p.wait(v1alpha1.ReasonNamespaceDeleted, "somebody deleted the Kubernetes namespace %[1]s: it is made again when it is gone; to delete it for good, `kubectl delete supervisornamespace %[1]s`", n.Name)
	return true, nil
}

// references checks what the spec names, and returns the VM classes.
func (p *pass) references(ctx context.Context) ([]v1alpha1.VirtualMachineClass, error) {
	var classes []v1alpha1.VirtualMachineClass
	for _, name := range p.ns.Spec.VMClasses {
		c := v1alpha1.VirtualMachineClass{}
		err := p.client.Get(ctx, client.ObjectKey{Name: name}, &c)
		switch {
		case apierrors.IsNotFound(err):
			p.wait(v1alpha1.ReasonUnknownClass, "there is no VirtualMachineClass %s: make it, or take it off spec.vmClasses", name)
		case err != nil:
			return nil, err
		default:
			classes = append(classes, c)
		}
	}
	for _, limit := range p.ns.Spec.StoragePolicies {
		s := &v1alpha1.StoragePolicy{}
		err := p.client.Get(ctx, client.ObjectKey{Name: limit.Name}, s)
		switch {
		case apierrors.IsNotFound(err):
			p.wait(v1alpha1.ReasonUnknownPolicy, "there is no StoragePolicy %s: choose one of `kubectl get storagepolicies`", limit.Name)
		case err != nil:
			return nil, err
		default:
			if c := notReady(s.Status.Conditions); c != nil {
				p.wait(c.Reason, "storage policy %s: %s", limit.Name, c.Message)
			}
		}
	}
	return classes, nil
}

// update writes the spec or the metadata, and notes that we did.
func (p *pass) update(ctx context.Context) error {
	status := p.ns.Status.DeepCopy()
	if err := p.client.Update(ctx, p.ns); err != nil {
		return err
	}
	p.wrote(p.ns)
	p.before = p.ns.DeepCopy()
	p.ns.Status = *status
	return nil
}

// wrote remembers our own last write, so that a cache that lags behind is not
// acted on.
func (r *reconciler) wrote(ns *v1alpha1.SupervisorNamespace) {
	v, err := strconv.ParseUint(ns.ResourceVersion, 10, 64)
	if err != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.written[ns.Name] = max(r.written[ns.Name], v)
}

func (r *reconciler) stale(ns *v1alpha1.SupervisorNamespace) bool {
	v, err := strconv.ParseUint(ns.ResourceVersion, 10, 64)
	r.mu.Lock()
	defer r.mu.Unlock()
	return err == nil && v < r.written[ns.Name]
}

// forget what is kept of a namespace that is gone.
func (r *reconciler) forget(name string) {
	r.conn.forget(name)
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.failures, name)
	delete(r.written, name)
	delete(r.told, name)
}

// backoff is when to try again after one more failure in a row.
func (r *reconciler) backoff(name string) time.Duration {
	r.mu.Lock()
	n := r.failures[name]
	r.failures[name]++
	r.mu.Unlock()
	return backoff(n)
}

func (r *reconciler) succeeded(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.failures, name)
}

// backoff after n failures before this one.
func backoff(n int) time.Duration {
	d := lastRetry
	if n < 16 {
		d = min(firstRetry<<n, lastRetry)
	}
	return d + rand.N(d/4)
}

// event is for Kubernetes alone.
func (p *pass) event(kind, reason, action, format string, args ...any) {
	p.events.Eventf(p.ns, nil, kind, reason, action, "%s", fmt.Sprintf(format, args...))
}

// ref names the namespace in vSphere.
func (p *pass) ref() vc.Ref { return vc.Ref{Name: p.ns.Name, UID: string(p.ns.UID)} }
