package qemu

import (
	"fmt"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

func TestLimitsOfDisks(t *testing.T) {
	s := smallSpec("limits")
	for i := range MaxDisks {
		s.Disks = append(s.Disks, vmpod.Disk{ID: fmt.Sprintf("d%d", i), Path: "/disk"})
	}
	if MaxDisks != 30 || checkSpec(s) != nil {
		t.Errorf("%d disks: %v; docs/spec.md promises 30", MaxDisks, checkSpec(s))
	}
	for i := range 2 {
		s.Disks = append(s.Disks, vmpod.Disk{ID: fmt.Sprintf("more%d", i), Path: "/disk"})
	}
	if err := checkSpec(s); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%d disks: %v", len(s.Disks), err)
	}
}
