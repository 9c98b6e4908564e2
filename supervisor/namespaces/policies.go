package namespaces

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/namespaces/vc"
)

const (
	// provisioner of volumes, and the parameter that names the policy.
	provisioner     = v1alpha1.CSIDriverName
	policyParameter = v1alpha1.PolicyIDParameter
)

// A policyReconciler keeps a StoragePolicy and a StorageClass for each storage
// policy of vCenter. It handles all in one reconcile, since one reading has them
// all.
type policyReconciler struct{ *reconciler }

// Reconcile is called by one goroutine.
func (r *policyReconciler) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	began := r.now()
	err := r.reconcile(ctx)
	outcome, result := "ok", reconcile.Result{}
	switch {
	case err != nil && ctx.Err() != nil:
		outcome, err = "stopped", nil
	case err != nil:
		if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
			r.log.Error("storage policies not reconciled", "error", err)
		}
		outcome, result, err = "error", reconcile.Result{RequeueAfter: time.Second}, nil
	}
	r.metrics.reconciled("storagepolicy", outcome, r.now().Sub(began))
	return result, err
}

func (r *policyReconciler) reconcile(ctx context.Context) error {
	vcenter, err := r.conn.client()
	if err != nil {
		return nil // policies are unknown: what is there stays
	}
	policies, _, err := vcenter.Policies()
	if err != nil || len(policies) == 0 {
		// Every vCenter has some: none at all is no answer to act on.
		return nil
	}
	sup := &v1alpha1.Supervisor{}
	if err := r.client.Get(ctx, client.ObjectKey{Name: v1alpha1.SupervisorName}, sup); err != nil {
		return client.IgnoreNotFound(err)
	}
	objects := &v1alpha1.StoragePolicyList{}
	if err := r.client.List(ctx, objects); err != nil {
		return err
	}
	classes := &storagev1.StorageClassList{}
	if err := r.client.List(ctx, classes); err != nil {
		return err
	}
	byID := map[string]*v1alpha1.StoragePolicy{}
	for i := range objects.Items {
		o := &objects.Items[i]
		if old := byID[o.Spec.ID]; old == nil || o.Name < old.Name {
			byID[o.Spec.ID] = o
		}
	}
	for _, p := range policies {
		p.Datastores = allowedDatastores(p.Datastores, sup.Spec.Datastores)
		if err := r.keep(ctx, p, byID[p.ID], objects, classes); err != nil {
			return err
		}
	}
	for i := range objects.Items {
		o := &objects.Items[i]
		if !slices.ContainsFunc(policies, func(p vc.Policy) bool { return p.ID == o.Spec.ID }) {
			if err := r.gone(ctx, o, classes); err != nil {
				return err
			}
		}
	}
	return nil
}

func allowedDatastores(all []vc.Datastore, names []string) []vc.Datastore {
	if len(names) == 0 {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(d vc.Datastore) bool { return !slices.Contains(names, d.Name) })
}

// keep makes or updates the objects of one policy.
func (r *policyReconciler) keep(ctx context.Context, p vc.Policy, o *v1alpha1.StoragePolicy, objects *v1alpha1.StoragePolicyList, classes *storagev1.StorageClassList) error {
	if o == nil {
		o = &v1alpha1.StoragePolicy{Spec: v1alpha1.StoragePolicySpec{ID: p.ID}}
		o.Name = policyName(p.Name, p.ID, func(name string) bool {
			return slices.ContainsFunc(objects.Items, func(x v1alpha1.StoragePolicy) bool { return x.Name == name }) ||
				slices.ContainsFunc(classes.Items, func(c storagev1.StorageClass) bool {
					return c.Name == name && c.Labels[v1alpha1.LabelPolicyID] != p.ID
				})
		})
		if err := r.client.Create(ctx, o); err != nil {
			return fmt.Errorf("StoragePolicy %s: %w", o.Name, err)
		}
		objects.Items = append(objects.Items, *o)
	}
	classErr, err := r.keepClass(ctx, o, classes)
	if err != nil {
		return err
	}
	before := o.DeepCopy()
	if old := o.Status.PolicyName; old != "" && old != p.Name {
		r.events.Eventf(o, nil, corev1.EventTypeNormal, "Renamed", "Reconcile", "%s", fmt.Sprintf("the policy was renamed in vCenter from %q to %q; %s keeps its name", old, p.Name, o.Name))
		r.metrics.drifted("policy-name", "adopted")
	}
	o.Status = policyStatus(o.Status, p, classErr)
	return r.writePolicyStatus(ctx, before, o)
}

