package v1alpha1

// Annotations of a Namespace that admission policies read when a pod or a
// claim is made in it. The controller of SupervisorNamespaces writes them from
// the namespace's spec; a Namespace without one of them is not limited in that
// respect.
const (
	// NamespaceZonesAnnotation is a comma-separated list of zones: pods go only
	// to nodes whose label topology.kubernetes.io/zone is one of them.
	NamespaceZonesAnnotation = "atoll.dev/zones"
	// NamespaceVMClassesAnnotation is a comma-separated list of VM classes. A
	// pod that names one by PodVMClassLabel must name one of these.
	NamespaceVMClassesAnnotation = "atoll.dev/vm-classes"
	// NamespaceMaxPodCPUAnnotation and NamespaceMaxPodMemoryAnnotation are the
	// most that one pod may have, as quantities, and
	// NamespaceMaxPodReasonAnnotation says where they come from, for messages:
	// "the namespace's memory limit", "the largest VM class, best-effort-large".
	NamespaceMaxPodCPUAnnotation    = "atoll.dev/max-pod-cpu"
	NamespaceMaxPodMemoryAnnotation = "atoll.dev/max-pod-memory"
	NamespaceMaxPodReasonAnnotation = "atoll.dev/max-pod-reason"
	// NamespaceStorageClassesAnnotation is a comma-separated list of the
	// StorageClasses that claims may use; empty: none.
	NamespaceStorageClassesAnnotation = "atoll.dev/storage-classes"
)

// NodeVMClassLabelPrefix and the name of a VM class are a Node's label: with
// any value, pods of that class may go there.
const NodeVMClassLabelPrefix = "vmclass.atoll.dev/"

// PodVMClassLabel is the label of a Pod that asks for a VM class.
const PodVMClassLabel = "atoll.dev/vm-class"
