package cri

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// A volume is something in the guest that containers of the pod mount.
type volume struct {
	// ID names it in the guest: <kind>-<name>.
	ID string `json:"id"`
	// Kind is what AddVolume makes.
	Kind agentapi.AddVolumeRequest_Kind `json:"kind"`
	// HostPath is where its content comes from (TREE), or the directory that
	// the kubelet believes to be the volume.
	HostPath string `json:"hostPath,omitempty"`
	// File: HostPath is one file, sent as a tree with that file alone.
	File bool `json:"file,omitempty"`
	// Follow: HostPath is swapped through `..data`, and the guest follows.
	Follow    bool   `json:"follow,omitempty"`
	SizeLimit int64  `json:"sizeLimit,omitempty"`
	FSGroup   *int64 `json:"fsGroup,omitempty"`
	// Disk is that of a DISK.
	Disk *volumeDisk `json:"disk,omitempty"`
	// Share is the device of a SHARE.
	Share *vmpod.Share `json:"share,omitempty"`
	// Inline is the content of a File that is on no disk.
	Inline string `json:"inline,omitempty"`
	// Hash of the tree that was sent last.
	Hash string `json:"hash,omitempty"`
}

// A terminationLog is the host file that a container's termination message
// goes to.
type terminationLog struct {
	ContainerPath string `json:"containerPath"`
	HostPath      string `json:"hostPath"`
}

// A mountPlan is what became of the mounts of one container: decided before
// anything is done.
type mountPlan struct {
	volumes []volume
	mounts  []*agentapi.VolumeMount
	devices []*agentapi.VolumeDevice
	// images are mounts of images; resolve turns them into mounts.
	images      []*runtimeapi.Mount
	termination *terminationLog
	// reported is what ContainerStatus shows.
	reported []*runtimeapi.Mount
}

// pluginEmptyDir is upstream's directory of emptyDir volumes.
const pluginEmptyDir = "kubernetes.io~empty-dir"

// pluginCSI is upstream's directory of CSI volumes; each is mounted on mount
// below its own.
const pluginCSI = "kubernetes.io~csi"

// treePlugins are volumes whose files live on the host and are swapped by
// upstream's atomic writer.
var treePlugins = map[string]string{
	"kubernetes.io~configmap":    "configmap",
	"kubernetes.io~secret":       "secret",
	"kubernetes.io~projected":    "projected",
	"kubernetes.io~downward-api": "downward",
}

// planMounts decides what every mount of a container is. A path outside the
// kubelet's directories is the host's: it is shared live if the operator allows
// that. Otherwise it is refused to a kubelet's pod, whose hostPath volume it is;
// other clients' small files are copied in.
func planMounts(rules mountRules, mounts []*runtimeapi.Mount) (*mountPlan, error) {
	plan := &mountPlan{}
	seen := map[string]bool{}
	for _, m := range mounts {
		dst := filepath.Clean(m.GetContainerPath())
		switch {
		case !filepath.IsAbs(dst) || dst == "/":
			return nil, refuse("config.mounts", fmt.Sprintf("container_path %q: want an absolute path below /", m.ContainerPath))
		case m.GetImage().GetImage() != "" && m.GetHostPath() != "":
			return nil, refuse("config.mounts", fmt.Sprintf("%s has both an image and a host_path: remove one", dst))
		case m.GetImage().GetImage() != "":
		case m.GetHostPath() == "" || !filepath.IsAbs(m.HostPath):
			return nil, refuse("config.mounts", fmt.Sprintf("host_path %q of %s: want an absolute path", m.HostPath, dst))
		}
		if seen[dst] {
			return nil, refuse("config.mounts", fmt.Sprintf("two mounts at %s: remove one", dst))
		}
		seen[dst] = true
		if err := checkRecursiveReadOnly(m); err != nil {
			return nil, err
		}
		if m.GetImage().GetImage() != "" {
			plan.images = append(plan.images, m)
			continue
		}
		if err := plan.add(rules, m, dst); err != nil {
			return nil, err
		}
	}
	return plan, nil
}

// checkRecursiveReadOnly refuses what the CRI forbids beside
// recursive_read_only.
func checkRecursiveReadOnly(m *runtimeapi.Mount) error {
	switch {
	case !m.RecursiveReadOnly:
		return nil
	case !m.Readonly:
		return refuse("config.mounts", fmt.Sprintf("%s: recursive_read_only without readonly: set both", m.ContainerPath))
	case m.Propagation != runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
		return refuse("config.mounts", fmt.Sprintf("%s: recursive_read_only with propagation %s: use PROPAGATION_PRIVATE", m.ContainerPath, m.Propagation))
	}
	return nil
}

