package controlplane

import (
	"context"
	"io"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apiserver/pkg/admission"
	genericoptions "k8s.io/apiserver/pkg/server/options"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// namespaceFinalizerPlugin is how the API server calls it, in its metrics and in
// --disable-admission-plugins.
const namespaceFinalizerPlugin = "AtollNamespaceFinalizer"

// addAdmission adds our own plugin to the API server's, as the first of those that
// change objects.
func addAdmission(o *genericoptions.AdmissionOptions) {
	o.Plugins.Register(namespaceFinalizerPlugin, func(io.Reader) (admission.Interface, error) {
		return namespaceFinalizer{admission.NewHandler(admission.Create)}, nil
	})
	// A copy: upstream's is one for all servers of the process.
	o.RecommendedPluginOrder = append([]string{namespaceFinalizerPlugin}, o.RecommendedPluginOrder...)
}

// A namespaceFinalizer has every SupervisorNamespace made with the finalizer that
// its controller would have to write, for all to see, before it makes anything in
// vSphere: a write less of three. The controller adds it to those that lack it.
//
// It is compiled in, since a MutatingAdmissionPolicy on custom resources refuses
// them, whatever its failurePolicy says, until the API server has learned their
// schema: for five seconds after each start.
type namespaceFinalizer struct{ *admission.Handler }

var _ admission.MutationInterface = namespaceFinalizer{}

// Admit is admission.MutationInterface's.
func (namespaceFinalizer) Admit(_ context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetResource().GroupResource() != v1alpha1.Resource("supervisornamespaces") || a.GetSubresource() != "" {
		return nil
	}
	o, err := meta.Accessor(a.GetObject())
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	if finalizers := o.GetFinalizers(); !slices.Contains(finalizers, v1alpha1.NamespaceFinalizer) {
		o.SetFinalizers(append(slices.Clip(finalizers), v1alpha1.NamespaceFinalizer))
	}
	return nil
}
