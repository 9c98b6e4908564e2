package namespaces

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/sso"
)

// A selfServiceReconciler makes a SupervisorNamespace for a Namespace that a
// template's user made. Admission has put the template and the user on it.
type selfServiceReconciler struct{ *reconciler }

// wanted tells whether a Namespace asks for a SupervisorNamespace.
func wanted(n *corev1.Namespace) bool {
	return n.Labels[v1alpha1.LabelTemplate] != "" && n.Annotations[v1alpha1.AnnotationCreator] != "" && n.DeletionTimestamp.IsZero()
}

// Reconcile is called with the name of a Namespace.
func (r *selfServiceReconciler) Reconcile(ctx context.Context, req reconcile.Request) (reconcile.Result, error) {
	began := r.now()
	err := r.reconcile(ctx, req.Name)
	outcome, result := "ok", reconcile.Result{}
	switch {
	case err != nil && ctx.Err() != nil:
		outcome, err = "stopped", nil
	case err != nil:
		if !apierrors.IsConflict(err) {
			r.log.Error("self-service namespace not made", "namespace", req.Name, "error", err)
		}
		outcome, result, err = "error", reconcile.Result{RequeueAfter: time.Second}, nil
	}
	r.metrics.reconciled("selfservice", outcome, r.now().Sub(began))
	return result, err
}

func (r *selfServiceReconciler) reconcile(ctx context.Context, name string) error {
	n := &corev1.Namespace{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: name}, n); err != nil {
		return client.IgnoreNotFound(err)
	}
	if !wanted(n) {
		return nil
	}
	refuse := func(reason, format string, args ...any) error {
		r.events.Eventf(n, nil, corev1.EventTypeWarning, reason, "SelfService", "%s", fmt.Sprintf(format, args...))
		return nil
	}
	// What the cache does not have yet would be made twice.
	existing := &v1alpha1.SupervisorNamespace{}
	err := r.live.Get(ctx, client.ObjectKey{Name: name}, existing)
	if err == nil {
		if existing.Labels[v1alpha1.LabelTemplate] == "" && !ours(n) {
			return refuse(v1alpha1.ReasonNamespaceNotOurs, "an administrator's SupervisorNamespace has this name: choose another")
		}
		return nil
	}
	if !apierrors.IsNotFound(err) {
		return err
	}
	t := &v1alpha1.NamespaceTemplate{}
	err = r.client.Get(ctx, client.ObjectKey{Name: n.Labels[v1alpha1.LabelTemplate]}, t)
	if apierrors.IsNotFound(err) {
		return refuse("UnknownTemplate", "there is no NamespaceTemplate %s any more", n.Labels[v1alpha1.LabelTemplate])
	}
	if err != nil {
		return err
	}
	creator := n.Annotations[v1alpha1.AnnotationCreator]
	many, err := r.tooMany(ctx, t, creator)
	if err != nil {
		return err
	}
	if many {
		return refuse(v1alpha1.ReasonTooManyNamespaces, "%s has %d namespaces from template %s, which is the most: delete one", creator, *t.Spec.MaxNamespacesPerUser, t.Name)
	}
	ns, err := fromTemplate(t, n)
	if err != nil {
		return refuse(v1alpha1.ReasonUnknownUser, "%v", err)
	}
	if !ours(n) {
		before := n.DeepCopy()
		n.Labels[v1alpha1.LabelNamespace] = n.Name
		if err := r.client.Patch(ctx, n, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
			return client.IgnoreNotFound(err)
		}
	}
	if err := r.client.Create(ctx, ns); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	r.events.Eventf(n, ns, corev1.EventTypeNormal, "Made", "SelfService", "%s", fmt.Sprintf("made from template %s", t.Name))
	return nil
}

// tooMany asks the API server: the cache may lack what was just made.
func (r *selfServiceReconciler) tooMany(ctx context.Context, t *v1alpha1.NamespaceTemplate, creator string) (bool, error) {
	if t.Spec.MaxNamespacesPerUser == nil {
		return false, nil
	}
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := r.live.List(ctx, list, client.MatchingLabels{v1alpha1.LabelTemplate: t.Name}); err != nil {
		return false, err
	}
	n := 0
	for i := range list.Items {
		if list.Items[i].Annotations[v1alpha1.AnnotationCreator] == creator {
			n++
		}
	}
	return n >= int(*t.Spec.MaxNamespacesPerUser), nil
}

// fromTemplate is the SupervisorNamespace of a Namespace that its user made, who
// becomes an owner.
func fromTemplate(t *v1alpha1.NamespaceTemplate, n *corev1.Namespace) (*v1alpha1.SupervisorNamespace, error) {
	creator := n.Annotations[v1alpha1.AnnotationCreator]
	owner := v1alpha1.AccessEntry{Kind: v1alpha1.UserSubject, Name: creator, Domain: v1alpha1.LocalDomain, Role: v1alpha1.RoleOwner}
	if name, ok := strings.CutPrefix(creator, sso.Prefix); ok {
		p, err := sso.Parse(name, sso.DefaultDomain)
		if err != nil {
			return nil, err
		}
		owner.Name, owner.Domain = p.Name, p.Domain
	}
	ns := &v1alpha1.SupervisorNamespace{
		ObjectMeta: metav1.ObjectMeta{
			Name: n.Name, Labels: map[string]string{v1alpha1.LabelTemplate: t.Name},
			Annotations: map[string]string{v1alpha1.AnnotationCreator: creator},
		},
		Spec: v1alpha1.SupervisorNamespaceSpec{Zones: slices.Clone(t.Spec.Zones), NamespaceSettings: *t.Spec.Settings.DeepCopy()},
	}
	ns.Spec.Access = slices.DeleteFunc(ns.Spec.Access, func(e v1alpha1.AccessEntry) bool {
		return e.Kind == owner.Kind && e.Name == owner.Name && e.Domain == owner.Domain
	})
	ns.Spec.Access = append(ns.Spec.Access, owner)
	return ns, nil
}
