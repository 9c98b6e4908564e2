package v1alpha1

// Annotations of a Pod that name its VM and what belongs to it. The names
// without a domain of Atoll's are those of vSphere Pods, by which vSphere's CSI
// driver and backup plug-ins find a pod's VM. They are written through the
// Pod's status, and only by the pod's node and the supervisor; an admission
// policy refuses everybody else.
const (
	// PodVMUUIDAnnotation is the VM's instance UUID. The first VM of a pod has
	// the pod's UID, later ones a UUID that follows from it and the attempt.
	PodVMUUIDAnnotation = "vmware-system-vm-uuid"
	// PodVMMoIDAnnotation is the VM's managed object in an inventory, a colon,
	// and the inventory's instance UUID: vm-445:5f0b….
	PodVMMoIDAnnotation = "vmware-system-vm-moid"
	// PodEphemeralDiskAnnotation is the UUID of the pod's writable disk.
	PodEphemeralDiskAnnotation = "vmware-system-ephemeral-disk-uuid"
	// PodImageReferencesAnnotation maps, in JSON, each container's name to the
	// image that it asks for.
	PodImageReferencesAnnotation = "vmware-system-image-references"
	// PodMACAnnotation is the address of the VM's network interface.
	PodMACAnnotation = "mac"
	// PodVMSizeAnnotation is a PodVMSize in JSON.
	PodVMSizeAnnotation = "atoll.dev/vm-size"
)

// PodVMAnnotations are all of the above.
func PodVMAnnotations() []string {
	return []string{PodVMUUIDAnnotation, PodVMMoIDAnnotation, PodEphemeralDiskAnnotation, PodImageReferencesAnnotation, PodMACAnnotation, PodVMSizeAnnotation}
}

// PodVMSize is how large a pod's VM is now.
type PodVMSize struct {
	CPUs int `json:"cpus"`
	// Memory is the VM's RAM in bytes.
	Memory int64 `json:"memory"`
}
