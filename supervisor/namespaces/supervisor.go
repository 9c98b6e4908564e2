package namespaces

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

const (
	// supervisorFinalizer keeps the Supervisor while namespaces need it to take
	// away what they have in vSphere.
	supervisorFinalizer = "atoll.dev/supervisor"
	// supervisorEvery is how often what the watch knows of clusters is looked
	// at; it makes no call to vCenter.
	supervisorEvery = time.Minute
	// countEvery is how often namespaces that come are counted.
	countEvery = time.Second
)

// A supervisorReconciler connects as the Supervisor says, and tells in its
// status what it found.
type supervisorReconciler struct {
	*reconciler
	all func(context.Context) error // has every namespace looked at

	told  *bool     // what namespaces were told last: connected; nil: nothing
	lost  time.Time // when that was found to be over; zero while it is not
	rates int64     // of the clusters, as they were told

	orphans map[string]time.Time // by UID, when they were first seen
}

// Reconcile is called by one goroutine.
func (r *supervisorReconciler) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	began := r.now()
	result, err := r.reconcile(ctx)
	outcome := "ok"
	switch {
	case apierrors.IsConflict(err):
		outcome, result, err = "conflict", reconcile.Result{RequeueAfter: staleRetry}, nil
	case err != nil && ctx.Err() != nil:
		outcome, err = "stopped", nil
	case err != nil:
		r.log.Error("Supervisor not reconciled", "error", err)
		outcome, result, err = "error", reconcile.Result{RequeueAfter: 5 * time.Second}, nil
	}
	r.metrics.reconciled("supervisor", outcome, r.now().Sub(began))
	return result, err
}