func (r *policyReconciler) writePolicyStatus(ctx context.Context, before, o *v1alpha1.StoragePolicy) error {
	if equality.Semantic.DeepEqual(before.Status, o.Status) {
		return nil
	}
	if err := r.client.Status().Patch(ctx, o, client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})); err != nil {
		return fmt.Errorf("status of StoragePolicy %s: %w", o.Name, err)
	}
	return nil
}

// policyStatus is what vCenter says about it; classErr, what is wrong with its
// StorageClass.
func policyStatus(old v1alpha1.StoragePolicyStatus, p vc.Policy, classErr string) v1alpha1.StoragePolicyStatus {
	st := v1alpha1.StoragePolicyStatus{Conditions: slices.Clone(old.Conditions), PolicyName: p.Name, Description: p.Description}
	var capacity, free int64
	for _, d := range p.Datastores {
		capacity += d.Capacity
		free += d.Free
		st.Datastores = append(st.Datastores, v1alpha1.DatastoreStatus{
			ID: d.ID, Name: d.Name,
			Capacity: *resource.NewQuantity(d.Capacity, resource.BinarySI), Free: *resource.NewQuantity(coarse(d.Free), resource.BinarySI),
		})
	}
	st.Capacity, st.Free = resource.NewQuantity(capacity, resource.BinarySI), resource.NewQuantity(coarse(free), resource.BinarySI)
	c := metav1.Condition{Type: v1alpha1.ConditionReady, Status: metav1.ConditionTrue, Reason: "Ready", Message: "volumes can be made with it"}
	switch {
	case classErr != "":
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, v1alpha1.ReasonStorageClassNotOurs, classErr
	case len(p.Datastores) == 0:
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, v1alpha1.ReasonNoDatastore, "no datastore fits it: tag one in vCenter, or add one to the Supervisor's spec.datastores"
	}
	meta.SetStatusCondition(&st.Conditions, c)
	return st
}

// coarse rounds down to GiB: free space changes all the time.
func coarse(n int64) int64 { return n >> 30 << 30 }

// keepClass makes the StorageClass of a policy. notOurs says that somebody
// else's has the name.
func (r *policyReconciler) keepClass(ctx context.Context, o *v1alpha1.StoragePolicy, classes *storagev1.StorageClassList) (notOurs string, err error) {
	want := storageClass(o)
	i := slices.IndexFunc(classes.Items, func(c storagev1.StorageClass) bool { return c.Name == o.Name })
	if i < 0 {
		if notReady(o.Status.Conditions) == nil && len(o.Status.Conditions) > 0 { // it was there
			switch err := r.live.Get(ctx, client.ObjectKeyFromObject(want), &storagev1.StorageClass{}); {
			case err == nil:
				return "", lagging("storageclasses", want.Name)
			case !apierrors.IsNotFound(err):
				return "", err
			}
			if err := r.classDrift(ctx, o, "somebody deleted StorageClass "+want.Name+": made again"); err != nil {
				return "", err
			}
		}
		if err := r.client.Create(ctx, want); err != nil {
			return "", fmt.Errorf("StorageClass %s: %w", want.Name, err)
		}
		return "", nil
	}
	have := &classes.Items[i]
	if have.Labels[v1alpha1.LabelPolicyID] != o.Spec.ID {
		return fmt.Sprintf("there is a StorageClass %s that Atoll did not make: rename or delete it", o.Name), nil
	}
	if sameClass(have, want) {
		return "", nil
	}
	if err := r.classDrift(ctx, o, "somebody changed StorageClass "+want.Name+": changed back"); err != nil {
		return "", err
	}
	// Hardly anything of it can be changed in place. Volumes that are there keep
	// what they have.
	if err := r.client.Delete(ctx, have, client.Preconditions{UID: &have.UID}); client.IgnoreNotFound(err) != nil {
		return "", fmt.Errorf("StorageClass %s: %w", have.Name, err)
	}
	if err := r.client.Create(ctx, want); err != nil {
		return "", fmt.Errorf("StorageClass %s: %w", want.Name, err)
	}
	return "", nil
}

func sameClass(a, b *storagev1.StorageClass) bool {
	same := equality.Semantic.DeepEqual
	return a.Provisioner == b.Provisioner && same(a.Parameters, b.Parameters) && same(a.VolumeBindingMode, b.VolumeBindingMode) &&
		same(a.AllowVolumeExpansion, b.AllowVolumeExpansion) && same(a.ReclaimPolicy, b.ReclaimPolicy)
}

