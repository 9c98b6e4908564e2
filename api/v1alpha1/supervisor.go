package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Supervisor ties this cluster to the part of a vCenter that its namespaces
// live in. There is one, named "default".
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=sv,categories=atoll
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="vCenter",type=string,JSONPath=`.spec.vCenter.server`
// +kubebuilder:printcolumn:name="Connected",type=string,JSONPath=`.status.conditions[?(@.type=="Connected")].status`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].reason`
// +kubebuilder:printcolumn:name="Namespaces",type=integer,JSONPath=`.status.namespaces`
// +kubebuilder:printcolumn:name="Zones",type=string,priority=1,JSONPath=`.status.zones[*].name`
// +kubebuilder:printcolumn:name="Version",type=string,priority=1,JSONPath=`.status.vCenter.version`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name == 'default'",message="a cluster has one Supervisor: name it default"
type Supervisor struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec SupervisorSpec `json:"spec"`
	// +optional
	Status SupervisorStatus `json:"status,omitempty"`
}

// SupervisorList is a list of Supervisors.
//
// +kubebuilder:object:root=true
type SupervisorList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Supervisor `json:"items"`
}

// SupervisorSpec says which vCenter, and where in it.
type SupervisorSpec struct {
	// VCenter is how vCenter is reached.
	VCenter VCenter `json:"vCenter"`
	// Zones are the clusters that pods may run in: one, or several, when each
	// namespace gets a resource pool in each of its zones. A zone's name is what
	// nodes carry as topology.kubernetes.io/zone. All are in one datacenter.
	// A namespace's pool in a zone that is taken away goes when it is empty.
	//
	// Example: [{name: zone-a, cluster: DC0_C0}]
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +listType=map
	// +listMapKey=name
	Zones []Zone `json:"zones"`
	// ParentPool is the resource pool, right below each cluster's root pool,
	// that holds the namespaces' pools. It is made when it is missing, with an
	// expandable reservation and normal shares, and never deleted.
	//
	// +kubebuilder:default=Namespaces
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=80
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="parentPool cannot be changed: pools of namespaces are in it"
	// +kubebuilder:validation:XValidation:rule="!self.contains('/')",message="parentPool is a name, not a path: leave out the slash"
	// +optional
	ParentPool string `json:"parentPool,omitempty"`
	// Folder is the VM folder, right below the datacenter's, that holds the
	// namespaces' folders. It is made when it is missing and never deleted.
	//
	// +kubebuilder:default=Namespaces
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=80
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="folder cannot be changed: folders of namespaces are in it"
	// +kubebuilder:validation:XValidation:rule="!self.contains('/')",message="folder is a name, not a path: leave out the slash"
	// +optional
	Folder string `json:"folder,omitempty"`
	// Datastores that storage policies may place disks on, by name. Default: all
	// datastores of the clusters.
	//
	// Example: [LocalDS_0]
	//
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=80
	// +listType=set
	// +optional
	Datastores []string `json:"datastores,omitempty"`
	// SSODomain is the domain of users and groups in access lists that name none.
	//
	// +kubebuilder:default="vsphere.local"
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$`
	// +kubebuilder:validation:MaxLength=253
	// +optional
	SSODomain string `json:"ssoDomain,omitempty"`
	// PolicyPollSeconds is how often storage policies are read: vCenter has no
	// watch for them.
	//
	// +kubebuilder:default=300
	// +kubebuilder:validation:Minimum=10
	// +kubebuilder:validation:Maximum=86400
	// +optional
	PolicyPollSeconds int32 `json:"policyPollSeconds,omitempty"`
	// PlainNamespaces says what becomes of a Kubernetes namespace that no
	// SupervisorNamespace and no active NamespaceTemplate stands for: Allow (it
	// is left alone) or Refuse. Namespaces that are there already, those of
	// Kubernetes itself, and those that system:masters makes are always left
	// alone.
	//
	// +kubebuilder:validation:Enum=Allow;Refuse
	// +kubebuilder:default=Allow
	// +optional
	PlainNamespaces PlainNamespaces `json:"plainNamespaces,omitempty"`
}

// PlainNamespaces is Allow or Refuse.
type PlainNamespaces string

// Values of PlainNamespaces.
const (
	AllowPlainNamespaces  PlainNamespaces = "Allow"
	RefusePlainNamespaces PlainNamespaces = "Refuse"
)

// VCenter is how vCenter is reached and verified. Its certificate must be
// signed by an authority of the host's, by one of caBundle, or have the
// thumbprint: there is no way not to look.
//
// +kubebuilder:validation:XValidation:rule="!(has(self.caBundle) && has(self.thumbprint))",message="give caBundle or thumbprint, not both"
type VCenter struct {
	// Server is vCenter's host name or address, with a port if it is not 443.
	//
	// Example: vcenter.example.com
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=261
	// +kubebuilder:validation:XValidation:rule="!self.contains('/') && !self.contains('@')",message="server is host or host:port: leave out https:// and any path or user"
	Server string `json:"server"`
	// CredentialsSecret is a Secret with the keys username and password, of a
	// vCenter user that has the role in deploy/. It is read at each login. Atoll
	// may read kube-system/vcenter; for another, let the user atoll:namespaces get
	// it by a Role and a RoleBinding.
	//
	// +kubebuilder:default={}
	// +optional
	CredentialsSecret SecretReference `json:"credentialsSecret,omitempty"`
	// CABundle is the authority that signed vCenter's certificate, PEM in base64.
	//
	// +kubebuilder:validation:MaxLength=131072
	// +optional
	CABundle []byte `json:"caBundle,omitempty"`
	// Thumbprint is the SHA-256 of vCenter's certificate.
	//
	// Example: "5F:0C:…", 32 bytes in hex, with or without colons
	//
	// +kubebuilder:validation:Pattern=`^([0-9A-Fa-f]{2}:?){31}[0-9A-Fa-f]{2}$`
	// +kubebuilder:validation:MaxLength=95
	// +optional
	Thumbprint string `json:"thumbprint,omitempty"`
}

// SecretReference names a Secret.
type SecretReference struct {
	// +kubebuilder:default=kube-system
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +optional
	Namespace string `json:"namespace,omitempty"`
	// +kubebuilder:default=vcenter
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +optional
	Name string `json:"name,omitempty"`
}

// Zone is one cluster of vCenter.
type Zone struct {
	// Name of the zone.
	//
	// Example: zone-a
	//
	// +kubebuilder:validation:Pattern=`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`
	// +kubebuilder:validation:MaxLength=63
	Name string `json:"name"`
	// Cluster is the cluster's name, its inventory path if the name is not
	// unique, or its managed object id.
	//
	// Example: DC0_C0, /DC0/host/DC0_C0 or domain-c8
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=512
	Cluster string `json:"cluster"`
}

// SupervisorStatus is what was found at vCenter.
type SupervisorStatus struct {
	// ObservedGeneration is the generation of the spec that the rest is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions: Ready and Connected.
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// VCenter is who answered.
	//
	// +optional
	VCenter *VCenterStatus `json:"vCenter,omitempty"`
	// Zones as they were found.
	//
	// +listType=map
	// +listMapKey=name
	// +optional
	Zones []ZoneStatus `json:"zones,omitempty"`
	// Namespaces counts the SupervisorNamespaces.
	//
	// +optional
	Namespaces int32 `json:"namespaces,omitempty"`
}

// VCenterStatus is who answered.
type VCenterStatus struct {
	// Version and build. Example: "8.0.2 build-21457384"
	//
	// +optional
	Version string `json:"version,omitempty"`
	// InstanceUUID is vCenter's own.
	//
	// +optional
	InstanceUUID string `json:"instanceUUID,omitempty"`
}

// ZoneStatus is a cluster as it was found.
type ZoneStatus struct {
	Name string `json:"name"`
	// Cluster is the cluster's managed object id, and Path where it is in the
	// inventory.
	//
	// Example: domain-c8 and /DC0/host/DC0_C0
	Cluster string `json:"cluster"`
	// +optional
	Path string `json:"path,omitempty"`
	// ParentPool is its managed object id; absent until the first namespace is
	// made. Example: resgroup-41
	//
	// +optional
	ParentPool string `json:"parentPool,omitempty"`
	// Datacenter's name.
	//
	// +optional
	Datacenter string `json:"datacenter,omitempty"`
	// MHzPerCore is the clock of the hosts, on average over their cores: what
	// one core of a namespace's limit is worth in the resource pool.
	//
	// +optional
	MHzPerCore int64 `json:"mhzPerCore,omitempty"`
	// Hosts counts the cluster's hosts; CPU (cores) and Memory are their sum.
	//
	// +optional
	Hosts int32 `json:"hosts,omitempty"`
	// +optional
	CPU *resource.Quantity `json:"cpu,omitempty"`
	// +optional
	Memory *resource.Quantity `json:"memory,omitempty"`
}
