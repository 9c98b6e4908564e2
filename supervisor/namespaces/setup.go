package namespaces

import (
	"context"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/runtimeclass"
)

// madeAfter is how long after it was made an object of a namespace's is looked at.
const madeAfter = time.Second

// setup says which change has what looked at.
func setup(mgr ctrl.Manager, r *reconciler) error {
	for _, f := range []func(ctrl.Manager, *reconciler) error{setupNamespaces, setupSupervisor, setupPolicies, setupTemplates, setupSelfService} {
		if err := f(mgr, r); err != nil {
			return err
		}
	}
	return nil
}

func setupNamespaces(mgr ctrl.Manager, r *reconciler) error {
	byNamespace := made(func(o client.Object) []reconcile.Request {
		if name := o.GetLabels()[v1alpha1.LabelNamespace]; name != "" {
			return request(name)
		}
		// One that lost its label, in the namespace that it is named after.
		if q := o.GetName(); q == quotaName(o.GetNamespace()) || q == storageQuotaName(o.GetNamespace()) {
			return request(o.GetNamespace())
		}
		return nil
	})
	inNamespace := handler.EnqueueRequestsFromMapFunc(func(_ context.Context, o client.Object) []reconcile.Request {
		return request(o.GetNamespace())
	})
	all := handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, _ client.Object) []reconcile.Request {
		return r.named(ctx, func(*v1alpha1.SupervisorNamespaceSpec) bool { return true })
	})
	mapped := func(pick func(string) func(*v1alpha1.SupervisorNamespaceSpec) bool) handler.EventHandler {
		return handler.EnqueueRequestsFromMapFunc(func(ctx context.Context, o client.Object) []reconcile.Request {
			return r.named(ctx, pick(o.GetName()))
		})
	}
	return ctrl.NewControllerManagedBy(mgr).Named("namespace").
		WithOptions(controller.Options{MaxConcurrentReconciles: workers}).
		For(&v1alpha1.SupervisorNamespace{}, builder.WithPredicates(ignoreOwnStatus())).
		WatchesRawSource(r.conn.namespaces.source()).
		Watches(&corev1.Namespace{}, made(func(o client.Object) []reconcile.Request { return request(o.GetName()) })).
		Watches(&corev1.Pod{}, inNamespace, builder.WithPredicates(useChanged())).
		Watches(&corev1.PersistentVolumeClaim{}, inNamespace, builder.WithPredicates(useChanged())).
		Watches(&corev1.ResourceQuota{}, byNamespace, builder.WithPredicates(quotaChanged())).
		Watches(&corev1.LimitRange{}, byNamespace).
		Watches(&rbacv1.RoleBinding{}, byNamespace).
		Watches(&nodev1.RuntimeClass{}, all, builder.WithPredicates(deleted(runtimeclass.Name))).
		Watches(&v1alpha1.Supervisor{}, all, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.StoragePolicy{}, mapped(usesPolicy), builder.WithPredicates(readyChanged())).
		Watches(&v1alpha1.VirtualMachineClass{}, mapped(usesClass)).
		Complete(r)
}

func setupSupervisor(mgr ctrl.Manager, r *reconciler) error {
	return ctrl.NewControllerManagedBy(mgr).Named("supervisor").
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		For(&v1alpha1.Supervisor{}, builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		WatchesRawSource(r.conn.supervisors.source()).
		Watches(&v1alpha1.SupervisorNamespace{}, soon(), builder.WithPredicates(madeOrGone())).
		Complete(&supervisorReconciler{reconciler: r, all: r.all})
}

func setupPolicies(mgr ctrl.Manager, r *reconciler) error {
	return ctrl.NewControllerManagedBy(mgr).Named("storagepolicy").
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		WatchesRawSource(r.conn.policies.source()).
		Watches(&v1alpha1.Supervisor{}, one(), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.StoragePolicy{}, one(), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&storagev1.StorageClass{}, one()).
		Watches(&v1alpha1.SupervisorNamespace{}, one(), builder.WithPredicates(policiesChanged())).
		Complete(&policyReconciler{r})
}

func setupTemplates(mgr ctrl.Manager, r *reconciler) error {
	return ctrl.NewControllerManagedBy(mgr).Named("namespacetemplate").
		WithOptions(controller.Options{MaxConcurrentReconciles: 1}).
		Watches(&v1alpha1.NamespaceTemplate{}, one(), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.Supervisor{}, one(), builder.WithPredicates(predicate.GenerationChangedPredicate{})).
		Watches(&v1alpha1.StoragePolicy{}, one(), builder.WithPredicates(madeOrGone())).
		Watches(&v1alpha1.VirtualMachineClass{}, one(), builder.WithPredicates(madeOrGone())).
		Watches(&v1alpha1.SupervisorNamespace{}, one(), builder.WithPredicates(madeOrGone(), fromATemplate())).
		// What admission reads, and the right that it narrows: the cache has these
		// two alone.
		Watches(&corev1.ConfigMap{}, one()).
		Watches(&rbacv1.ClusterRoleBinding{}, one()).
		Complete(&templateReconciler{r})
}

func setupSelfService(mgr ctrl.Manager, r *reconciler) error {
	return ctrl.NewControllerManagedBy(mgr).Named("selfservice").
		For(&corev1.Namespace{}, builder.WithPredicates(predicate.NewPredicateFuncs(func(o client.Object) bool {
			n, ok := o.(*corev1.Namespace)
			return ok && wanted(n)
		}))).
		Complete(&selfServiceReconciler{r})
}

func request(name string) []reconcile.Request {
	return []reconcile.Request{{NamespacedName: client.ObjectKey{Name: name}}}
}

// one request stands for all objects of a kind.
func one() handler.EventHandler {
	return handler.EnqueueRequestsFromMapFunc(func(context.Context, client.Object) []reconcile.Request {
		return request(v1alpha1.SupervisorName)
	})
}

// soon is one for namespaces, which come in hundreds: those of a second are counted
// at once. One that goes is counted when it does: the Supervisor may wait for it.
func soon() handler.EventHandler {
	all := request(v1alpha1.SupervisorName)[0]
	return handler.Funcs{
		CreateFunc: func(_ context.Context, _ event.CreateEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			q.AddAfter(all, countEvery)
		},
		DeleteFunc: func(_ context.Context, _ event.DeleteEvent, q workqueue.TypedRateLimitingInterface[reconcile.Request]) {
			q.Add(all)
		},
	}
}

// made is for what a namespace gets. One that is new is mostly our own doing, and six
// of them come with each namespace while the pass that makes them is under way: they
// are looked at once, a moment later. Those that were there at the start are looked at
// with their SupervisorNamespace.
func made(of func(client.Object) []reconcile.Request) handler.EventHandler {
	type queue = workqueue.TypedRateLimitingInterface[reconcile.Request]
	now := func(o client.Object, q queue) {
		for _, r := range of(o) {
			q.Add(r)
		}
	}
	return handler.Funcs{
		CreateFunc: func(_ context.Context, e event.CreateEvent, q queue) {
			if e.IsInInitialList {
				return
			}
			for _, r := range of(e.Object) {
				q.AddAfter(r, madeAfter)
			}
		},
		UpdateFunc: func(_ context.Context, e event.UpdateEvent, q queue) {
			now(e.ObjectOld, q) // the label may be gone
			now(e.ObjectNew, q)
		},
		DeleteFunc: func(_ context.Context, e event.DeleteEvent, q queue) { now(e.Object, q) },
	}
}

// ignoreOwnStatus: a status that changed is our own doing.
func ignoreOwnStatus() predicate.Predicate {
	return predicate.Or(predicate.GenerationChangedPredicate{}, predicate.LabelChangedPredicate{}, predicate.AnnotationChangedPredicate{})
}

func madeOrGone() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(event.UpdateEvent) bool { return false }}
}