// classDrift tells what somebody did to a StorageClass, before it is mended. It
// is no namespace's alone: the StoragePolicy has the event, and is not ready
// until then; namespaces that use it say so too.
func (r *policyReconciler) classDrift(ctx context.Context, o *v1alpha1.StoragePolicy, message string) error {
	before := o.DeepCopy()
	if meta.SetStatusCondition(&o.Status.Conditions, metav1.Condition{
		Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: v1alpha1.ReasonDrift, Message: message,
	}) {
		if err := r.writePolicyStatus(ctx, before, o); err != nil {
			return err
		}
		r.events.Eventf(o, nil, corev1.EventTypeWarning, v1alpha1.ReasonDrift, "Reconcile", "%s", message)
		r.metrics.drifted("storage-class", "mended")
	}
	return nil
}

// storageClass binds claims at once, as those of VMware's Supervisor do: a disk in
// vCenter is where its datastore is, whichever host runs its pod, and a claim
// waits for no node.
func storageClass(o *v1alpha1.StoragePolicy) *storagev1.StorageClass {
	mode, expand, reclaim := storagev1.VolumeBindingImmediate, true, corev1.PersistentVolumeReclaimDelete
	return &storagev1.StorageClass{
		ObjectMeta:  metav1.ObjectMeta{Name: o.Name, Labels: map[string]string{v1alpha1.LabelPolicyID: o.Spec.ID}},
		Provisioner: provisioner, Parameters: map[string]string{policyParameter: o.Spec.ID},
		VolumeBindingMode: &mode, AllowVolumeExpansion: &expand, ReclaimPolicy: &reclaim,
	}
}

// gone marks a policy that vCenter does not have any more, and takes its objects
// away once no namespace and no template names it.
func (r *policyReconciler) gone(ctx context.Context, o *v1alpha1.StoragePolicy, classes *storagev1.StorageClassList) error {
	users, err := r.policyUsers(ctx, o.Name)
	if err != nil {
		return err
	}
	if len(users) == 0 {
		for i := range classes.Items {
			c := &classes.Items[i]
			if c.Name == o.Name && c.Labels[v1alpha1.LabelPolicyID] == o.Spec.ID {
				if err := r.client.Delete(ctx, c, client.Preconditions{UID: &c.UID}); client.IgnoreNotFound(err) != nil {
					return fmt.Errorf("StorageClass %s: %w", c.Name, err)
				}
			}
		}
		return client.IgnoreNotFound(r.client.Delete(ctx, o, client.Preconditions{UID: &o.UID}))
	}
	before := o.DeepCopy()
	message := fmt.Sprintf("vCenter has no policy %q any more, and one that is made again under its name is another: name another in %s", o.Status.PolicyName, strings.Join(users, ", "))
	changed := meta.SetStatusCondition(&o.Status.Conditions, metav1.Condition{
		Type: v1alpha1.ConditionReady, Status: metav1.ConditionFalse, Reason: v1alpha1.ReasonPolicyGone, Message: clip(message, maxText),
	})
	if changed {
		r.events.Eventf(o, nil, corev1.EventTypeWarning, v1alpha1.ReasonPolicyGone, "Reconcile", "%s", clip(message, maxText))
	}
	return r.writePolicyStatus(ctx, before, o)
}

// policyUsers are those who name a policy, for people; at most five.
func (r *reconciler) policyUsers(ctx context.Context, policy string) ([]string, error) {
	named := func(limits []v1alpha1.StoragePolicyLimit) bool {
		return slices.ContainsFunc(limits, func(l v1alpha1.StoragePolicyLimit) bool { return l.Name == policy })
	}
	var users []string
	list := &v1alpha1.SupervisorNamespaceList{}
	if err := r.client.List(ctx, list, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	for i := range list.Items {
		if named(list.Items[i].Spec.StoragePolicies) && len(users) < 5 {
			users = append(users, "SupervisorNamespace "+list.Items[i].Name)
		}
	}
	templates := &v1alpha1.NamespaceTemplateList{}
	if err := r.client.List(ctx, templates, client.UnsafeDisableDeepCopy); err != nil {
		return nil, err
	}
	for i := range templates.Items {
		if named(templates.Items[i].Spec.Settings.StoragePolicies) && len(users) < 5 {
			users = append(users, "NamespaceTemplate "+templates.Items[i].Name)
		}
	}
	return users, nil
}
