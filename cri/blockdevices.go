package cri

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// blockVolumesDir is where the kubelet links to raw block volumes, in a pod's
// directory: volumeDevices/<plug-in>/<name>.
const blockVolumesDir = "volumeDevices"

// planDevices decides what the devices of a container are. Of the node's own
// devices a pod VM sees none.
func (plan *mountPlan) planDevices(rules mountRules, devices []*runtimeapi.Device) error {
	for _, d := range devices {
		dst := filepath.Clean(d.GetContainerPath())
		path := filepath.Clean(d.GetHostPath())
		rel, ok := below(filepath.Join(rules.kubeletRoot, "pods", rules.podUID, blockVolumesDir), path)
		switch {
		case rules.kubeletRoot == "" || !ok || strings.Count(rel, "/") != 1:
			return refuse("config.devices", fmt.Sprintf("%s is a device of the node, which a pod VM does not see: use a volume", d.HostPath))
		case !filepath.IsAbs(dst) || dst == "/":
			return refuse("config.devices", fmt.Sprintf("container_path %q: want an absolute path below /", d.ContainerPath))
		}
		v, err := blockVolume(path, d.GetPermissions())
		if err != nil {
			return fmt.Errorf("device %s: %w", dst, err)
		}
		plan.volumes = append(plan.volumes, *v)
		plan.devices = append(plan.devices, &agentapi.VolumeDevice{Volume: v.ID, Path: dst, Permissions: firstOf(d.GetPermissions(), "rwm")})
	}
	return nil
}

// blockVolume is the raw volume to which the kubelet's link leads: a record of
// ours, or the device that another driver has published.
func blockVolume(link, permissions string) (*volume, error) {
	target, err := filepath.EvalSymlinks(link)
	if err != nil {
		return nil, refuse("config.devices", fmt.Sprintf("%s: %v", link, err))
	}
	rec, ok, err := vmpod.ReadBlockRecord(target)
	if err != nil {
		return nil, err
	}
	if ok {
		v, err := diskVolume(rec, target)
		if err == nil && !v.Disk.Block {
			err = refuse("config.devices", fmt.Sprintf("volume %s is no raw block volume", v.Disk.VolumeID))
		}
		return v, err
	}
	fi, err := os.Stat(target)
	if err != nil || fi.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		return nil, refuse("config.devices", fmt.Sprintf("%s is no block device", target))
	}
	d := &volumeDisk{HostDevice: target, DiskRecord: vmpod.DiskRecord{VolumeID: link, Block: true, ReadOnly: permissions == "r"}}
	return &volume{ID: "disk-" + d.serial(), Kind: agentapi.AddVolumeRequest_DISK, HostPath: link, Disk: d}, nil
}
