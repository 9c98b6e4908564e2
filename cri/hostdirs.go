package cri

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// hostDirectoriesKey is the key of the configuration by which an operator lets
// pods use directories of the host.
const hostDirectoriesKey = "hostDirectories"

// mountRules are what the meaning of a container's mounts depends on.
type mountRules struct {
	kubeletRoot, podUID string
	// fromKubelet says that a kubelet made the pod: then a path outside its
	// directories is a hostPath volume, of which nothing is ever copied.
	fromKubelet bool
	// shared are the host directories that pods may use live.
	shared []vmpod.HostDirectory
	// userNamespace says that the pod has one.
	userNamespace bool
}

func (s *Server) mountRules(sb *sandbox, fromKubelet bool) mountRules {
	o := sb.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	return mountRules{
		kubeletRoot: s.config.KubeletRoot, podUID: sb.VM.PodUID, fromKubelet: fromKubelet, shared: s.config.HostDirectories,
		userNamespace: o != nil && o.Mode == runtimeapi.NamespaceMode_POD,
	}
}

// live returns the volume of a host path that the operator allows pods to use
// as it is, and the path below that volume; nil if it is none of those.
func (r mountRules) live(m *runtimeapi.Mount) (vol *volume, sub string, err error) {
	if len(r.shared) == 0 {
		return nil, "", nil
	}
	// The name that a client knows may lead over links, such as /var/run. What
	// counts is where it ends; the driver goes there without following any.
	path, err := filepath.EvalSymlinks(filepath.Clean(m.HostPath))
	if err != nil {
		return nil, "", nil // said by others
	}
	dir, ok := vmpod.FindHostDirectory(r.shared, path)
	if !ok {
		return nil, "", nil
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, "", fmt.Errorf("host_path %s: %w: %w", m.HostPath, err, errdefs.ErrInvalidArgument)
	}
	follow := m.Propagation == runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	switch {
	case !fi.IsDir() && !fi.Mode().IsRegular():
		return nil, "", refuse("host_path", fmt.Sprintf("%s is a %s: sockets and devices of the node cannot be reached from a pod VM", m.HostPath, kindOf(fi.Mode())))
	case dir.ReadOnly && !m.Readonly:
		return nil, "", refuse("config.mounts", fmt.Sprintf("%s may only be read, by %s of the node's configuration: mount it read-only", m.HostPath, hostDirectoriesKey))
	case dir.ReadOnly && follow:
		return nil, "", refuse("config.mounts", fmt.Sprintf("%s may only be read, by %s of the node's configuration, and mounts that come later could not be kept read-only: leave mount propagation out", m.HostPath, hostDirectoriesKey))
	case m.Propagation == runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return nil, "", refuse("config.mounts", fmt.Sprintf("%s with propagation in both directions: the pod has its own kernel, whose mounts cannot appear on the node: use PROPAGATION_HOST_TO_CONTAINER or PROPAGATION_PRIVATE", m.HostPath))
	case r.userNamespace:
		return nil, "", refuse("config.mounts", fmt.Sprintf("%s in a pod with a user namespace: the owners of its files cannot be mapped: leave one of the two out", m.HostPath))
	}
	s := vmpod.Share{Path: path, ReadOnly: m.Readonly, RecursiveReadOnly: m.RecursiveReadOnly || dir.ReadOnly, Follow: follow}
	// One share for all containers that want the same of the same path.
	sum := sha256.Sum256(fmt.Appendf(nil, "%t %t %t %s", s.ReadOnly, s.RecursiveReadOnly, s.Follow, path))
	s.ID = "h" + hex.EncodeToString(sum[:8])
	vol = &volume{ID: "share-" + s.ID, Kind: agentapi.AddVolumeRequest_SHARE, HostPath: path, File: !fi.IsDir(), Share: &s}
	if vol.File {
		sub = filepath.Base(path)
	}
	return vol, sub, nil
}

// addBelow keeps what is mounted below a read-only directory as writable as it
// is on the host, which is what read-only without recursive_read_only means.
func (plan *mountPlan) addBelow(m *runtimeapi.Mount, vol *volume, dst string) error {
	if vol.File || !vol.Share.ReadOnly || vol.Share.RecursiveReadOnly {
		return nil
	}
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		rel, ok := below(vol.HostPath, i.Mountpoint)
		return !ok || rel == ".", false
	})
	if err != nil {
		return err
	}
	for _, i := range mounts {
		rel, _ := below(vol.HostPath, i.Mountpoint)
		plan.mounts = append(plan.mounts, &agentapi.VolumeMount{
			Volume: vol.ID, SubPath: rel, Destination: filepath.Join(dst, rel), Propagation: propagation(m.Propagation),
		})
	}
	return nil
}

// plugShare sees to it that the machine has the device of a share.
func (p *pod) plugShare(ctx context.Context, s vmpod.Share) error {
	if slices.Contains(p.machine.Spec().Shares, s) {
		return nil
	}
	plugger, ok := p.machine.(vmpod.Plugger)
	if !ok {
		return fmt.Errorf("host directory %s: this hypervisor cannot share directories with a pod VM: %w", s.Path, errdefs.ErrNotImplemented)
	}
	return step("share host directory "+s.Path, plugger.Plug(ctx, vmpod.Device{Share: &s}))
}