func (r *supervisorReconciler) reconcile(ctx context.Context) (reconcile.Result, error) {
	sup := &v1alpha1.Supervisor{}
	err := r.client.Get(ctx, client.ObjectKey{Name: v1alpha1.SupervisorName}, sup)
	if apierrors.IsNotFound(err) {
		if _, err := r.conn.client(); err == nil {
			r.log.Info("the Supervisor is gone: vCenter is left alone")
		}
		r.conn.drop(nil)
		r.told = nil
		return reconcile.Result{}, r.all(ctx)
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	used, err := r.namespacesUsing(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	if done, err := r.finalize(ctx, sup, used); done || err != nil {
		return reconcile.Result{}, err
	}
	connectErr := r.connect(sup)
	before := sup.DeepCopy()
	again := r.describe(sup, connectErr, used)
	if !equality.Semantic.DeepEqual(before.Status, sup.Status) {
		if err := r.client.Status().Patch(ctx, sup, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return reconcile.Result{}, fmt.Errorf("status of the Supervisor: %w", err)
		}
	}
	if err := r.tell(ctx, sup); err != nil {
		return reconcile.Result{}, err
	}
	orphans, err := r.collectOrphans(ctx, sup)
	return reconcile.Result{RequeueAfter: min(again, orphans)}, err
}

// namespacesUsing counts those that may have something in vSphere.
func (r *supervisorReconciler) namespacesUsing(ctx context.Context) (int, error) {
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return 0, err
	}
	n := 0
	for i := range list.Items {
		if controllerutil.ContainsFinalizer(&list.Items[i], v1alpha1.NamespaceFinalizer) {
			n++
		}
	}
	return n, nil
}

// finalize is done when the Supervisor may go.
func (r *supervisorReconciler) finalize(ctx context.Context, sup *v1alpha1.Supervisor, used int) (done bool, err error) {
	if sup.DeletionTimestamp.IsZero() {
		if controllerutil.AddFinalizer(sup, supervisorFinalizer) {
			return false, r.client.Update(ctx, sup) // no event follows: the generation stays
		}
		return false, nil
	}
	if used > 0 {
		return false, nil
	}
	if controllerutil.RemoveFinalizer(sup, supervisorFinalizer) {
		return true, client.IgnoreNotFound(r.client.Update(ctx, sup))
	}
	return true, nil
}

// connect makes the connection be the spec's.
func (r *supervisorReconciler) connect(sup *v1alpha1.Supervisor) error {
	o, key := connectOptions(sup)
	o.Credentials = credentials(r.live, sup.Spec.VCenter.CredentialsSecret)
	return r.conn.use(o, key)
}

// connectOptions are all but credentials; key changes with any of them.
func connectOptions(sup *v1alpha1.Supervisor) (vc.Options, string) {
	s := &sup.Spec
	o := vc.Options{
		Address: s.VCenter.Server, Thumbprint: s.VCenter.Thumbprint, CA: s.VCenter.CABundle,
		ParentPool: s.ParentPool, ParentFolder: s.Folder,
		PolicyInterval: time.Duration(s.PolicyPollSeconds) * time.Second,
	}
	for _, z := range s.Zones {
		o.Zones = append(o.Zones, vc.Zone{Name: z.Name, Cluster: z.Cluster})
	}
	b, err := json.Marshal([]any{s.VCenter, s.Zones, s.ParentPool, s.Folder, s.PolicyPollSeconds, sup.UID})
	if err != nil {
		panic(err) // plain data
	}
	return o, fmt.Sprintf("%x", sha256.Sum256(b))
}

// describe puts into the status what was found, and returns when to look again.
func (r *supervisorReconciler) describe(sup *v1alpha1.Supervisor, connectErr error, used int) time.Duration {
	st := &sup.Status
	st.ObservedGeneration, st.Namespaces = sup.Generation, int32(min(used, 1<<30))
	set := func(kind string, status metav1.ConditionStatus, reason, message string) {
		c := metav1.Condition{Type: kind, Status: status, Reason: reason, Message: clip(message, maxText), ObservedGeneration: sup.Generation}
		if meta.SetStatusCondition(&st.Conditions, c) && status == metav1.ConditionFalse {
			r.events.Eventf(sup, nil, corev1.EventTypeWarning, reason, "Connect", "%s", c.Message)
		}
	}
	fail := func(err error) time.Duration {
		set(v1alpha1.ConditionReady, metav1.ConditionFalse, vcenterReason(err), err.Error())
		return supervisorEvery
	}
	if connectErr != nil {
		set(v1alpha1.ConditionConnected, metav1.ConditionFalse, reasonOfOptions(connectErr), connectErr.Error())
		return fail(connectErr)
	}
	vcenter, err := r.conn.client()
	if err != nil {
		return fail(err)
	}
	h := vcenter.Health()
	r.metrics.health(h)
	if !h.Connected {
		if r.conn.settling(r.now()) && h.Err == nil {
			set(v1alpha1.ConditionConnected, metav1.ConditionUnknown, v1alpha1.ReasonProgressing, "connecting to vCenter "+h.Address)
			return time.Second
		}
		err := h.Err
		if err == nil {
			err = fmt.Errorf("vCenter %s has not answered yet", h.Address)
		}
		set(v1alpha1.ConditionConnected, metav1.ConditionFalse, vcenterReason(err), err.Error())
		fail(err)
		return settleTime
	}
	set(v1alpha1.ConditionConnected, metav1.ConditionTrue, "Connected", "vCenter "+h.Address+" answers")
	st.VCenter = &v1alpha1.VCenterStatus{Version: h.Version, InstanceUUID: h.InstanceID}
	zones, err := vcenter.Zones()
	if err != nil {
		return fail(err)
	}
	st.Zones = zoneStatus(zones)
	switch {
	case !sup.DeletionTimestamp.IsZero():
		set(v1alpha1.ConditionReady, metav1.ConditionFalse, v1alpha1.ReasonInUse, fmt.Sprintf("%s still in vSphere: delete the SupervisorNamespaces first", count(used, false, "namespace")))
	default:
		set(v1alpha1.ConditionReady, metav1.ConditionTrue, "Ready", "namespaces can be made")
	}
	return supervisorEvery
}

// reasonOfOptions is about a spec that cannot be, before any call.
func reasonOfOptions(err error) string {
	if r := vcenterReason(err); r != v1alpha1.ReasonUnknownCluster {
		return r
	}
	return v1alpha1.ReasonInvalidSpec
}

func zoneStatus(zones []vc.ZoneState) []v1alpha1.ZoneStatus {
	var out []v1alpha1.ZoneStatus
	for _, z := range zones {
		out = append(out, v1alpha1.ZoneStatus{
			Name: z.Name, Cluster: z.ID, Path: z.Path, ParentPool: z.ParentPool, Datacenter: z.Datacenter,
			MHzPerCore: z.MHzPerCore, Hosts: int32(min(z.Hosts, 1<<30)),
			CPU: resource.NewQuantity(int64(z.Cores), resource.DecimalSI), Memory: toBytes(z.Memory),
		})
	}
	return out
}

// tell has all namespaces looked at when vCenter came back and one found it away
// meanwhile, when it has been away for longer than a moment, and when a core is worth something else.
func (r *supervisorReconciler) tell(ctx context.Context, sup *v1alpha1.Supervisor) error {
	connected := r.conn.connected()
	var rates int64
	for i, z := range sup.Status.Zones {
		rates += z.MHzPerCore * int64(i+1)
	}
	if connected {
		r.lost = time.Time{}
	} else if r.lost.IsZero() {
		r.lost = r.now()
	}
	awaited := connected && r.conn.takeAwaited()
	if r.told != nil && *r.told == connected && rates == r.rates && !awaited {
		return nil
	}
	if !connected && (r.conn.settling(r.now()) || r.now().Sub(r.lost) < settleTime) {
		return nil
	}
	r.told, r.rates = &connected, rates
	return r.all(ctx)
}
