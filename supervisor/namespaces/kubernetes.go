package namespaces

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/supervisor/runtimeclass"
)

// syncKubernetes makes the Namespace and what is in it. The RoleBindings come
// last: nobody gets in before the limits are there. Where it adopts an edited
// quota into the spec, changed is true and the pass is over.
func (p *pass) syncKubernetes(ctx context.Context, found *corev1.Namespace, classes []v1alpha1.VirtualMachineClass) (changed bool, err error) {
	if len(p.ns.Status.Pools) == 0 {
		return false, nil // never synced: a namespace without a pool has no limits in vSphere
	}
	if err := p.applyNamespace(ctx, found, p.ns, classes); err != nil {
		return false, err
	}
	if err := p.ensureRuntimeClass(ctx); err != nil {
		return false, err
	}
	changed, err = p.syncQuotas(ctx)
	if changed || err != nil {
		return changed, err
	}
	if err := p.checkAccess(); err != nil {
		p.wait(v1alpha1.ReasonUnknownUser, "%v: correct spec.access", err)
		return false, nil
	}
	if err := p.applyBindings(ctx); err != nil {
		return false, err
	}
	p.usable = true
	return false, nil
}

// ensureRuntimeClass makes the class that pods get again if somebody deleted it:
// without it none would start.
func (p *pass) ensureRuntimeClass(ctx context.Context) error {
	err := p.client.Get(ctx, client.ObjectKey{Name: runtimeclass.Name}, &nodev1.RuntimeClass{})
	if !apierrors.IsNotFound(err) {
		return err
	}
	class := &nodev1.RuntimeClass{
		ObjectMeta: metav1.ObjectMeta{Name: runtimeclass.Name}, Handler: runtimeclass.Name,
		Overhead: &nodev1.Overhead{PodFixed: runtimeclass.Default.List()},
	}
	if err := p.client.Create(ctx, class); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	return nil
}

func (p *pass) checkAccess() error {
	_, err := subjectsOf(p.ns.Spec.Access, "", p.sup.Spec.SSODomain)
	return err
}

// syncQuotas applies quotas and defaults, and mends or adopts what somebody
// edited.
func (p *pass) syncQuotas(ctx context.Context) (changed bool, err error) {
	name, keep := p.ns.Name, p.ns.Spec.DriftPolicy.Quota == v1alpha1.Adopt
	spec := p.ns.Spec.DeepCopy()
	var edits []*edit
	quota, err := p.applyQuota(ctx, quotaName(name), quotaHard(&p.ns.Spec), keep)
	if err != nil {
		return false, err
	}
	if quota != nil {
		edits = append(edits, quota)
		adoptQuota(spec, quota.hard)
	}
	storage, err := p.applyQuota(ctx, storageQuotaName(name), storageHard(&p.ns.Spec), keep)
	if err != nil {
		return false, err
	}
	if storage != nil {
		edits = append(edits, storage)
		adoptStorageQuota(spec, storage.hard)
	}
	limits, err := p.applyLimitRange(ctx, limitRangeItem(p.ns.Spec.ContainerDefaults), keep)
	if err != nil {
		return false, err
	}
	if limits != nil {
		edits = append(edits, limits)
		adoptLimitRange(spec, limits.items)
	}
	if equality.Semantic.DeepEqual(spec, &p.ns.Spec) {
		return false, nil // what a spec cannot say stays as it is
	}
	for _, e := range edits {
		if err := p.edited(ctx, e, "taken into the spec", "adopted"); err != nil {
			return false, err
		}
	}
	p.ns.Spec = *spec
	return true, p.update(ctx)
}

// edited tells of an edit on both sides.
func (p *pass) edited(ctx context.Context, e *edit, outcome, done string) error {
	fresh, err := p.tell(ctx, v1alpha1.ReasonQuotaEdited, "somebody set "+e.object+" to "+e.was+": "+outcome)
	if fresh {
		p.metrics.drifted("quota", done)
	}
	return err
}

// adoptQuota takes compute limits and object counts out of a quota; the rest of
// it is left alone.
func adoptQuota(spec *v1alpha1.SupervisorNamespaceSpec, hard corev1.ResourceList) {
	if q, ok := hard[corev1.ResourceLimitsCPU]; ok {
		if spec.CPU == nil {
			spec.CPU = &v1alpha1.CPUAllocation{}
		}
		spec.CPU.Limit = adopted(spec.CPU.Limit, q)
	} else if spec.CPU != nil {
		spec.CPU.Limit = nil
	}
	if q, ok := hard[corev1.ResourceLimitsMemory]; ok {
		if spec.Memory == nil {
			spec.Memory = &v1alpha1.MemoryAllocation{}
		}
		spec.Memory.Limit = adopted(spec.Memory.Limit, q)
	} else if spec.Memory != nil {
		spec.Memory.Limit = nil
	}
	counts := v1alpha1.ObjectCounts{}
	any := false
	for _, c := range counted {
		if q, ok := hard[c.name]; ok {
			n := q.Value()
			*c.field(&counts), any = &n, true
		}
	}
	if any {
		spec.ObjectCounts = &counts
	} else {
		spec.ObjectCounts = nil
	}
}

// adopted keeps the old quantity if it is the same amount.
func adopted(old *resource.Quantity, q resource.Quantity) *resource.Quantity {
	if old != nil && old.Cmp(q) == 0 {
		return old
	}
	return &q
}

func adoptStorageQuota(spec *v1alpha1.SupervisorNamespaceSpec, hard corev1.ResourceList) {
	for i := range spec.StoragePolicies {
		p := &spec.StoragePolicies[i]
		if q, ok := hard[storageKey(p.Name)]; ok {
			p.Limit = adopted(p.Limit, q)
		} else {
			p.Limit = nil
		}
	}
}

func adoptLimitRange(spec *v1alpha1.SupervisorNamespaceSpec, items []corev1.LimitRangeItem) {
	if len(items) == 0 {
		spec.ContainerDefaults = nil
		return
	}
	old := spec.ContainerDefaults
	if old == nil {
		old = &v1alpha1.ContainerDefaults{}
	}
	pick := func(old *resource.Quantity, list corev1.ResourceList, name corev1.ResourceName, unless corev1.ResourceList) *resource.Quantity {
		q, ok := list[name]
		if !ok {
			return nil
		}
		// A request that follows from the limit is not one of the spec's.
		if l, ok := unless[name]; ok && old == nil && l.Cmp(q) == 0 {
			return nil
		}
		return adopted(old, q)
	}
	i := items[0]
	spec.ContainerDefaults = &v1alpha1.ContainerDefaults{
		CPULimit: pick(old.CPULimit, i.Default, corev1.ResourceCPU, nil), MemoryLimit: pick(old.MemoryLimit, i.Default, corev1.ResourceMemory, nil),
		CPURequest:    pick(old.CPURequest, i.DefaultRequest, corev1.ResourceCPU, i.Default),
		MemoryRequest: pick(old.MemoryRequest, i.DefaultRequest, corev1.ResourceMemory, i.Default),
	}
	if *spec.ContainerDefaults == (v1alpha1.ContainerDefaults{}) {
		spec.ContainerDefaults = nil
	}
}
