package namespaces

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// applyNamespace makes or mends the Kubernetes Namespace. found is what there
// is, nil for nothing.
func (r *reconciler) applyNamespace(ctx context.Context, found *corev1.Namespace, ns *v1alpha1.SupervisorNamespace, classes []v1alpha1.VirtualMachineClass) error {
	want := namespaceAnnotations(ns, classes)
	labels := map[string]string{v1alpha1.LabelNamespace: ns.Name}
	if t := ns.Labels[v1alpha1.LabelTemplate]; t != "" {
		labels[v1alpha1.LabelTemplate] = t
	}
	if found == nil {
		n := &corev1.Namespace{}
		n.Name, n.Labels, n.Annotations = ns.Name, labels, map[string]string{}
		for k, v := range want {
			if v != nil {
				n.Annotations[k] = *v
			}
		}
		return r.client.Create(ctx, n)
	}
	n := found.DeepCopy()
	if n.Annotations == nil {
		n.Annotations = map[string]string{}
	}
	for k, v := range want {
		if v == nil {
			delete(n.Annotations, k)
		} else {
			n.Annotations[k] = *v
		}
	}
	if n.Labels == nil {
		n.Labels = map[string]string{}
	}
	maps.Copy(n.Labels, labels)
	if equality.Semantic.DeepEqual(n.ObjectMeta, found.ObjectMeta) {
		return nil
	}
	return r.client.Patch(ctx, n, client.MergeFrom(found))
}

// An edit is what somebody else changed in a quota or a LimitRange.
type edit struct {
	object string // ResourceQuota shop/shop
	was    string // for people
}

// applied is the digest of what we write.
func appliedDigest(lists ...corev1.ResourceList) string {
	h := sha256.New()
	for i, list := range lists {
		for _, name := range slices.Sorted(maps.Keys(list)) {
			fmt.Fprintf(h, "%d %s=%s\n", i, name, quantityText(list[name]))
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// quantityText is one text for equal quantities: 1000m is 1.
func quantityText(q resource.Quantity) string {
	text := q.AsDec().String()
	if strings.Contains(text, ".") {
		text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
	}
	return text
}

// resourcesText lists them for people, in order.
func resourcesText(list corev1.ResourceList) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(list)) {
		q := list[name]
		parts = append(parts, fmt.Sprintf("%s %s", name, q.String()))
	}
	if len(parts) == 0 {
		return "no limits"
	}
	return strings.Join(parts, ", ")
}

// applyQuota makes or mends a ResourceQuota. With keep, an edit of somebody
// else's stays where it is. It returns the edit that it found.
func (r *reconciler) applyQuota(ctx context.Context, ns, name string, hard corev1.ResourceList, keep bool) (*edit, corev1.ResourceList, error) {
	found := &corev1.ResourceQuota{}
	err := r.client.Get(ctx, client.ObjectKey{Namespace: ns, Name: name}, found)
	if apierrors.IsNotFound(err) {
		q := &corev1.ResourceQuota{ObjectMeta: objectMeta(ns, name), Spec: corev1.ResourceQuotaSpec{Hard: hard}}
		q.Annotations = map[string]string{annotationApplied: appliedDigest(hard)}
		return nil, nil, r.client.Create(ctx, q)
	}
	if err != nil {
		return nil, nil, err
	}
	var e *edit
	digest := appliedDigest(hard)
	is := appliedDigest(found.Spec.Hard)
	narrowed := len(found.Spec.Scopes) > 0 || found.Spec.ScopeSelector != nil
	if is != found.Annotations[annotationApplied] && is != digest || narrowed {
		e = &edit{object: "ResourceQuota " + ns + "/" + name, was: resourcesText(found.Spec.Hard)}
		if keep && !narrowed {
			return e, found.Spec.Hard, nil
		}
	}
	if is == digest && found.Annotations[annotationApplied] == digest && found.Labels[v1alpha1.LabelNamespace] == ns && !narrowed {
		return nil, nil, nil
	}
	q := found.DeepCopy()
	setApplied(q, ns, digest)
	q.Spec = corev1.ResourceQuotaSpec{Hard: hard}
	return e, nil, r.client.Update(ctx, q)
}

func setApplied(o client.Object, ns, digest string) {
	annotations, labels := o.GetAnnotations(), o.GetLabels()
	if annotations == nil {
		annotations = map[string]string{}
	}
	if labels == nil {
		labels = map[string]string{}
	}
	annotations[annotationApplied], labels[v1alpha1.LabelNamespace] = digest, ns
	o.SetAnnotations(annotations)
	o.SetLabels(labels)
}

// applyLimitRange makes, mends or takes away the LimitRange, as applyQuota.
func (r *reconciler) applyLimitRange(ctx context.Context, ns string, item *corev1.LimitRangeItem, keep bool) (*edit, []corev1.LimitRangeItem, error) {
	name := limitRangeName(ns)
	found := &corev1.LimitRange{}
	err := r.client.Get(ctx, client.ObjectKey{Namespace: ns, Name: name}, found)
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return nil, nil, err
	}
	want := corev1.LimitRangeSpec{}
	digest := appliedDigest(nil, nil)
	if item != nil {
		want.Limits = []corev1.LimitRangeItem{*item}
		digest = appliedDigest(item.Default, item.DefaultRequest)
	}
	if missing {
		if item == nil {
			return nil, nil, nil
		}
		l := &corev1.LimitRange{ObjectMeta: objectMeta(ns, name), Spec: want}
		setApplied(l, ns, digest)
		return nil, nil, r.client.Create(ctx, l)
	}
	is, plain := limitRangeDigest(found)
	var e *edit
	if is != found.Annotations[annotationApplied] && is != digest || !plain {
		e = &edit{object: "LimitRange " + ns + "/" + name, was: limitRangeText(found)}
		if keep && plain {
			return e, found.Spec.Limits, nil
		}
	}
	if item == nil {
		return e, nil, client.IgnoreNotFound(r.client.Delete(ctx, found))
	}
	if is == digest && plain && found.Annotations[annotationApplied] == digest && found.Labels[v1alpha1.LabelNamespace] == ns {
		return nil, nil, nil
	}
	l := found.DeepCopy()
	setApplied(l, ns, digest)
	l.Spec = want
	return e, nil, r.client.Update(ctx, l)
}

