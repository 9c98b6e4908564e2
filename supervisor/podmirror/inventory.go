// Package podmirror shows pods' VMs that run on KVM nodes in a vCenter
// inventory, where vSphere's client and govc list, find and describe them, and
// passes power operations on such a mirror on to the pod.
//
// The Pod is the truth and a mirror is a picture of it: what it shows comes
// from the Pod and from the annotations that the pod's node wrote on it
// (v1alpha1.PodVMAnnotations). A pod whose node has not named its VM has no
// mirror, nor has one whose namespace has no resource pool. Nodes that run pods
// as VMs of their own are shown as hosts.
package podmirror

import "context"

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

	// ShowHost has the inventory show a node as h says, where mirrors of its
	// pods can be. It is idempotent on Host.Name.
	ShowHost(ctx context.Context, h Host) error
	// RemoveHost takes away a host that ShowHost added; one that is not there is
	// taken away already. While mirrors are on it the host stays, is shown as
	// not responding, and the error is ErrFailedPrecondition.
	RemoveHost(ctx context.Context, name string) error
	// Hosts returns the names of those that ShowHost added, whenever.
	Hosts(ctx context.Context) ([]string, error)
}

// A Host is a node as the inventory shows it.
type Host struct {
	Name   string
	CPUs   int   // logical processors; 0: unknown
	Memory int64 // bytes; 0: unknown
	State  HostState
}

// A HostState is how a node is.
type HostState string

// States of a node, by its condition Ready.
const (
	HostConnected     HostState = ""              // True
	HostTroubled      HostState = "troubled"      // False: its agent says that something is wrong
	HostNotResponding HostState = "notResponding" // Unknown: nobody hears of it
)

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
	Name string
	// CPUs and MemoryMiB are the VM's size.
	CPUs      int32
	MemoryMiB int64
	On        bool
	// Addresses are the pod's, the one that counts first.
	Addresses []string
	// HostName is the guest's own name, MAC that of its interface, DiskUUID that
	// of its writable disk; each may be empty.
	HostName, MAC, DiskUUID string
	// Host is the Node's name.
	Host string
	// Pool and Folder are the namespace's, as managed object ids.
	Pool, Folder string
	// Annotations are shown as the VM's extra configuration: those of the Pod
	// that name its VM, and those below.
	Annotations map[string]string
	// Note is a line for people.
	Note string
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
	PowerOn       PowerOp = "PowerOnVM"
	PowerOff      PowerOp = "PowerOffVM"
	PowerReset    PowerOp = "ResetVM"
	PowerSuspend  PowerOp = "SuspendVM"
	GuestShutdown PowerOp = "ShutdownGuest"
	GuestReboot   PowerOp = "RebootGuest"
	GuestStandby  PowerOp = "StandbyGuest"
	Destroy       PowerOp = "Destroy"
)

// A PowerRequest is one such operation on one mirror.
type PowerRequest struct {
	Op   PowerOp
	UUID string // of the mirror
	// User asks, as vSphere names him: "alice@vsphere.local". The inventory has
	// checked that its permissions let him.
	User string
}
