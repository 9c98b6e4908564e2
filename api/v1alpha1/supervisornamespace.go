package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// SupervisorNamespace is a namespace on both sides: a Kubernetes Namespace with
// quotas, defaults, rights and storage classes, and resource pools (one a zone),
// a VM folder and permissions in vSphere. All bear its name. Deleting it ends
// its pods and VMs, and then takes away both sides.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=svns,categories=atoll
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Synced",type=string,JSONPath=`.status.conditions[?(@.type=="Synced")].status`
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.status.conditions[?(@.type=="Synced")].reason`
// +kubebuilder:printcolumn:name="CPU",type=string,JSONPath=`.spec.cpu.limit`
// +kubebuilder:printcolumn:name="Memory",type=string,JSONPath=`.spec.memory.limit`
// +kubebuilder:printcolumn:name="CPU-Used",type=string,priority=1,JSONPath=`.status.usage.cpu`
// +kubebuilder:printcolumn:name="Memory-Used",type=string,priority=1,JSONPath=`.status.usage.memory`
// +kubebuilder:printcolumn:name="Pods",type=integer,priority=1,JSONPath=`.status.usage.pods`
// +kubebuilder:printcolumn:name="Zones",type=string,priority=1,JSONPath=`.status.pools[*].zone`
// +kubebuilder:printcolumn:name="Pools",type=string,priority=1,JSONPath=`.status.pools[*].id`
// +kubebuilder:printcolumn:name="Folder",type=string,priority=1,JSONPath=`.status.folder.id`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 63 && self.metadata.name.matches('^[a-z0-9]([a-z0-9-]*[a-z0-9])?$')",message="the name becomes a namespace's: at most 63 lower-case letters, digits and dashes, without dots"
// +kubebuilder:validation:XValidation:rule="self.metadata.name != 'default' && !self.metadata.name.startsWith('kube-') && !self.metadata.name.startsWith('vmware-system-')",message="default, kube-… and vmware-system-… are the cluster's own namespaces: choose another name"
type SupervisorNamespace struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +kubebuilder:default={}
	// +optional
	Spec SupervisorNamespaceSpec `json:"spec"`
	// +optional
	Status SupervisorNamespaceStatus `json:"status,omitempty"`
}

// SupervisorNamespaceList is a list of SupervisorNamespaces.
//
// +kubebuilder:object:root=true
type SupervisorNamespaceList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []SupervisorNamespace `json:"items"`
}

// SupervisorNamespaceSpec is what an administrator decides.
//
// +kubebuilder:validation:XValidation:rule="!has(oldSelf.zones) || (has(self.zones) && oldSelf.zones.all(z, z in self.zones))",message="zones can be added but not taken away, since pods and volumes may be there: make another namespace instead"
// +kubebuilder:validation:XValidation:rule="has(oldSelf.zones) || !has(self.zones)",message="the namespace has all zones, and zones cannot be taken away: make another namespace instead"
type SupervisorNamespaceSpec struct {
	// Zones of the Supervisor that the namespace's pods may run in; without any,
	// all of them.
	//
	// Example: [zone-a, zone-b]
	//
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=16
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	// +listType=set
	// +optional
	Zones []string `json:"zones,omitempty"`

	NamespaceSettings `json:",inline"`
}

// SupervisorNamespaceStatus is what there is on both sides.
type SupervisorNamespaceStatus struct {
	// ObservedGeneration is the generation of the spec that the rest is about.
	//
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// Conditions: Ready (the namespace can be used) and Synced (both sides are as
	// the spec has it; else its reason says what is not).
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// Messages for people, the newest first, at most 10; each cause once.
	//
	// +kubebuilder:validation:MaxItems=10
	// +listType=atomic
	// +optional
	Messages []Message `json:"messages,omitempty"`
	// Pools in vSphere, one a zone, in the order of the Supervisor's zones.
	//
	// +listType=map
	// +listMapKey=zone
	// +optional
	Pools []PoolStatus `json:"pools,omitempty"`
	// Folder in vSphere.
	//
	// +optional
	Folder *FolderStatus `json:"folder,omitempty"`
	// Usage of pods and volumes, as quotas count it; with or without a quota.
	//
	// +optional
	Usage *Usage `json:"usage,omitempty"`
	// LastSynced is what both sides were last in step with: by it a change in
	// vSphere is told from one of the spec. It is absent while a change of the
	// spec is under way, so that whoever finds that half done finishes it.
	//
	// +optional
	LastSynced *LastSynced `json:"lastSynced,omitempty"`
	// Template that the namespace was made from.
	//
	// +optional
	Template string `json:"template,omitempty"`
}

// Message tells people what happened.
type Message struct {
	// +kubebuilder:validation:Enum=Info;Warning;Error
	Severity MessageSeverity `json:"severity"`
	// Reason is one of the conditions' reasons.
	Reason string `json:"reason"`
	// Text is a sentence that names the object and the cure.
	Text string      `json:"text"`
	Time metav1.Time `json:"time"`
}

// MessageSeverity is Info, Warning or Error.
type MessageSeverity string

// Values of MessageSeverity.
const (
	SeverityInfo    MessageSeverity = "Info"
	SeverityWarning MessageSeverity = "Warning"
	SeverityError   MessageSeverity = "Error"
)

// PoolStatus is a resource pool as vSphere has it.
type PoolStatus struct {
	Zone string `json:"zone"`
	// ID is the managed object id. Example: resgroup-42
	ID string `json:"id"`
	// Path in the inventory. Example: /DC0/host/DC0_C0/Resources/Namespaces/shop
	//
	// +optional
	Path string `json:"path,omitempty"`
	// CPU in MHz and Memory in MiB, as they were last in step with the spec.
	//
	// +optional
	CPU PoolAllocation `json:"cpu"`
	// +optional
	Memory PoolAllocation `json:"memory"`
}

// PoolAllocation is a share of a resource pool, as vSphere counts: in MHz or
// MiB.
type PoolAllocation struct {
	// Limit; -1 is none.
	Limit int64 `json:"limit"`
	// +optional
	Reservation int64 `json:"reservation"`
	// Shares are a level, or the number of level custom. Example: normal
	//
	// +optional
	Shares string `json:"shares,omitempty"`
	// Fixed reservations do not expand into the parent's.
	//
	// +optional
	Fixed bool `json:"fixed,omitempty"`
}

// FolderStatus is the VM folder as vSphere has it.
type FolderStatus struct {
	// ID is the managed object id. Example: group-v43
	ID string `json:"id"`
	// Path in the inventory. Example: /DC0/vm/Namespaces/shop
	//
	// +optional
	Path string `json:"path,omitempty"`
}

// Usage of the namespace, as quotas count it: what pods ask for, not what they
// burn. It is there whether or not a quota is.
type Usage struct {
	// CPU and Memory are the limits of all pods that have not ended, together;
	// what has no limit adds nothing.
	//
	// +optional
	CPU *resource.Quantity `json:"cpu,omitempty"`
	// +optional
	Memory *resource.Quantity `json:"memory,omitempty"`
	// Pods that have not ended.
	//
	// +optional
	Pods *int64 `json:"pods,omitempty"`
	// Storage that claims ask for, for each storage policy of the namespace.
	//
	// +listType=map
	// +listMapKey=policy
	// +optional
	Storage []StorageUsage `json:"storage,omitempty"`
}

// StorageUsage is the use of one storage policy.
type StorageUsage struct {
	// Policy is the StoragePolicy's name.
	Policy string `json:"policy"`
	// StorageClass by which it is used.
	StorageClass string            `json:"storageClass"`
	Used         resource.Quantity `json:"used"`
}

// LastSynced is what both sides were last in step with.
type LastSynced struct {
	Time metav1.Time `json:"time"`
	// Generation of the spec.
	Generation int64 `json:"generation"`
	// CPU and Memory as the spec had them.
	//
	// +optional
	CPU *CPUAllocation `json:"cpu,omitempty"`
	// +optional
	Memory *MemoryAllocation `json:"memory,omitempty"`
}
