package namespaces

import (
	"context"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// delete ends the namespace: pods first, with the Kubernetes Namespace, then
// pools and folder, and the finalizer when vCenter has confirmed that they are
// gone.
func (p *pass) delete(ctx context.Context) (reconcile.Result, error) {
	if !controllerutil.ContainsFinalizer(p.ns, v1alpha1.NamespaceFinalizer) {
		return reconcile.Result{}, nil
	}
	gone, err := p.deleteNamespace(ctx)
	if err != nil {
		return reconcile.Result{}, err
	}
	if gone {
		gone = p.deletePools(ctx)
	}
	if gone {
		controllerutil.RemoveFinalizer(p.ns, v1alpha1.NamespaceFinalizer)
		if err := p.client.Update(ctx, p.ns); client.IgnoreNotFound(err) != nil {
			return reconcile.Result{}, err
		}
		p.forget(p.ns.Name)
		return reconcile.Result{}, nil
	}
	p.ns.Status.ObservedGeneration = p.ns.Generation
	p.conclude()
	if err := p.writeStatus(ctx); err != nil {
		return reconcile.Result{}, err
	}
	if p.retry {
		return reconcile.Result{RequeueAfter: p.backoff(p.ns.Name)}, nil
	}
	return reconcile.Result{}, nil
}

// deleteNamespace is true when Kubernetes says that ours is gone. It asks the
// API server, not the cache.
func (p *pass) deleteNamespace(ctx context.Context) (bool, error) {
	n := &corev1.Namespace{}
	err := p.live.Get(ctx, client.ObjectKey{Name: p.ns.Name}, n)
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if !ours(n) {
		return true, nil // it never was
	}
	if n.DeletionTimestamp.IsZero() {
		if err := p.client.Delete(ctx, n, client.Preconditions{UID: &n.UID}); client.IgnoreNotFound(err) != nil {
			return false, err
		}
		p.event(corev1.EventTypeNormal, v1alpha1.ReasonDraining, "Delete", "pods of namespace %s are being ended", n.Name)
	}
	pods := &metav1.PartialObjectMetadataList{}
	pods.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("PodList"))
	if err := p.live.List(ctx, pods, client.InNamespace(n.Name), client.Limit(100)); err != nil {
		return false, err
	}
	if len(pods.Items) == 0 {
		p.wait(v1alpha1.ReasonDeleting, "waits for Kubernetes to delete what is in the namespace")
		return false, nil
	}
	p.fail(v1alpha1.ReasonDraining, "waits for %s to end, %s among them; one on a node that does not answer ends when the node is back or `kubectl delete pod --force` says so",
		count(len(pods.Items), pods.Continue != "", "pod"), pods.Items[0].Name)
	return false, nil
}

// deletePools is true when vCenter says that pools and folder are gone.
func (p *pass) deletePools(ctx context.Context) bool {
	err := p.conn.missing(ctx)
	if apierrors.IsNotFound(err) {
		if st := &p.ns.Status; len(st.Pools) == 0 && st.Folder == nil && st.LastSynced == nil {
			return true // made while there was no Supervisor: one stays for as long as namespaces may need it
		}
		p.wait(v1alpha1.ReasonNoSupervisor, "pools and folder may be in vSphere, and there is no Supervisor %s to reach it: make it again", v1alpha1.SupervisorName)
		return false
	}
	vcenter, err := p.conn.client()
	if err != nil {
		p.vcenterProblem(err)
		return false
	}
	switch err := vcenter.Delete(ctx, p.ref()); {
	case err == nil:
		return true
	case errdefs.IsUnavailable(err):
		p.vcenterProblem(err)
	case errdefs.IsFailedPrecondition(err):
		p.fail(v1alpha1.ReasonDraining, "%v", err)
	default:
		p.fail(ensureReason(err), "%v", err)
	}
	return false
}
