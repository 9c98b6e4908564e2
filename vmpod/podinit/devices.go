package podinit

import (
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// addDevices gives a container the device nodes of raw volumes.
func (a *agent) addDevices(spec *specs.Spec, devices []*agentapi.VolumeDevice) error {
	for _, d := range devices {
		v, ok := a.volume(d.Volume)
		if !ok || v.disk == nil || !v.disk.request.Block {
			return fmt.Errorf("device %s: volume %s is no raw device of this VM: %w", d.Path, d.Volume, errdefs.ErrNotFound)
		}
		if !path.IsAbs(d.Path) || path.Clean(d.Path) == "/" {
			return fmt.Errorf("device %q: want an absolute path: %w", d.Path, errdefs.ErrInvalidArgument)
		}
		if d.Permissions == "" || strings.Trim(d.Permissions, "rwm") != "" {
			return fmt.Errorf("device %s: permissions %q: want some of r, w and m: %w", d.Path, d.Permissions, errdefs.ErrInvalidArgument)
		}
		if err := addDevice(spec, v.disk.device, d); err != nil {
			return fmt.Errorf("device %s: %w", d.Path, err)
		}
	}
	return nil
}

func addDevice(spec *specs.Spec, node string, d *agentapi.VolumeDevice) error {
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		return err
	}
	major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	spec.Linux.Devices = append(spec.Linux.Devices, specs.LinuxDevice{Path: path.Clean(d.Path), Type: "b", Major: major, Minor: minor})
	if r := spec.Linux.Resources; r.Devices != nil {
		r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: d.Permissions})
	}
	return nil
}
