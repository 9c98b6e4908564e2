package storage

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// A HeldError says that a VM has a volume open. It is ErrFailedPrecondition.
type HeldError struct {
	VolumeID string
	Holder   Holder
	// Detail is what is known of the holder, a clause, or empty.
	Detail string
}

func (e *HeldError) Error() string {
	s := fmt.Sprintf("volume %s is in use by %s", e.VolumeID, e.Holder)
	if e.Detail != "" {
		s += " (" + e.Detail + ")"
	}
	return s + ": delete its pod and wait until the VM is off; if the host is lost for good, taint the node node.kubernetes.io/out-of-service"
}

// Unwrap gives the class.
func (e *HeldError) Unwrap() error { return errdefs.ErrFailedPrecondition }

// A HeldElsewhereError says that a volume can be copied by another host alone,
// whose VM writes to it: where blocks cannot be shared, nobody else knows what is on
// the disk at one instant. The same call there may succeed. It is
// ErrFailedPrecondition.
type HeldElsewhereError struct {
	Holder Holder
	// Datastore is the name of that which has the volume.
	Datastore string
}

func (e *HeldElsewhereError) Error() string {
	return fmt.Sprintf("%s writes to it, which that host alone can copy, and the file system of datastore %s cannot share blocks (XFS and btrfs can): have that host copy it, or detach the volume first", e.Holder, e.Datastore)
}

// Unwrap gives the class.
func (e *HeldElsewhereError) Unwrap() error { return errdefs.ErrFailedPrecondition }
