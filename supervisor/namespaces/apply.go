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
	object string                  // ResourceQuota shop/shop
	was    string                  // for people
	hard   corev1.ResourceList     // of a quota
	items  []corev1.LimitRangeItem // of a LimitRange
}

const mendedQuota = "changed back, as spec.driftPolicy.quota says"

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
// else's stays where it is, and is returned.
func (p *pass) applyQuota(ctx context.Context, name string, hard corev1.ResourceList, keep bool) (*edit, error) {
	ns, found := p.ns.Name, &corev1.ResourceQuota{}
	err := p.client.Get(ctx, client.ObjectKey{Namespace: ns, Name: name}, found)
	if apierrors.IsNotFound(err) {
		q := &corev1.ResourceQuota{ObjectMeta: objectMeta(ns, name), Spec: corev1.ResourceQuotaSpec{Hard: hard}}
		q.Annotations = map[string]string{annotationApplied: appliedDigest(hard)}
		if err := p.missing(ctx, v1alpha1.ReasonQuotaEdited, "ResourceQuota", q); err != nil {
			return nil, err
		}
		return nil, p.client.Create(ctx, q)
	}
	if err != nil {
		return nil, err
	}
	digest := appliedDigest(hard)
	is := appliedDigest(found.Spec.Hard)
	narrowed := len(found.Spec.Scopes) > 0 || found.Spec.ScopeSelector != nil
	if is != found.Annotations[annotationApplied] && is != digest || narrowed {
		e := &edit{object: "ResourceQuota " + ns + "/" + name, was: resourcesText(found.Spec.Hard), hard: found.Spec.Hard}
		if keep && !narrowed {
			return e, nil
		}
		if err := p.edited(ctx, e, mendedQuota, "mended"); err != nil {
			return nil, err
		}
	}
	if is == digest && found.Annotations[annotationApplied] == digest && found.Labels[v1alpha1.LabelNamespace] == ns && !narrowed {
		return nil, nil
	}
	q := found.DeepCopy()
	setApplied(q, ns, digest)
	q.Spec = corev1.ResourceQuotaSpec{Hard: hard}
	return nil, p.client.Update(ctx, q)
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
func (p *pass) applyLimitRange(ctx context.Context, item *corev1.LimitRangeItem, keep bool) (*edit, error) {
	ns := p.ns.Name
	name := limitRangeName(ns)
	found := &corev1.LimitRange{}
	err := p.client.Get(ctx, client.ObjectKey{Namespace: ns, Name: name}, found)
	missing := apierrors.IsNotFound(err)
	if err != nil && !missing {
		return nil, err
	}
	want := corev1.LimitRangeSpec{}
	digest := appliedDigest(nil, nil)
	if item != nil {
		want.Limits = []corev1.LimitRangeItem{*item}
		digest = appliedDigest(item.Default, item.DefaultRequest)
	}
	if missing {
		if item == nil {
			return nil, nil
		}
		l := &corev1.LimitRange{ObjectMeta: objectMeta(ns, name), Spec: want}
		setApplied(l, ns, digest)
		if err := p.missing(ctx, v1alpha1.ReasonQuotaEdited, "LimitRange", l); err != nil {
			return nil, err
		}
		return nil, p.client.Create(ctx, l)
	}
	is, plain := limitRangeDigest(found)
	if is != found.Annotations[annotationApplied] && is != digest || !plain {
		e := &edit{object: "LimitRange " + ns + "/" + name, was: limitRangeText(found), items: found.Spec.Limits}
		if keep && plain {
			return e, nil
		}
		if err := p.edited(ctx, e, mendedQuota, "mended"); err != nil {
			return nil, err
		}
	}
	if item == nil {
		return nil, client.IgnoreNotFound(p.client.Delete(ctx, found))
	}
	if is == digest && plain && found.Annotations[annotationApplied] == digest && found.Labels[v1alpha1.LabelNamespace] == ns {
		return nil, nil
	}
	l := found.DeepCopy()
	setApplied(l, ns, digest)
	l.Spec = want
	return nil, p.client.Update(ctx, l)
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
func (p *pass) applyBindings(ctx context.Context) error {
	for _, ref := range roleRefs {
		want, err := subjectsOf(p.ns.Spec.Access, ref.role, p.sup.Spec.SSODomain)
		if err != nil {
			return err
		}
		if err := p.applyBinding(ctx, bindingPrefix+string(ref.role), ref.clusterRole, want); err != nil {
			return err
		}
	}
	return nil
}

// applyBinding makes, mends or takes away one RoleBinding.
func (p *pass) applyBinding(ctx context.Context, name, role string, subjects []rbacv1.Subject) error {
	ns := p.ns.Name
	want := &rbacv1.RoleBinding{
		ObjectMeta: objectMeta(ns, name), Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
	}
	digest := bindingDigest(want)
	setApplied(want, ns, digest)
	found := &rbacv1.RoleBinding{}
	err := p.client.Get(ctx, client.ObjectKeyFromObject(want), found)
	switch {
	case apierrors.IsNotFound(err) && len(subjects) == 0:
		return nil
	case apierrors.IsNotFound(err):
		if err := p.missing(ctx, v1alpha1.ReasonDrift, "RoleBinding", want); err != nil {
			return err
		}
		return p.client.Create(ctx, want)
	case err != nil:
		return err
	}
	if is := bindingDigest(found); is != found.Annotations[annotationApplied] && is != digest {
		fresh, err := p.tell(ctx, v1alpha1.ReasonDrift, fmt.Sprintf("somebody changed RoleBinding %s/%s to %s: changed back", ns, name, bindingText(found)))
		if err != nil {
			return err
		}
		if fresh {
			p.metrics.drifted("role-binding", "mended")
		}
	}
	switch {
	case len(subjects) == 0:
		return client.IgnoreNotFound(p.client.Delete(ctx, found))
	case found.RoleRef != want.RoleRef: // which nothing can change
		if err := client.IgnoreNotFound(p.client.Delete(ctx, found)); err != nil {
			return err
		}
		return p.client.Create(ctx, want)
	case equality.Semantic.DeepEqual(found.Subjects, subjects) && found.Labels[v1alpha1.LabelNamespace] == ns && found.Annotations[annotationApplied] == digest:
		return nil
	}
	b := found.DeepCopy()
	b.Subjects = subjects
	setApplied(b, ns, digest)
	return p.client.Update(ctx, b)
}

// bindingDigest is of what a RoleBinding allows whom.
func bindingDigest(b *rbacv1.RoleBinding) string {
	h := sha256.New()
	fmt.Fprintf(h, "%s/%s/%s\n", b.RoleRef.APIGroup, b.RoleRef.Kind, b.RoleRef.Name)
	for _, s := range b.Subjects {
		fmt.Fprintf(h, "%s/%s/%s/%s\n", s.APIGroup, s.Kind, s.Namespace, s.Name)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// bindingText is "edit for User ada, Group devs".
func bindingText(b *rbacv1.RoleBinding) string {
	var who []string
	for _, s := range b.Subjects {
		who = append(who, s.Kind+" "+s.Name)
	}
	if len(who) == 0 {
		who = []string{"nobody"}
	}
	if len(who) > 4 {
		who = append(who[:4], fmt.Sprintf("%d more", len(b.Subjects)-4))
	}
	return b.RoleRef.Name + " for " + strings.Join(who, ", ")
}