func deleted(name string) predicate.Predicate {
	return predicate.Funcs{
		CreateFunc: func(event.CreateEvent) bool { return false }, UpdateFunc: func(event.UpdateEvent) bool { return false },
		DeleteFunc: func(e event.DeleteEvent) bool { return e.Object.GetName() == name },
	}
}

// quotaChanged: a quota's own counting changes nothing here.
func quotaChanged() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, ok := e.ObjectOld.(*corev1.ResourceQuota)
		after, ok2 := e.ObjectNew.(*corev1.ResourceQuota)
		return ok && ok2 && (!equality.Semantic.DeepEqual(before.Spec, after.Spec) || !maps.Equal(before.Labels, after.Labels) || !maps.Equal(before.Annotations, after.Annotations))
	}}
}

func fromATemplate() predicate.Predicate {
	return predicate.NewPredicateFuncs(func(o client.Object) bool { return o.GetLabels()[v1alpha1.LabelTemplate] != "" })
}

// readyChanged: what else a StoragePolicy's status says, namespaces do not heed.
func readyChanged() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		before, ok := e.ObjectOld.(*v1alpha1.StoragePolicy)
		after, ok2 := e.ObjectNew.(*v1alpha1.StoragePolicy)
		return ok && ok2 && !equality.Semantic.DeepEqual(notReady(before.Status.Conditions), notReady(after.Status.Conditions))
	}}
}

// policiesChanged: a policy that is gone from vCenter stays while it is named.
func policiesChanged() predicate.Predicate {
	return predicate.Funcs{
		CreateFunc: func(event.CreateEvent) bool { return false },
		UpdateFunc: func(e event.UpdateEvent) bool {
			before, ok := e.ObjectOld.(*v1alpha1.SupervisorNamespace)
			after, ok2 := e.ObjectNew.(*v1alpha1.SupervisorNamespace)
			return ok && ok2 && !equality.Semantic.DeepEqual(before.Spec.StoragePolicies, after.Spec.StoragePolicies)
		},
	}
}

// named are the namespaces for which pick is true.
func (r *reconciler) named(ctx context.Context, pick func(*v1alpha1.SupervisorNamespaceSpec) bool) []reconcile.Request {
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		r.log.Error("namespaces not listed", "error", err)
		return nil
	}
	var out []reconcile.Request
	for i := range list.Items {
		if pick(&list.Items[i].Spec) {
			out = append(out, reconcile.Request{NamespacedName: client.ObjectKey{Name: list.Items[i].Name}})
		}
	}
	return out
}

func usesPolicy(name string) func(*v1alpha1.SupervisorNamespaceSpec) bool {
	return func(s *v1alpha1.SupervisorNamespaceSpec) bool {
		return slices.ContainsFunc(s.StoragePolicies, func(l v1alpha1.StoragePolicyLimit) bool { return l.Name == name })
	}
}

func usesClass(name string) func(*v1alpha1.SupervisorNamespaceSpec) bool {
	return func(s *v1alpha1.SupervisorNamespaceSpec) bool { return slices.Contains(s.VMClasses, name) }
}
