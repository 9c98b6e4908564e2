package volumes

import (
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/configmap"
	"k8s.io/kubernetes/pkg/volume/downwardapi"
	"k8s.io/kubernetes/pkg/volume/image"
	"k8s.io/kubernetes/pkg/volume/projected"
	"k8s.io/kubernetes/pkg/volume/secret"
	"k8s.io/kubernetes/pkg/volume/util/subpath"

	"github.com/openatoll/atoll/vmpod"
)

// Plugins are the volume kinds that a node of pod VMs offers; hostPath in
// these directories, if there are any. Persistent volumes come with NewCSI.
func Plugins(usage UsageFunc, hostDirectories []vmpod.HostDirectory) []volume.VolumePlugin {
	plugins := []volume.VolumePlugin{NewEmptyDir(usage)}
	if len(hostDirectories) > 0 {
		plugins = append(plugins, NewHostPath(hostDirectories))
	}
	plugins = append(plugins, secret.ProbeVolumePlugins()...)
	plugins = append(plugins, configmap.ProbeVolumePlugins()...)
	plugins = append(plugins, downwardapi.ProbeVolumePlugins()...)
	plugins = append(plugins, image.ProbeVolumePlugins()...)
	plugins = append(plugins, projected.ProbeVolumePlugins()...)
	return append(plugins, refusedPlugin{hostPaths: len(hostDirectories) > 0})
}

// Subpather hands sub-paths through as they are: the path of the volume and
// the sub-path below it are a token, which the runtime takes apart again. The
// guest makes the directory if need be (with the volume's fsGroup and mode)
// and resolves it beneath the volume; the host never follows a path into data
// that a container wrote.
type Subpather struct{}

var _ subpath.Interface = Subpather{}

// PrepareSafeSubpath returns the token.
func (Subpather) PrepareSafeSubpath(s subpath.Subpath) (string, func(), error) {
	rel, err := filepath.Rel(s.VolumePath, s.Path)
	if err != nil || !filepath.IsLocal(rel) {
		return "", nil, fmt.Errorf("sub-path %s is not below the volume %s", s.Path, s.VolumePath)
	}
	return filepath.Join(s.VolumePath, rel), nil, nil
}

// CleanSubPaths has nothing to clean: no bind mount was made.
func (Subpather) CleanSubPaths(string, string) error { return nil }

// SafeMakeDir leaves the making to the guest.
func (Subpather) SafeMakeDir(string, string, os.FileMode) error { return nil }