func (plan *mountPlan) add(rules mountRules, m *runtimeapi.Mount, dst string) error {
	report := &runtimeapi.Mount{
		ContainerPath: m.ContainerPath, HostPath: m.HostPath, Readonly: m.Readonly,
		Propagation: m.Propagation, RecursiveReadOnly: m.RecursiveReadOnly,
	}
	vol, sub, termination, err := classify(rules, m)
	switch {
	case err != nil:
		return fmt.Errorf("mount %s: %w", dst, err)
	case termination:
		if plan.termination != nil {
			return refuse("config.mounts", "two termination message files")
		}
		plan.termination = &terminationLog{ContainerPath: m.ContainerPath, HostPath: filepath.Clean(m.HostPath)}
		plan.reported = append(plan.reported, report)
		return nil
	}
	vm := &agentapi.VolumeMount{
		Volume: vol.ID, SubPath: sub, Destination: dst,
		ReadOnly: m.Readonly, RecursiveReadOnly: m.RecursiveReadOnly, Propagation: propagation(m.Propagation),
	}
	if strings.HasPrefix(vol.ID, "host-") {
		// A copy: what the container wrote there would be lost.
		vm.ReadOnly, report.Readonly = true, true
	}
	plan.mounts = append(plan.mounts, vm)
	plan.volumes = append(plan.volumes, *vol)
	plan.reported = append(plan.reported, report)
	switch {
	case vol.Share != nil:
		return plan.addBelow(m, vol, dst)
	case strings.HasPrefix(vol.ID, "host-") && !vol.File:
		return plan.addMemory(m, vol.HostPath, dst)
	}
	return nil
}

// addMemory gives a copied directory the tmpfs that are mounted in it on the
// host as mounts of their own, with a copy of what is in them: only
// recursive_read_only makes those read-only, too.
func (plan *mountPlan) addMemory(m *runtimeapi.Mount, dir, dst string) error {
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		rel, ok := below(dir, i.Mountpoint)
		return !ok || rel == "." || i.FSType != "tmpfs", false
	})
	if err != nil {
		return err
	}
	for _, i := range mounts {
		vol, err := hostCopy(i.Mountpoint)
		if err != nil {
			return err
		}
		rel, _ := below(dir, i.Mountpoint)
		plan.volumes = append(plan.volumes, *vol)
		plan.mounts = append(plan.mounts, &agentapi.VolumeMount{
			Volume: vol.ID, Destination: filepath.Join(dst, rel), ReadOnly: m.RecursiveReadOnly, Propagation: propagation(m.Propagation),
		})
	}
	return nil
}

// defaultHosts is /etc/hosts for clients that send none; a kubelet sends its
// own.
const defaultHosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"

func (plan *mountPlan) addHosts(fromKubelet bool) {
	if fromKubelet || slices.ContainsFunc(plan.mounts, func(m *agentapi.VolumeMount) bool { return m.Destination == "/etc/hosts" }) {
		return
	}
	plan.volumes = append(plan.volumes, volume{ID: "default-hosts", Kind: agentapi.AddVolumeRequest_TREE, HostPath: "/hosts", File: true, Inline: defaultHosts})
	plan.mounts = append(plan.mounts, &agentapi.VolumeMount{Volume: "default-hosts", SubPath: "hosts", Destination: "/etc/hosts"})
}

func propagation(p runtimeapi.MountPropagation) string {
	switch p {
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		return "rslave"
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return "rshared"
	}
	return "private"
}

// classify says what a host path is: a volume and a path below it, or the
// termination message file.
func classify(rules mountRules, m *runtimeapi.Mount) (vol *volume, sub string, termination bool, err error) {
	path, root := filepath.Clean(m.HostPath), rules.kubeletRoot
	if root != "" {
		rel, ok := below(filepath.Join(root, "pods", rules.podUID), path)
		if ok {
			return classifyKubelet(filepath.Join(root, "pods", rules.podUID), rel)
		}
		if _, ok := below(root, path); ok {
			return nil, "", false, refuse("host_path", fmt.Sprintf("%s belongs to the kubelet, not to pod %s", path, rules.podUID))
		}
	}
	if vol, sub, err = rules.live(m); vol != nil || err != nil {
		return vol, sub, false, err
	}
	if rules.fromKubelet {
		return nil, "", false, refuse("host_path", fmt.Sprintf("%s is a directory of the node, which a pod VM does not share unless %s of the node's configuration allows it: use a configMap, an emptyDir or a persistent volume instead of hostPath", path, hostDirectoriesKey))
	}
	if vol, err = hostCopy(path); err == nil && vol.File {
		sub = filepath.Base(vol.HostPath)
	}
	return vol, sub, false, err
}

// below returns path relative to dir if it lies in it.
func below(dir, path string) (string, bool) {
	rel, err := filepath.Rel(dir, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return "", false
	}
	return rel, true
}

