package namespaces

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// Names of what a namespace gets.
const (
	bindingPrefix = "atoll:" // and the role
	ownerRole     = "atoll:namespace-owner"

	// annotationApplied is on quotas and the LimitRange: what we wrote last, by
	// which an edit of somebody else's is told from a change of the spec.
	annotationApplied = "atoll.dev/applied"
)

func quotaName(ns string) string        { return ns }
func storageQuotaName(ns string) string { return ns + "-storagequota" }
func limitRangeName(ns string) string   { return ns }

// counted maps object counts to what a ResourceQuota calls them. Their order is
// that of the spec.
var counted = []struct {
	name  corev1.ResourceName
	field func(*v1alpha1.ObjectCounts) **int64
}{
	{"pods", func(c *v1alpha1.ObjectCounts) **int64 { return &c.Pods }},
	{"services", func(c *v1alpha1.ObjectCounts) **int64 { return &c.Services }},
	{"configmaps", func(c *v1alpha1.ObjectCounts) **int64 { return &c.ConfigMaps }},
	{"secrets", func(c *v1alpha1.ObjectCounts) **int64 { return &c.Secrets }},
	{"persistentvolumeclaims", func(c *v1alpha1.ObjectCounts) **int64 { return &c.PersistentVolumeClaims }},
	{"replicationcontrollers", func(c *v1alpha1.ObjectCounts) **int64 { return &c.ReplicationControllers }},
	{"count/deployments.apps", func(c *v1alpha1.ObjectCounts) **int64 { return &c.Deployments }},
	{"count/replicasets.apps", func(c *v1alpha1.ObjectCounts) **int64 { return &c.ReplicaSets }},
	{"count/statefulsets.apps", func(c *v1alpha1.ObjectCounts) **int64 { return &c.StatefulSets }},
	{"count/daemonsets.apps", func(c *v1alpha1.ObjectCounts) **int64 { return &c.DaemonSets }},
	{"count/jobs.batch", func(c *v1alpha1.ObjectCounts) **int64 { return &c.Jobs }},
	{"count/cronjobs.batch", func(c *v1alpha1.ObjectCounts) **int64 { return &c.CronJobs }},
}

// quotaHard is the quota of compute and object counts.
func quotaHard(spec *v1alpha1.SupervisorNamespaceSpec) corev1.ResourceList {
	hard := corev1.ResourceList{}
	if spec.CPU != nil && spec.CPU.Limit != nil {
		hard[corev1.ResourceLimitsCPU] = *spec.CPU.Limit
	}
	if spec.Memory != nil && spec.Memory.Limit != nil {
		hard[corev1.ResourceLimitsMemory] = *spec.Memory.Limit
	}
	if spec.ObjectCounts != nil {
		counts := *spec.ObjectCounts
		for _, c := range counted {
			if n := *c.field(&counts); n != nil {
				hard[c.name] = *resource.NewQuantity(*n, resource.DecimalSI)
			}
		}
	}
	return hard
}

// storageKey is how a quota names the claims of one StorageClass.
func storageKey(class string) corev1.ResourceName {
	return corev1.ResourceName(class + ".storageclass.storage.k8s.io/requests.storage")
}

// storageHard is the quota a storage policy.
func storageHard(spec *v1alpha1.SupervisorNamespaceSpec) corev1.ResourceList {
	hard := corev1.ResourceList{}
	for _, p := range spec.StoragePolicies {
		if p.Limit != nil {
			hard[storageKey(p.Name)] = *p.Limit
		}
	}
	return hard
}

// limitRangeItem has the defaults of containers; nil for none.
func limitRangeItem(d *v1alpha1.ContainerDefaults) *corev1.LimitRangeItem {
	if d == nil {
		return nil
	}
	item := &corev1.LimitRangeItem{Type: corev1.LimitTypeContainer}
	set := func(list *corev1.ResourceList, name corev1.ResourceName, q *resource.Quantity) {
		if q == nil {
			return
		}
		if *list == nil {
			*list = corev1.ResourceList{}
		}
		(*list)[name] = *q
	}
	set(&item.Default, corev1.ResourceCPU, d.CPULimit)
	set(&item.Default, corev1.ResourceMemory, d.MemoryLimit)
	set(&item.DefaultRequest, corev1.ResourceCPU, d.CPURequest)
	set(&item.DefaultRequest, corev1.ResourceMemory, d.MemoryRequest)
	// The API server takes an absent default request from the limit: written
	// down, so that what is there is what we want.
	for name, q := range item.Default {
		if _, ok := item.DefaultRequest[name]; !ok {
			set(&item.DefaultRequest, name, &q)
		}
	}
	if item.Default == nil && item.DefaultRequest == nil {
		return nil
	}
	return item
}

