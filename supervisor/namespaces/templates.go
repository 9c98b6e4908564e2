package namespaces

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// The admission policies of supervisor/controlplane/addons/selfservice.yaml
// read this ConfigMap: "plain" is Allow or Refuse; "template.NAME" has a line
// for each of its users, "u:" or "g:" and the name in Kubernetes; "full.NAME"
// those users who have as many namespaces as they may.
const (
	selfServiceConfig = "atoll-self-service"
	selfServiceRole   = "atoll:self-service"
	plainKey          = "plain"
	templateKey       = "template."
	fullKey           = "full."
	// admissionTime is what the API server is given to see that ConfigMap before
	// those in it get the right: a namespace made in between would be a plain
	// one.
	admissionTime = 2 * time.Second
)

// A templateReconciler keeps what admission reads, and the right to make
// namespaces, as the templates have it.
type templateReconciler struct{ *reconciler }

// Reconcile is called by one goroutine, for all templates at once.
func (r *templateReconciler) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	began := r.now()
	again, err := r.reconcile(ctx)
	outcome, result := "ok", reconcile.Result{RequeueAfter: again}
	switch {
	case err != nil && ctx.Err() != nil:
		outcome, err = "stopped", nil
	case err != nil:
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			r.log.Error("namespace templates not reconciled", "error", err)
		}
		outcome, result, err = "error", reconcile.Result{RequeueAfter: time.Second}, nil
	}
	r.metrics.reconciled("namespacetemplate", outcome, r.now().Sub(began))
	return result, err
}

func (r *templateReconciler) reconcile(ctx context.Context) (again time.Duration, err error) {
	templates := &v1alpha1.NamespaceTemplateList{}
	if err := r.client.List(ctx, templates); err != nil {
		return 0, err
	}
	slices.SortFunc(templates.Items, func(a, b v1alpha1.NamespaceTemplate) int { return strings.Compare(a.Name, b.Name) })
	sup := &v1alpha1.Supervisor{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: v1alpha1.SupervisorName}, sup); client.IgnoreNotFound(err) != nil {
		return 0, err
	}
	made, err := r.madeFrom(ctx)
	if err != nil {
		return 0, err
	}
	data := map[string]string{plainKey: string(v1alpha1.AllowPlainNamespaces)}
	if sup.Spec.PlainNamespaces != "" {
		data[plainKey] = string(sup.Spec.PlainNamespaces)
	}
	var everyone []rbacv1.Subject
	for i := range templates.Items {
		t := &templates.Items[i]
		subjects, problem, err := r.check(ctx, t, sup)
		if err != nil {
			return 0, err
		}
		if active(t) && problem == nil {
			data[templateKey+t.Name] = subjectLines(subjects)
			data[fullKey+t.Name] = strings.Join(fullUsers(t, made[t.Name]), "\n")
			everyone = append(everyone, subjects...)
		}
		if err := r.describe(ctx, t, problem, len(made[t.Name])); err != nil {
			return 0, err
		}
	}
	changed, err := r.writeConfig(ctx, data)
	if err != nil {
		return 0, err
	}
	if changed {
		again = admissionTime
	}
	return again, r.grant(ctx, everyone, changed)
}

func active(t *v1alpha1.NamespaceTemplate) bool { return t.Spec.Active == nil || *t.Spec.Active }

