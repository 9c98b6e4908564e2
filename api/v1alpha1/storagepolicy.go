package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// StoragePolicy is a storage policy of vCenter, read from there: Atoll makes,
// updates and deletes these objects, nobody else. Its name is the policy's,
// made safe for Kubernetes ("vSAN Default Storage Policy" becomes
// vsan-default-storage-policy; where two become the same, the later gets a dash
// and the first characters of its id), and stays when the policy is renamed.
// The StorageClass of the same name uses it.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=spol,categories=atoll,path=storagepolicies
// +kubebuilder:subresource:status
// +kubebuilder:printcolumn:name="Policy",type=string,JSONPath=`.status.policyName`
// +kubebuilder:printcolumn:name="Ready",type=string,JSONPath=`.status.conditions[?(@.type=="Ready")].status`
// +kubebuilder:printcolumn:name="Capacity",type=string,JSONPath=`.status.capacity`
// +kubebuilder:printcolumn:name="Free",type=string,JSONPath=`.status.free`
// +kubebuilder:printcolumn:name="ID",type=string,priority=1,JSONPath=`.spec.id`
// +kubebuilder:printcolumn:name="Datastores",type=string,priority=1,JSONPath=`.status.datastores[*].name`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type StoragePolicy struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec StoragePolicySpec `json:"spec"`
	// +optional
	Status StoragePolicyStatus `json:"status,omitempty"`
}

// StoragePolicyList is a list of StoragePolicies.
//
// +kubebuilder:object:root=true
type StoragePolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []StoragePolicy `json:"items"`
}

// StoragePolicySpec is which policy.
type StoragePolicySpec struct {
	// ID of the policy in vCenter.
	//
	// Example: aa6d5a82-1c88-45da-85d3-3d74b91a5bad
	//
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="id cannot be changed: it is another policy then"
	ID string `json:"id"`
}

// StoragePolicyStatus is what vCenter says about it.
type StoragePolicyStatus struct {
	// Conditions: Ready is false when the policy is gone from vCenter
	// (StoragePolicyGone) or fits no datastore (NoCompatibleDatastore).
	//
	// +listType=map
	// +listMapKey=type
	// +optional
	Conditions []metav1.Condition `json:"conditions,omitempty"`
	// PolicyName is its name in vCenter. Example: vSAN Default Storage Policy
	//
	// +optional
	PolicyName string `json:"policyName,omitempty"`
	// +optional
	Description string `json:"description,omitempty"`
	// Datastores that fit it.
	//
	// +listType=map
	// +listMapKey=id
	// +optional
	Datastores []DatastoreStatus `json:"datastores,omitempty"`
	// Capacity and Free are the sums over Datastores.
	//
	// +optional
	Capacity *resource.Quantity `json:"capacity,omitempty"`
	// +optional
	Free *resource.Quantity `json:"free,omitempty"`
}

// DatastoreStatus is a datastore of vCenter.
type DatastoreStatus struct {
	// ID is the managed object id. Example: datastore-12
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Capacity resource.Quantity `json:"capacity"`
	Free     resource.Quantity `json:"free"`
}
