package csi

import (
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/openatoll/atoll/vmpod"
)

// Access modes that a disk can have: it is open in one VM at a time, in which
// all containers of the pod share it.
var accessModes = []csi.VolumeCapability_AccessMode_Mode{
	csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
	csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER,
}

// fsTypes are what a guest can make and mount; "" is the first.
var fsTypes = []string{"", "ext4", "xfs"}

// checkCapability says why a volume cannot be used so, as InvalidArgument.
func checkCapability(c *csi.VolumeCapability) error {
	if c == nil {
		return invalid("volume_capability is required")
	}
	mode := c.GetAccessMode().GetMode()
	switch {
	case mode == csi.VolumeCapability_AccessMode_UNKNOWN:
		return invalid("volume_capability.access_mode is required")
	case !slices.Contains(accessModes, mode):
		return invalid("access mode %s: a volume is a disk of one pod's VM at a time: use ReadWriteOnce or ReadWriteOncePod", mode)
	}
	switch a := c.GetAccessType().(type) {
	case *csi.VolumeCapability_Block:
		return nil
	case *csi.VolumeCapability_Mount:
		if !slices.Contains(fsTypes, a.Mount.GetFsType()) {
			return invalid("file system %q: use ext4 or xfs", a.Mount.GetFsType())
		}
		return vmpod.CheckMountOptions(a.Mount.GetMountFlags())
	}
	return invalid("volume_capability.access_type is required: block or mount")
}

func checkCapabilities(cs []*csi.VolumeCapability) error {
	if len(cs) == 0 {
		return invalid("volume_capabilities is required")
	}
	for _, c := range cs {
		if err := checkCapability(c); err != nil {
			return err
		}
	}
	return nil
}

// isBlock: the container gets the device itself.
func isBlock(c *csi.VolumeCapability) bool { return c.GetBlock() != nil }

// isReader: the volume may not be written to.
func isReader(c *csi.VolumeCapability) bool {
	return c.GetAccessMode().GetMode() == csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
}