// madeFrom has the makers of the namespaces that were made from each template.
func (r *templateReconciler) madeFrom(ctx context.Context) (map[string][]string, error) {
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := r.client.List(ctx, list, client.HasLabels{v1alpha1.LabelTemplate}, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	made := map[string][]string{}
	for i := range list.Items {
		t := list.Items[i].Labels[v1alpha1.LabelTemplate]
		made[t] = append(made[t], list.Items[i].Annotations[v1alpha1.AnnotationCreator])
	}
	return made, nil
}

// fullUsers have as many namespaces as the template allows each.
func fullUsers(t *v1alpha1.NamespaceTemplate, makers []string) []string {
	if t.Spec.MaxNamespacesPerUser == nil {
		return nil
	}
	counts := map[string]int{}
	for _, m := range makers {
		counts[m]++
	}
	maps.DeleteFunc(counts, func(_ string, n int) bool { return n < int(*t.Spec.MaxNamespacesPerUser) })
	return slices.Sorted(maps.Keys(counts))
}

func subjectLines(subjects []rbacv1.Subject) string {
	var lines []string
	for _, s := range subjects {
		lines = append(lines, strings.ToLower(s.Kind[:1])+":"+s.Name)
	}
	return strings.Join(lines, "\n")
}

// check is who may use the template, and why it cannot be used.
func (r *templateReconciler) check(ctx context.Context, t *v1alpha1.NamespaceTemplate, sup *v1alpha1.Supervisor) ([]rbacv1.Subject, *problem, error) {
	var subjects []rbacv1.Subject
	for _, u := range t.Spec.AllowedUsers {
		s, err := newSubject(u.Kind, u.Name, u.Domain, sup.Spec.SSODomain)
		if err != nil || strings.ContainsAny(u.Name, "\n\r") {
			return nil, &problem{reason: v1alpha1.ReasonUnknownUser, text: fmt.Sprintf("spec.allowedUsers: %q is no user or group: correct it", u.Name)}, nil
		}
		subjects = append(subjects, rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: s.kind, Name: s.name})
	}
	if sup.Name == "" {
		return subjects, &problem{reason: v1alpha1.ReasonNoSupervisor, text: "there is no Supervisor: make one"}, nil
	}
	for _, z := range t.Spec.Zones {
		if !slices.ContainsFunc(sup.Spec.Zones, func(s v1alpha1.Zone) bool { return s.Name == z }) {
			return subjects, &problem{reason: v1alpha1.ReasonUnknownZone, text: fmt.Sprintf("the Supervisor has no zone %s: correct spec.zones", z)}, nil
		}
	}
	for _, l := range t.Spec.Settings.StoragePolicies {
		err := r.client.Get(ctx, client.ObjectKey{Name: l.Name}, &v1alpha1.StoragePolicy{})
		if apierrors.IsNotFound(err) {
			return subjects, &problem{reason: v1alpha1.ReasonUnknownPolicy, text: fmt.Sprintf("there is no StoragePolicy %s: choose one of `kubectl get storagepolicies`", l.Name)}, nil
		}
		if err != nil {
			return nil, nil, err
		}
	}
	for _, name := range t.Spec.Settings.VMClasses {
		err := r.client.Get(ctx, client.ObjectKey{Name: name}, &v1alpha1.VirtualMachineClass{})
		if apierrors.IsNotFound(err) {
			return subjects, &problem{reason: v1alpha1.ReasonUnknownClass, text: fmt.Sprintf("there is no VirtualMachineClass %s: make it, or take it off the template", name)}, nil
		}
		if err != nil {
			return nil, nil, err
		}
	}
	return subjects, nil, nil
}

func (r *templateReconciler) describe(ctx context.Context, t *v1alpha1.NamespaceTemplate, why *problem, made int) error {
	before := t.DeepCopy()
	c := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: "Ready", Message: "its users can make namespaces", ObservedGeneration: t.Generation}
	switch {
	case why != nil:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, why.reason, clip(why.text, maxText)
	case !active(t):
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, "Inactive", "spec.active is false"
	}
	meta.SetStatusCondition(&t.Status.Conditions, c)
	t.Status.ObservedGeneration, t.Status.Namespaces = t.Generation, int32(min(made, 1<<30))
	if equality.Semantic.DeepEqual(before.Status, t.Status) {
		return nil
	}
	return r.client.Status().Patch(ctx, t, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{}))
}

// grant gives the right to make namespaces, which admission then narrows. With
// only, nobody is added.
func (r *templateReconciler) grant(ctx context.Context, subjects []rbacv1.Subject, only bool) error {
	key := func(s rbacv1.Subject) string { return s.Kind + "/" + s.Name }
	slices.SortFunc(subjects, func(a, b rbacv1.Subject) int { return strings.Compare(key(a), key(b)) })
	subjects = slices.Compact(subjects)
	want := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: selfServiceRole},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: selfServiceRole},
		Subjects:   subjects,
	}
	found := &rbacv1.ClusterRoleBinding{}
	err := r.live.Get(ctx, client.ObjectKeyFromObject(want), found)
	if only {
		subjects = slices.DeleteFunc(subjects, func(s rbacv1.Subject) bool { return !slices.Contains(found.Subjects, s) })
	}
	switch {
	case apierrors.IsNotFound(err) && len(subjects) == 0:
		return nil
	case apierrors.IsNotFound(err):
		return r.client.Create(ctx, want)
	case err != nil:
		return err
	case equality.Semantic.DeepEqual(found.Subjects, subjects):
		return nil
	}
	found.Subjects = subjects
	return r.client.Update(ctx, found)
}

func (r *templateReconciler) writeConfig(ctx context.Context, data map[string]string) (changed bool, err error) {
	found := &corev1.ConfigMap{}
	err = r.live.Get(ctx, client.ObjectKey{Namespace: metav1.NamespaceSystem, Name: selfServiceConfig}, found)
	if apierrors.IsNotFound(err) {
		return true, r.client.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: metav1.NamespaceSystem, Name: selfServiceConfig}, Data: data})
	}
	if err != nil || maps.Equal(found.Data, data) {
		return false, err
	}
	found.Data = data
	return true, r.client.Update(ctx, found)
}