// roleRefs are the ClusterRoles of the access list's roles.
var roleRefs = []struct {
	role        v1alpha1.AccessRole
	clusterRole string
}{
	{v1alpha1.RoleOwner, ownerRole},
	{v1alpha1.RoleEdit, "edit"},
	{v1alpha1.RoleView, "view"},
}

// subjectsOf are the access list's subjects of one role, in its order.
func subjectsOf(entries []v1alpha1.AccessEntry, role v1alpha1.AccessRole, ssoDomain string) ([]rbacv1.Subject, error) {
	var out []rbacv1.Subject
	for _, e := range entries {
		s, err := newSubject(e.Kind, e.Name, e.Domain, ssoDomain)
		if err != nil {
			return nil, err
		}
		if e.Role == role {
			out = append(out, rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: s.kind, Name: s.name})
		}
	}
	return out, nil
}

// objectMeta of what a namespace gets.
func objectMeta(ns, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{v1alpha1.LabelNamespace: ns}}
}

// namespaceAnnotations of the Kubernetes Namespace. A value of nil takes one
// away.
func namespaceAnnotations(ns *v1alpha1.SupervisorNamespace, classes []v1alpha1.VirtualMachineClass) map[string]*string {
	text := func(s string) *string { return &s }
	st := &ns.Status
	out := map[string]*string{
		v1alpha1.AnnotationPool: nil, v1alpha1.AnnotationFolder: nil, v1alpha1.AnnotationZones: nil,
		v1alpha1.AnnotationVMClasses: nil, v1alpha1.AnnotationVMClassSizes: nil, v1alpha1.AnnotationSelfService: nil,
		v1alpha1.AnnotationCPULimit: text(""), v1alpha1.AnnotationMemoryLimit: text(""),
	}
	if len(st.Pools) > 0 {
		out[v1alpha1.AnnotationPool] = text(st.Pools[0].ID)
	}
	if st.Folder != nil {
		out[v1alpha1.AnnotationFolder] = text(st.Folder.ID)
	}
	if c := ns.Spec.CPU; c != nil && c.Limit != nil {
		out[v1alpha1.AnnotationCPULimit] = text(strconv.FormatFloat(c.Limit.AsApproximateFloat64(), 'f', 4, 64))
	}
	if m := ns.Spec.Memory; m != nil && m.Limit != nil {
		out[v1alpha1.AnnotationMemoryLimit] = text(fmt.Sprintf("%dMi", toMiB(m.Limit)))
	}
	if len(ns.Spec.Zones) > 0 {
		out[v1alpha1.AnnotationZones] = text(strings.Join(ns.Spec.Zones, ","))
	}
	if len(ns.Spec.VMClasses) > 0 {
		var names, sizes []string
		for _, c := range classes {
			names = append(names, c.Name)
			sizes = append(sizes, fmt.Sprintf("%s=%d/%s", c.Name, c.Spec.CPUs, c.Spec.Memory.String()))
		}
		out[v1alpha1.AnnotationVMClasses] = text(strings.Join(names, ","))
		out[v1alpha1.AnnotationVMClassSizes] = text(strings.Join(sizes, ","))
	}
	var storage []string
	for _, p := range ns.Spec.StoragePolicies {
		storage = append(storage, p.Name)
	}
	slices.Sort(storage)
	out[v1alpha1.AnnotationStorageClasses] = text(strings.Join(storage, ","))
	if ns.Labels[v1alpha1.LabelTemplate] != "" {
		out[v1alpha1.AnnotationSelfService] = text("true")
	}
	return out
}
