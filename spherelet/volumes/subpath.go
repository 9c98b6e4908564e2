package volumes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"k8s.io/apimachinery/pkg/types"
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

// A SubPathFunc has the pod's guest look up the sub-path of a volume, and make
// what is missing of it: path is the volume's directory, as the kubelet names it
// to the runtime, with the sub-path below it. An error says what is wrong with
// the sub-path; what is wrong with the volume is said when the container is
// created.
type SubPathFunc func(ctx context.Context, podUID, path string) error

// A SubPath is the use of a volume's sub-path by a container.
type SubPath struct {
	PodUID    types.UID
	Container string
	// Mount is the index of the container's volume mount, and Volume the name of
	// what is mounted: of a claim it is the PersistentVolume's.
	Mount  int
	Volume string
	// Path is the sub-path, below the volume.
	Path string
}

// A SubPathTeller hears what became of sub-paths. Its methods are called by many
// goroutines.
type SubPathTeller interface {
	// Failed is called each time that a sub-path could not be prepared; the
	// kubelet, which tries again, keeps the reason to itself.
	Failed(SubPath, error)
	// Prepared is called each time that one could.
	Prepared(SubPath)
	// Gone is called when a volume is taken from its pod.
	Gone(podUID types.UID, volume string)
}

// Subpather has the guest find sub-paths: the host never follows a path into
// data that a container wrote. To the runtime it hands the path of the volume
// and the sub-path below it as a token, which the runtime takes apart again; the
// guest finds it once more when the container is created, since other containers
// may have changed the volume meanwhile.
type Subpather struct {
	ctx     context.Context
	prepare SubPathFunc
	timeout time.Duration
	teller  SubPathTeller
}

var _ subpath.Interface = (*Subpather)(nil)

// NewSubpather returns a Subpather that asks for one sub-path no longer than the
// timeout, and for none once ctx has ended. Without prepare a sub-path that is
// wrong is found when the container is created.
func NewSubpather(ctx context.Context, prepare SubPathFunc, timeout time.Duration, teller SubPathTeller) *Subpather {
	return &Subpather{ctx: ctx, prepare: prepare, timeout: timeout, teller: teller}
}

// PrepareSafeSubpath returns the token, once the guest has found the sub-path or
// made it.
func (p *Subpather) PrepareSafeSubpath(s subpath.Subpath) (string, func(), error) {
	rel, err := filepath.Rel(s.VolumePath, s.Path)
	if err != nil || !filepath.IsLocal(rel) {
		return "", nil, fmt.Errorf("sub-path %s is not below the volume %s", s.Path, s.VolumePath)
	}
	token := filepath.Join(s.VolumePath, rel)
	if p.prepare == nil {
		return token, nil, nil
	}
	use := SubPath{PodUID: podOfDir(s.PodDir), Container: s.ContainerName, Mount: s.VolumeMountIndex, Volume: s.VolumeName, Path: rel}
	ctx, cancel := context.WithTimeout(p.ctx, p.timeout)
	defer cancel()
	if err := p.prepare(ctx, string(use.PodUID), token); err != nil {
		if p.ctx.Err() == nil { // else the node shuts down, and that is why
			p.teller.Failed(use, err)
		}
		return "", nil, err
	}
	p.teller.Prepared(use)
	return token, nil, nil
}

// CleanSubPaths has nothing to clean: no bind mount was made.
func (p *Subpather) CleanSubPaths(podDir, volumeName string) error {
	if p.prepare != nil {
		p.teller.Gone(podOfDir(podDir), volumeName)
	}
	return nil
}

// SafeMakeDir leaves the making to PrepareSafeSubpath, which the kubelet always
// calls next, and which knows for whom it is.
func (p *Subpather) SafeMakeDir(string, string, os.FileMode) error { return nil }

// podOfDir returns whose directory it is: upstream's are pods/UID.
func podOfDir(dir string) types.UID { return types.UID(filepath.Base(dir)) }
