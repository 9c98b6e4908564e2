package volumes

import (
	"fmt"
	"sync/atomic"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/volume"
	upstreamcsi "k8s.io/kubernetes/pkg/volume/csi"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod"
)

// upstreamCSI are the interfaces of upstream's plug-in, for which the kubelet
// asks by type assertion.
type upstreamCSI interface {
	volume.AttachableVolumePlugin
	volume.BlockVolumePlugin
	volume.NodeExpandableVolumePlugin
}

// csiPlugin is upstream's, but for file systems of other drivers, which their
// node services would mount on the host, and for what CSI does not carry.
type csiPlugin struct{ upstreamCSI }

// NewCSI returns the plug-in of volumes of CSI drivers.
func NewCSI() volume.VolumePlugin {
	return csiPlugin{upstreamcsi.ProbeVolumePlugins()[0].(upstreamCSI)}
}

// Init implements volume.VolumePlugin.
func (p csiPlugin) Init(host volume.VolumeHost) error {
	if k, ok := host.(volume.KubeletVolumeHost); ok {
		host = &calmHost{VolumeHost: host, KubeletVolumeHost: k}
	}
	return p.upstreamCSI.Init(host)
}

// A calmHost is the kubelet as upstream's plug-in sees it. The first thing that
// the plug-in says, at each start (initializeCSINode), is that the node is not
// ready until its CSINode has been written; a kubelet that reports its status
// just then makes a node NotReady whose pods have run all the time. Pods with
// volumes wait for the driver's registration anyway. A CSINode that cannot be
// written is told.
type calmHost struct {
	volume.VolumeHost
	volume.KubeletVolumeHost
	began atomic.Bool
}

// SetKubeletError implements volume.KubeletVolumeHost.
func (h *calmHost) SetKubeletError(err error) {
	if h.began.Swap(true) {
		h.KubeletVolumeHost.SetKubeletError(err)
	}
}

// NewMounter implements volume.VolumePlugin.
func (p csiPlugin) NewMounter(spec *volume.Spec, pod *v1.Pod) (volume.Mounter, error) {
	driver, err := upstreamcsi.GetCSIDriverName(spec)
	if err != nil {
		return nil, err
	}
	if driver != v1alpha1.CSIDriverName {
		return nil, fmt.Errorf("volume %s is a file system of the CSI driver %s, whose node service would mount it on the node, and a pod VM shares no file system with the node: use a claim with volumeMode: Block, or a StorageClass of %s", spec.Name(), driver, v1alpha1.CSIDriverName)
	}
	m, err := p.upstreamCSI.NewMounter(spec, pod)
	if err != nil {
		return nil, err
	}
	return csiMounter{m}, nil
}

// csiMounter completes the record that the driver's node service has written.
type csiMounter struct{ volume.Mounter }

// SetUp implements volume.Mounter. When the volume gets its group is in no CSI
// call.
func (m csiMounter) SetUp(args volume.MounterArgs) error {
	if err := m.Mounter.SetUp(args); err != nil {
		return err
	}
	if args.FSGroupChangePolicy == nil {
		return nil
	}
	dir := m.GetPath()
	r, ok, err := vmpod.ReadVolumeRecord(dir)
	if err != nil || !ok || r.Disk == nil || r.Disk.FSGroupChangePolicy == string(*args.FSGroupChangePolicy) {
		return err
	}
	r.Disk.FSGroupChangePolicy = string(*args.FSGroupChangePolicy)
	return vmpod.WriteVolumeRecord(dir, r)
}

// refusedPlugin answers for PersistentVolumes that would be mounted on the host:
// without it their pods would wait for a plug-in that is never there.
type refusedPlugin struct{ hostPaths bool }

const refusedName = "atoll.dev/refused"

func (refusedPlugin) Init(volume.VolumeHost) error { return nil }
func (refusedPlugin) GetPluginName() string        { return refusedName }

// CanSupport implements volume.VolumePlugin.
func (p refusedPlugin) CanSupport(spec *volume.Spec) bool {
	pv := spec.PersistentVolume
	return pv != nil && pv.Spec.CSI == nil && (!p.hostPaths || pv.Spec.HostPath == nil)
}

func (refusedPlugin) GetVolumeName(spec *volume.Spec) (string, error) { return spec.Name(), nil }
func (refusedPlugin) RequiresRemount(*volume.Spec) bool               { return false }
func (refusedPlugin) SupportsMountOption() bool                       { return true }

// SupportsSELinuxContextMount implements volume.VolumePlugin.
func (refusedPlugin) SupportsSELinuxContextMount(*volume.Spec) (bool, error) { return false, nil }

// NewUnmounter implements volume.VolumePlugin; nothing was ever mounted.
func (refusedPlugin) NewUnmounter(name string, _ types.UID) (volume.Unmounter, error) {
	return nil, fmt.Errorf("volume %s was never mounted", name)
}

// ConstructVolumeSpec implements volume.VolumePlugin, likewise.
func (refusedPlugin) ConstructVolumeSpec(name, _ string) (volume.ReconstructedVolume, error) {
	return volume.ReconstructedVolume{}, fmt.Errorf("volume %s was never mounted", name)
}

// NewMounter says why.
func (refusedPlugin) NewMounter(spec *volume.Spec, _ *v1.Pod) (volume.Mounter, error) {
	return nil, fmt.Errorf("PersistentVolume %s is no CSI volume: it would be mounted on the node, and a pod VM shares no file system with the node: use a StorageClass of %s", spec.Name(), v1alpha1.CSIDriverName)
}
