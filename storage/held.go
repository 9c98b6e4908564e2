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
