package cluster

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A Namespace is a SupervisorNamespace: what it may use and does, and where it
// is in vSphere.
type Namespace struct {
	Name   string `json:"name"`
	Synced bool   `json:"synced"`
	// Reason why it is not Synced; empty if it is.
	Reason string `json:"reason,omitempty"`
	CPU    Share  `json:"cpu"`
	Memory Share  `json:"memory"`
	// Pools are ids of resource pools, one a zone.
	Pools []string `json:"pools"`
}

// A Share is use and limit; nil where there is no limit, or no use is known yet.
type Share struct {
	Used  *resource.Quantity `json:"used,omitempty"`
	Limit *resource.Quantity `json:"limit,omitempty"`
}

func namespaces(ctx context.Context, l Layout, s State) ([]Namespace, error) {
	fail := func(err error) ([]Namespace, error) {
		return []Namespace{}, fmt.Errorf("namespaces could not be listed: %w", err)
	}
	config, err := RESTConfig(l, s)
	if err != nil {
		return fail(err)
	}
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return fail(err)
	}
	list, err := client.Resource(v1alpha1.SchemeGroupVersion.WithResource("supervisornamespaces")).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fail(err)
	}
	all := make([]Namespace, 0, len(list.Items))
	for i := range list.Items {
		var ns v1alpha1.SupervisorNamespace
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(list.Items[i].Object, &ns); err != nil {
			return fail(err)
		}
		all = append(all, describeNamespace(&ns))
	}
	slices.SortFunc(all, func(a, b Namespace) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

func describeNamespace(ns *v1alpha1.SupervisorNamespace) Namespace {
	d := Namespace{Name: ns.Name, Pools: []string{}, Reason: "not looked at yet"}
	if c := meta.FindStatusCondition(ns.Status.Conditions, v1alpha1.ConditionSynced); c != nil {
		d.Synced, d.Reason = c.Status == metav1.ConditionTrue, c.Reason
	}
	if d.Synced {
		d.Reason = ""
	}
	if ns.Spec.CPU != nil {
		d.CPU.Limit = ns.Spec.CPU.Limit
	}
	if ns.Spec.Memory != nil {
		d.Memory.Limit = ns.Spec.Memory.Limit
	}
	if u := ns.Status.Usage; u != nil {
		d.CPU.Used, d.Memory.Used = u.CPU, u.Memory
	}
	for _, p := range ns.Status.Pools {
		d.Pools = append(d.Pools, p.ID)
	}
	return d
}
