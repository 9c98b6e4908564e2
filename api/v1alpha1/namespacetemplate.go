package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// NamespaceTemplate lets developers make namespaces of their own: while it is
// active, `kubectl create namespace` by one of its users makes a
// SupervisorNamespace with these settings, in which the user is an owner.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=nstemplate,categories=atoll
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Active",type=boolean,JSONPath=`.spec.active`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="CPU",type=string,JSONPath=`.spec.settings.cpu.limit`
// +kubebuilder:printcolumn:name="Memory",type=string,JSONPath=`.spec.settings.memory.limit`
// +kubebuilder:printcolumn:name="Namespaces",type=integer,JSONPath=`.status.namespaces`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 63",message="the name becomes a label's value: at most 63 characters"
type NamespaceTemplate struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec NamespaceTemplateSpec `json:"spec"`
	// +optional
	Status NamespaceTemplateStatus `json:"status,omitempty"`
}

// NamespaceTemplateList is a list of NamespaceTemplates.
//
// +kubebuilder:object:root=true
type NamespaceTemplateList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []NamespaceTemplate `json:"items"`
}

// NamespaceTemplateSpec says who may make namespaces, and which.
type NamespaceTemplateSpec struct {
	// Active templates are used; the others wait.
	//
	// +kubebuilder:default=true
	// +optional
	Active *bool `json:"active,omitempty"`
	// AllowedUsers may make namespaces from it. Where several active templates
	// allow a user, the first by name is used, unless the namespace's label
	// atoll.dev/namespace-template names another.
	//
	// Example: [{kind: Group, name: developers}]
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=128
	// +listType=atomic
	AllowedUsers []TemplateSubject `json:"allowedUsers"`
	// MaxNamespacesPerUser is how many namespaces made from it one user may have
	// at a time; without it there is no limit.
	//
	// +kubebuilder:validation:Minimum=1
	// +optional
	MaxNamespacesPerUser *int32 `json:"maxNamespacesPerUser,omitempty"`
	// Zones of the namespaces, as SupervisorNamespace has them.
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	// +optional
	Zones []string `json:"zones,omitempty"`
	// Settings of the namespaces. A template that changes leaves those that are
	// there as they are.
	//
	// +kubebuilder:default={}
	// +optional
	Settings NamespaceSettings `json:"settings"`
}

// TemplateSubject is a user or group of vSphere SSO, or of Kubernetes alone.
type TemplateSubject struct {
	// +kubebuilder:validation:Enum=User;Group
	Kind SubjectKind `json:"kind"`
	// Name without the domain. Example: developers
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	Name string `json:"name"`
	// Domain of vSphere SSO; "" stands for the Supervisor's ssoDomain, and "-"
	// for a user or group of Kubernetes that vSphere does not know, such as one
	// of a client certificate.
	//
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:default=""
	// +optional
	Domain string `json:"domain"`
}

// NamespaceTemplateStatus is what became of it.
type NamespaceTemplateStatus struct {
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions: Ready is false while the settings name what there is not.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Namespaces counts those that were made from it.
	//
	// +optional
	Namespaces int32 `json:"namespaces,omitempty"`
}
