// Package podmirror shows pods' VMs that run on KVM nodes in a vCenter
// inventory, where vSphere's client and govc list, find and describe them, and
// passes power operations on such a mirror on to the pod.
//
// The Pod is the truth and a mirror is a picture of it: what it shows comes
// from the Pod and from the annotations that the pod's node wrote on it
// (api/v1alpha1, PodVMAnnotations). A pod whose node has not named its VM has no
// mirror.
package podmirror

import (
	"context"
)

// An Inventory is the vCenter that shows mirrors. Errors wrap errdefs classes.
// Its methods may be called side by side, but for one UUID one at a time.
type Inventory interface {
	// Mirror has the inventory show vm as it is now. It is idempotent on
	// VM.UUID: what is there already is changed, never doubled. It is
	// ErrFailedPrecondition while the namespace has no pool and folder there.
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

// Power is whether a VM runs.
type Power string

// Power states.
const (
	On  Power = "poweredOn"
	Off Power = "poweredOff"
)

// A VM is what a mirror shows: plain data.
type VM struct {
	// UUID is the instance UUID, the Pod's PodVMUUIDAnnotation.
	UUID string
	// PodUID, Namespace and Pod name the Pod; the VM has the pod's name, in the
	// namespace's pool and folder.
	PodUID, Namespace, Pod string
	CPUs                   int32
	MemoryMiB              int64
	Power                  Power
	// Host is the Node's name.
	Host string
	// HostName is the guest's own name.
	HostName string
	// Addresses are the pod's, the one that counts first; none while it has
	// none.
	Addresses []string
	// MAC is that of its interface, as net.HardwareAddr prints it; may be empty.
	MAC string
	// DiskUUID is that of its writable disk; may be empty.
	DiskUUID string
	// Annotations are shown with the VM, as extraConfig: those of the Pod that
	// name its VM, and what is of use to an administrator.
	Annotations map[string]string
	// Note is one line for people.
	Note string
}

// A PowerOp is what somebody asks of a mirror in the inventory.
type PowerOp string

// Operations that an inventory passes on. All others change what only the Pod
// can say, and an inventory refuses them itself with Refusal.
const (
	OpPowerOff PowerOp = "PowerOffVM"
	OpShutdown PowerOp = "ShutdownGuest"
	OpPowerOn  PowerOp = "PowerOnVM"
	OpReset    PowerOp = "ResetVM"
	OpReboot   PowerOp = "RebootGuest"
	OpSuspend  PowerOp = "SuspendVM"
	OpStandby  PowerOp = "StandbyGuest"
	OpDestroy  PowerOp = "Destroy"
)

// A PowerRequest is one such operation on one mirror.
type PowerRequest struct {
	Op   PowerOp
	UUID string // of the mirror
	// User asks, as vSphere names him: "alice@vsphere.local". The inventory has
	// checked that its permissions let him.
	User string
}