// classifyKubelet knows the layout of a pod's directory:
// volumes/<plug-in>/<name>[/<sub path>], etc-hosts,
// containers/<name>/<id of the termination log>, volume-subpaths/….
func classifyKubelet(podDir, rel string) (vol *volume, sub string, termination bool, err error) {
	parts := strings.Split(rel, "/")
	switch {
	case rel == "etc-hosts":
		return &volume{ID: "etc-hosts", Kind: agentapi.AddVolumeRequest_TREE, HostPath: filepath.Join(podDir, rel), File: true}, rel, false, nil
	case parts[0] == "containers" && len(parts) == 3:
		return nil, "", true, nil
	case parts[0] == "volumes" && parts[1] == pluginCSI && len(parts) >= 4 && parts[3] == "mount":
		vol, err := csiVolume(parts[2], filepath.Join(podDir, filepath.Join(parts[:4]...)))
		return vol, filepath.Join(parts[4:]...), false, err
	case parts[0] == "volumes" && len(parts) >= 3:
		vol, err := kubeletVolume(parts[1], parts[2], filepath.Join(podDir, parts[0], parts[1], parts[2]))
		return vol, filepath.Join(parts[3:]...), false, err
	case parts[0] == "volume-subpaths" && len(parts) >= 4:
		vol, err := stockSubPath(podDir, rel, parts[1])
		if err == nil && vol.File {
			sub = filepath.Base(vol.HostPath)
		}
		return vol, sub, false, err
	}
	return nil, "", false, refuse("host_path", fmt.Sprintf("%s is no volume that a pod VM can have", filepath.Join(podDir, rel)))
}

// csiVolume is the disk of which our CSI driver has left a record. Others mount
// file systems on the node.
func csiVolume(name, dir string) (*volume, error) {
	rec, ok, err := vmpod.ReadVolumeRecord(dir)
	if err != nil {
		return nil, err
	}
	if !ok || rec.Kind != vmpod.VolumeDisk {
		return nil, refuse("host_path", fmt.Sprintf("volume %q is mounted on the node by its CSI driver, where a pod VM cannot see it: use a class of csi.atoll.dev, or a raw block volume", name))
	}
	v, err := diskVolume(rec, dir)
	if err == nil && v.Disk.Block {
		err = refuse("host_path", fmt.Sprintf("volume %s is a raw block volume and cannot be mounted", v.Disk.VolumeID))
	}
	return v, err
}

func kubeletVolume(plugin, name, dir string) (*volume, error) {
	if kind, ok := treePlugins[plugin]; ok {
		return &volume{ID: kind + "-" + name, Kind: agentapi.AddVolumeRequest_TREE, HostPath: dir, Follow: true}, nil
	}
	if plugin != pluginEmptyDir {
		return nil, refuse("host_path", fmt.Sprintf("volume %q of plug-in %s: not supported in pod VMs yet: use emptyDir, configMap, secret, projected or downwardAPI", name, strings.ReplaceAll(plugin, "~", "/")))
	}
	v := &volume{ID: "emptydir-" + name, Kind: agentapi.AddVolumeRequest_EMPTY_DIR, HostPath: dir}
	rec, ok, err := vmpod.ReadVolumeRecord(dir)
	if err != nil {
		return nil, err
	}
	if ok {
		if rec.Kind != vmpod.VolumeEmptyDir {
			return nil, refuse("host_path", fmt.Sprintf("volume %q: record of kind %q is not known to this version", name, rec.Kind))
		}
		v.SizeLimit, v.FSGroup = rec.SizeLimit, rec.FSGroup
		switch rec.Medium {
		case "":
		case "Memory":
			v.Kind = agentapi.AddVolumeRequest_TMPFS
		default:
			return nil, refuse("host_path", fmt.Sprintf("emptyDir %q: medium %q: use \"\" or \"Memory\"", name, rec.Medium))
		}
	}
	return v, nil
}

// stockSubPath serves a stock kubelet, which bind-mounts sub-paths on the
// host: of volumes whose files are on the host, they can be copied.
func stockSubPath(podDir, rel, volName string) (*volume, error) {
	for plugin := range treePlugins {
		if _, err := os.Lstat(filepath.Join(podDir, "volumes", plugin, volName)); err == nil {
			return hostCopy(filepath.Join(podDir, rel))
		}
	}
	return nil, refuse("host_path", fmt.Sprintf("a sub-path of volume %q: only spherelet's kubelet core can give one of a volume that lives in the guest", volName))
}

// hostCopy is a small file or directory of the host that is copied in once.
func hostCopy(path string) (*volume, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("host_path %s: %w: create it first: %w", path, err, errdefs.ErrInvalidArgument)
	}
	fi, err := os.Stat(real)
	if err != nil {
		return nil, fmt.Errorf("host_path %s: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if !fi.IsDir() && !fi.Mode().IsRegular() {
		return nil, refuse("host_path", fmt.Sprintf("%s is a %s: sockets and devices of the node cannot be reached from a pod VM", path, kindOf(fi.Mode())))
	}
	sum := sha256.Sum256([]byte(real))
	return &volume{ID: "host-" + hex.EncodeToString(sum[:8]), Kind: agentapi.AddVolumeRequest_TREE, HostPath: real, File: !fi.IsDir()}, nil
}

func kindOf(m os.FileMode) string {
	switch {
	case m&os.ModeSocket != 0:
		return "socket"
	case m&os.ModeNamedPipe != 0:
		return "named pipe"
	case m&os.ModeDevice != 0:
		return "device"
	}
	return "special file"
}
