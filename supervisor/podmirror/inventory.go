// Package podmirror shows pods' VMs that run on KVM nodes in a vCenter
// inventory, where vSphere's client and govc list, find and describe them, and
// passes power operations on such a mirror on to the pod.
//
// The Pod is the truth and a mirror is a picture of it: what it shows comes
// from the Pod and from the annotations that the pod's node wrote on it
// (v1alpha1.PodVMAnnotations). A pod whose node has not named its VM has no
// mirror, nor has one whose namespace has no resource pool.
package podmirror

import (
	"context"
	"net/netip"
)

// An Inventory is the vCenter that shows mirrors. Errors wrap errdefs classes.
// Its methods may be called side by side, for one UUID one at a time.
type Inventory interface {
	// Mirror has the inventory show vm as it is now. It is idempotent on
	// VM.UUID: what is there already is changed, never doubled.
	Mirror(ctx context.Context, vm VM) (Ref, error)
	// Unmirror takes a mirror away; one that is not there is taken away already.
	// It touches no VM that is not a mirror.
	Unmirror(ctx context.Context, uuid string) error
	// Mirrored returns the UUIDs of all mirrors that are there, whoever made
	// them.
	Mirrored(ctx context.Context) ([]string, error)
}

// A Ref is a mirror's name in the inventory.
type Ref struct {
	MoID    string // managed object id, "vm-445"
	VCenter string // the inventory's instance UUID
}

// A VM is what a mirror shows: plain data.
type VM struct {
	// UUID is the instance UUID, the Pod's PodVMUUIDAnnotation.
	UUID string
	// Name is unique in the folder: the pod's, shortened if it is longer than
	// vSphere allows.
	Name   string
	CPUs   int
	Memory int64 // bytes
	On     bool
	// IP is the pod's; invalid while it has none.
	IP netip.Addr
	// Host is the Node's name.
	Host string
	// Pool and Folder are the namespace's, as managed object ids.
	Pool, Folder string
	// Annotations are shown as the VM's extra configuration: those of the Pod
	// that name its VM, and AnnotationPod and the like.
	Annotations map[string]string
	// Notes is a line for people.
	Notes string
}

// Keys of VM.Annotations, beside those of the Pod.
const (
	AnnotationPod       = "atoll.pod"       // "<namespace>/<name>"
	AnnotationPodUID    = "atoll.pod.uid"   // metadata.uid
	AnnotationPodPhase  = "atoll.pod.phase" // status.phase
	AnnotationCreatedBy = "atoll.managed-by"
)

// A PowerOp is what somebody asks of a mirror in the inventory.
type PowerOp string

// Power operations.
const (
	PowerOn       PowerOp = "on"
	PowerOff      PowerOp = "off"
	PowerReset    PowerOp = "reset"
	PowerSuspend  PowerOp = "suspend"
	GuestShutdown PowerOp = "shutdown"
	GuestReboot   PowerOp = "reboot"
)