// limitRangeDigest is not plain where the LimitRange says more than defaults of
// containers, which a spec cannot.
func limitRangeDigest(l *corev1.LimitRange) (digest string, plain bool) {
	switch len(l.Spec.Limits) {
	case 0:
		return appliedDigest(nil, nil), true
	case 1:
		i := l.Spec.Limits[0]
		return appliedDigest(i.Default, i.DefaultRequest), i.Type == corev1.LimitTypeContainer && len(i.Max)+len(i.Min)+len(i.MaxLimitRequestRatio) == 0
	}
	return "", false
}

func limitRangeText(l *corev1.LimitRange) string {
	var parts []string
	for _, i := range l.Spec.Limits {
		parts = append(parts, fmt.Sprintf("%s: default %s, default request %s", i.Type, resourcesText(i.Default), resourcesText(i.DefaultRequest)))
	}
	return strings.Join(parts, "; ")
}

// applyBindings makes the access list's RoleBindings, one a role.
func (r *reconciler) applyBindings(ctx context.Context, ns *v1alpha1.SupervisorNamespace, ssoDomain string) error {
	for _, ref := range roleRefs {
		want, err := subjectsOf(ns.Spec.Access, ref.role, ssoDomain)
		if err != nil {
			return err
		}
		if err := r.applyBinding(ctx, ns.Name, bindingPrefix+string(ref.role), ref.clusterRole, want); err != nil {
			return err
		}
	}
	return nil
}

func (r *reconciler) applyBinding(ctx context.Context, ns, name, role string, subjects []rbacv1.Subject) error {
	want := &rbacv1.RoleBinding{
		ObjectMeta: objectMeta(ns, name), Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
	}
	found := &rbacv1.RoleBinding{}
	err := r.client.Get(ctx, client.ObjectKeyFromObject(want), found)
	switch {
	case apierrors.IsNotFound(err) && len(subjects) == 0:
		return nil
	case apierrors.IsNotFound(err):
		return r.client.Create(ctx, want)
	case err != nil:
		return err
	case len(subjects) == 0:
		return client.IgnoreNotFound(r.client.Delete(ctx, found))
	case found.RoleRef != want.RoleRef: // which nothing can change
		if err := client.IgnoreNotFound(r.client.Delete(ctx, found)); err != nil {
			return err
		}
		return r.client.Create(ctx, want)
	case equality.Semantic.DeepEqual(found.Subjects, subjects) && found.Labels[v1alpha1.LabelNamespace] == ns:
		return nil
	}
	b := found.DeepCopy()
	b.Subjects = subjects
	if b.Labels == nil {
		b.Labels = map[string]string{}
	}
	b.Labels[v1alpha1.LabelNamespace] = ns
	return r.client.Update(ctx, b)
}
