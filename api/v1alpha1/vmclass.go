package v1alpha1

import (
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// VirtualMachineClass is a size of VMs that namespaces may be allowed.
//
// +kubebuilder:object:root=true
// +kubebuilder:resource:scope=Cluster,shortName=vmclass,categories=atoll,path=virtualmachineclasses
// +kubebuilder:printcolumn:name="CPUs",type=integer,JSONPath=`.spec.cpus`
// +kubebuilder:printcolumn:name="Memory",type=string,JSONPath=`.spec.memory`
// +kubebuilder:printcolumn:name="CPU-Reserved",type=integer,priority=1,JSONPath=`.spec.cpuReservationPercent`
// +kubebuilder:printcolumn:name="Memory-Reserved",type=integer,priority=1,JSONPath=`.spec.memoryReservationPercent`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="size(self.metadata.name) <= 63",message="the name becomes a label's value: at most 63 characters"
type VirtualMachineClass struct {
	metav1.TypeMeta `json:",inline"`
	// +optional
	metav1.ObjectMeta `json:"metadata,omitempty"`

	// +required
	Spec VirtualMachineClassSpec `json:"spec"`
}

// VirtualMachineClassList is a list of VirtualMachineClasses.
//
// +kubebuilder:object:root=true
type VirtualMachineClassList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []VirtualMachineClass `json:"items"`
}

// VirtualMachineClassSpec is the size.
//
// +kubebuilder:validation:XValidation:rule="quantity(string(self.memory)).compareTo(quantity('4Mi')) >= 0",message="memory must be at least 4Mi"
type VirtualMachineClassSpec struct {
	// Description for people.
	//
	// +kubebuilder:validation:MaxLength=1024
	// +optional
	Description string `json:"description,omitempty"`
	// CPUs of the VM. Example: 2
	//
	// +kubebuilder:validation:Minimum=1
	// +kubebuilder:validation:Maximum=768
	CPUs int32 `json:"cpus"`
	// Memory of the VM. Example: 4Gi
	Memory resource.Quantity `json:"memory"`
	// CPUReservationPercent and MemoryReservationPercent of that is guaranteed.
	// Example: 100
	//
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100
	// +optional
	CPUReservationPercent int32 `json:"cpuReservationPercent,omitempty"`
	// +kubebuilder:validation:Minimum=0
	// +kubebuilder:validation:Maximum=100
	// +optional
	MemoryReservationPercent int32 `json:"memoryReservationPercent,omitempty"`
}
