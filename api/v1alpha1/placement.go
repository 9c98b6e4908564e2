package v1alpha1

// Annotations of a Namespace that admission policies read when a pod or a
// claim is made in it, beside AnnotationZones, AnnotationVMClasses,
// AnnotationCPULimit and AnnotationMemoryLimit. A Namespace without one of
// them is not limited in that respect. See supervisor/podpolicy.
const (
	// AnnotationVMClassSizes has the sizes of the namespace's VM classes: name,
	// "=", CPUs, "/", memory, separated by commas. A pod must fit into one of
	// them. Example: "best-effort-small=2/4Gi,guaranteed-large=4/16Gi".
	AnnotationVMClassSizes = "atoll.dev/vm-class-sizes"
	// AnnotationStorageClasses are the StorageClasses that claims may name,
	// separated by commas; "": none.
	AnnotationStorageClasses = "atoll.dev/storage-classes"
)

// LabelVMClass is the label of a Pod that asks for a VM class: one that its
// namespace has, into which the pod fits.
const LabelVMClass = "atoll.dev/vm-class"

// LabelNodeVMClass and the name of a VM class are a label of Nodes, with any
// value, to which pods that ask for that class may go.
const LabelNodeVMClass = "vmclass.atoll.dev/"

// LabelAccelerator is a label of Nodes that run pods as VMs of their own, "kvm"
// or "tcg": the node's agent sets it.
const LabelAccelerator = "atoll.dev/accelerator"
