// Package v1alpha1 holds Atoll's API types of group atoll.dev: the
// configuration files of its programs, and the objects by which a cluster's
// namespaces are tied to vSphere (Supervisor, SupervisorNamespace,
// StoragePolicy, VirtualMachineClass, NamespaceTemplate).
//
// +groupName=atoll.dev
// +kubebuilder:object:generate=true
package v1alpha1

import (
	"embed"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

//go:generate go run sigs.k8s.io/controller-tools/cmd/controller-gen@v0.21.0 object crd paths=. output:crd:dir=crds

// GroupVersion of every type in this package.
const GroupVersion = "atoll.dev/v1alpha1"

// Group of every object in this package.
const Group = "atoll.dev"

// SchemeGroupVersion is GroupVersion for clients.
var SchemeGroupVersion = schema.GroupVersion{Group: Group, Version: "v1alpha1"}

// CRDs holds the CustomResourceDefinitions, one a file of crds/, as
// controller-gen makes them from this package.
//
//go:embed crds/*.yaml
var CRDs embed.FS

// AddToScheme makes a client know the objects of this package.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(SchemeGroupVersion,
		&Supervisor{}, &SupervisorList{},
		&SupervisorNamespace{}, &SupervisorNamespaceList{},
		&StoragePolicy{}, &StoragePolicyList{},
		&VirtualMachineClass{}, &VirtualMachineClassList{},
		&NamespaceTemplate{}, &NamespaceTemplateList{},
	)
	metav1.AddToGroupVersion(s, SchemeGroupVersion)
	return nil
}

// Resource is the group's resource of that plural name, for errors.
func Resource(plural string) schema.GroupResource {
	return SchemeGroupVersion.WithResource(plural).GroupResource()
}
