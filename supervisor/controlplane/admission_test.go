package controlplane

import (
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	apiserveroptions "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestNamespaceFinalizer(t *testing.T) {
	const other = "example.com/held"
	namespaces := v1alpha1.SchemeGroupVersion.WithResource("supervisornamespaces")
	for _, c := range []struct {
		name        string
		resource    schema.GroupVersionResource
		subresource string
		have, want  []string
	}{
		{"made without", namespaces, "", nil, []string{v1alpha1.NamespaceFinalizer}},
		{"made with another", namespaces, "", []string{other}, []string{other, v1alpha1.NamespaceFinalizer}},
		{"made with it", namespaces, "", []string{v1alpha1.NamespaceFinalizer, other}, []string{v1alpha1.NamespaceFinalizer, other}},
		{"a subresource", namespaces, "status", nil, nil},
		{"another kind", v1alpha1.SchemeGroupVersion.WithResource("supervisors"), "", nil, nil},
		{"another group", schema.GroupVersionResource{Group: "example.com", Version: "v1", Resource: "supervisornamespaces"}, "", nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := &unstructured.Unstructured{Object: map[string]any{}}
			o.SetFinalizers(c.have)
			a := admission.NewAttributesRecord(o, nil, schema.GroupVersionKind{}, "", "shop", c.resource, c.subresource, admission.Create, &metav1.CreateOptions{}, false, nil)
			if err := (namespaceFinalizer{}).Admit(t.Context(), a, nil); err != nil {
				t.Fatal(err)
			}
			if got := o.GetFinalizers(); !slices.Equal(got, c.want) {
				t.Errorf("finalizers %q, want %q", got, c.want)
			}
		})
	}
}

// The plugin is one of the API server's without a flag that says so, and upstream's
// list, which other servers of the process share, stays as it is.
func TestAddAdmission(t *testing.T) {
	upstream := slices.Clone(kubeoptions.AllOrderedPlugins)
	s := apiserveroptions.NewServerRunOptions()
	addAdmission(s.Admission.GenericAdmission)
	if errs := s.Admission.Validate(); len(errs) > 0 {
		t.Error(errs)
	}
	o := s.Admission.GenericAdmission
	if !slices.Contains(o.RecommendedPluginOrder, namespaceFinalizerPlugin) || o.DefaultOffPlugins.Has(namespaceFinalizerPlugin) || !slices.Contains(o.Plugins.Registered(), namespaceFinalizerPlugin) {
		t.Errorf("order %q, off %v", o.RecommendedPluginOrder, o.DefaultOffPlugins)
	}
	if !slices.Equal(kubeoptions.AllOrderedPlugins, upstream) {
		t.Error("upstream's list of plugins was changed")
	}
}
