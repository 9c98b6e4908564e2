package namespaces

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// usageCaches keep of pods and claims what counts as use, and no more.
func usageCaches() map[client.Object]cache.ByObject {
	return map[client.Object]cache.ByObject{
		&corev1.Pod{}: {Transform: func(o any) (any, error) {
			if p, ok := o.(*corev1.Pod); ok {
				return barePod(p), nil
			}
			return o, nil
		}},
		&corev1.PersistentVolumeClaim{}: {Transform: func(o any) (any, error) {
			if c, ok := o.(*corev1.PersistentVolumeClaim); ok {
				return bareClaim(c), nil
			}
			return o, nil
		}},
	}
}

func bareMeta(m *metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion}
}

// barePod has its limits, and whether it has ended. What is set on containers
// that run counts as it is in the spec: a resize is counted when it is asked
// for.
func barePod(p *corev1.Pod) *corev1.Pod {
	bare := func(all []corev1.Container) []corev1.Container {
		var out []corev1.Container
		for _, c := range all {
			if len(c.Resources.Limits) > 0 {
				out = append(out, corev1.Container{RestartPolicy: c.RestartPolicy, Resources: corev1.ResourceRequirements{Limits: c.Resources.Limits}})
			}
		}
		return out
	}
	out := &corev1.Pod{ObjectMeta: bareMeta(&p.ObjectMeta), Spec: corev1.PodSpec{
		Containers: bare(p.Spec.Containers), InitContainers: bare(p.Spec.InitContainers), Overhead: p.Spec.Overhead,
	}}
	if r := p.Spec.Resources; r != nil {
		out.Spec.Resources = &corev1.ResourceRequirements{Limits: r.Limits}
	}
	out.Status.Phase = p.Status.Phase
	return out
}

func bareClaim(c *corev1.PersistentVolumeClaim) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{ObjectMeta: bareMeta(&c.ObjectMeta), Spec: corev1.PersistentVolumeClaimSpec{
		StorageClassName: c.Spec.StorageClassName,
		Resources:        corev1.VolumeResourceRequirements{Requests: c.Spec.Resources.Requests},
	}}
}

// useChanged: of pods and claims, what is not use comes and goes all the time.
func useChanged() predicate.Predicate {
	return predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
		switch before := e.ObjectOld.(type) {
		case *corev1.Pod:
			after, ok := e.ObjectNew.(*corev1.Pod)
			return ok && (ended(before) != ended(after) || !equality.Semantic.DeepEqual(before.Spec, after.Spec))
		case *corev1.PersistentVolumeClaim:
			after, ok := e.ObjectNew.(*corev1.PersistentVolumeClaim)
			return ok && !equality.Semantic.DeepEqual(before.Spec, after.Spec)
		}
		return true
	}}
}

func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// readUsage is what pods and claims ask for, as quotas would count it, from the
// cache.
func (p *pass) readUsage(ctx context.Context) error {
	in := client.InNamespace(p.ns.Name)
	pods, claims := &corev1.PodList{}, &corev1.PersistentVolumeClaimList{}
	if err := p.client.List(ctx, pods, in, client.UnsafeDisableDeepCopy); err != nil {
		return err
	}
	if len(p.ns.Spec.StoragePolicies) > 0 {
		if err := p.client.List(ctx, claims, in, client.UnsafeDisableDeepCopy); err != nil {
			return err
		}
	}
	p.ns.Status.Usage = usageOf(&p.ns.Spec, pods.Items, claims.Items)
	return nil
}

// usageOf sums up.
func usageOf(spec *v1alpha1.SupervisorNamespaceSpec, pods []corev1.Pod, claims []corev1.PersistentVolumeClaim) *v1alpha1.Usage {
	cpu, memory, n := resource.NewQuantity(0, resource.DecimalSI), resource.NewQuantity(0, resource.BinarySI), int64(0)
	for i := range pods {
		if ended(&pods[i]) {
			continue
		}
		n++
		limits := resourcehelper.PodLimits(&pods[i], resourcehelper.PodResourcesOptions{})
		cpu.Add(limits[corev1.ResourceCPU])
		memory.Add(limits[corev1.ResourceMemory])
	}
	u := &v1alpha1.Usage{CPU: cpu, Memory: memory, Pods: &n}
	for _, policy := range spec.StoragePolicies {
		used := resource.NewQuantity(0, resource.BinarySI)
		for i := range claims {
			if c := &claims[i]; c.Spec.StorageClassName != nil && *c.Spec.StorageClassName == policy.Name {
				used.Add(c.Spec.Resources.Requests[corev1.ResourceStorage])
			}
		}
		u.Storage = append(u.Storage, v1alpha1.StorageUsage{Policy: policy.Name, StorageClass: policy.Name, Used: *used})
	}
	return u
}
