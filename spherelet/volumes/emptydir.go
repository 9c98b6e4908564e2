// Package volumes replaces the parts of the kubelet that would mount things
// on the host: emptyDir lives in the guest, sub-paths are resolved in the
// guest, and volume kinds that exist only as mounts on the node are not
// offered.
package volumes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/kubernetes/pkg/volume"
	upstream "k8s.io/kubernetes/pkg/volume/emptydir"
	utilstrings "k8s.io/utils/strings"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// emptyDirName is upstream's, so that the kubelet finds this plug-in instead.
const emptyDirName = "kubernetes.io/empty-dir"

// usageTimeout bounds the question to one guest.
const usageTimeout = 5 * time.Second

// UsageFunc asks the guest what a volume holds. hostDir is the volume's
// directory as the kubelet named it to the runtime. errdefs.ErrNotFound while
// the volume is not in the guest yet.
type UsageFunc func(ctx context.Context, podUID, hostDir string) (storage.Usage, error)

// emptyDirPlugin makes a directory with a record in it, which tells the
// runtime what the guest must make. What Secret, ConfigMap and projected
// volumes wrap (names that begin with "wrapped_") are host directories that
// upstream's plug-in makes and the runtime copies in.
type emptyDirPlugin struct {
	volume.VolumePlugin // upstream's
	host                volume.VolumeHost
	usage               UsageFunc
}

// NewEmptyDir returns the plug-in. usage may be nil: nothing is measured.
func NewEmptyDir(usage UsageFunc) volume.VolumePlugin {
	return &emptyDirPlugin{VolumePlugin: upstream.ProbeVolumePlugins()[0], usage: usage}
}

func (p *emptyDirPlugin) Init(host volume.VolumeHost) error {
	p.host = host
	return p.VolumePlugin.Init(host)
}

// wrapped volumes cannot be confused with a pod's own: names of volumes have
// no underscores.
func wrapped(name string) bool { return strings.HasPrefix(name, "wrapped_") }

func (p *emptyDirPlugin) NewMounter(spec *volume.Spec, pod *v1.Pod) (volume.Mounter, error) {
	if wrapped(spec.Name()) {
		return p.VolumePlugin.NewMounter(spec, pod)
	}
	r, err := recordOf(spec, pod)
	if err != nil {
		return nil, err
	}
	return p.emptyDir(spec.Name(), pod.UID, r), nil
}

func (p *emptyDirPlugin) NewUnmounter(name string, podUID types.UID) (volume.Unmounter, error) {
	if wrapped(name) {
		return p.VolumePlugin.NewUnmounter(name, podUID)
	}
	return p.emptyDir(name, podUID, vmpod.VolumeRecord{}), nil
}

func (p *emptyDirPlugin) emptyDir(name string, podUID types.UID, r vmpod.VolumeRecord) *emptyDir {
	return &emptyDir{
		path:   p.host.GetPodVolumeDir(podUID, utilstrings.EscapeQualifiedName(emptyDirName), name),
		podUID: podUID, record: r, usage: p.usage,
	}
}

// recordOf is what the guest must make for the volume. A memory volume is no
// larger than the pod's memory limit, as upstream has it.
func recordOf(spec *volume.Spec, pod *v1.Pod) (vmpod.VolumeRecord, error) {
	r := vmpod.VolumeRecord{Kind: vmpod.VolumeEmptyDir}
	e := spec.Volume.EmptyDir
	switch e.Medium {
	case v1.StorageMediumDefault:
	case v1.StorageMediumMemory:
		r.Medium = string(e.Medium)
	default:
		return r, fmt.Errorf("emptyDir %s: medium %q is not offered inside pod VMs", spec.Name(), e.Medium)
	}
	if e.SizeLimit != nil && e.SizeLimit.Sign() > 0 {
		r.SizeLimit = e.SizeLimit.Value()
	}
	if r.Medium == "" {
		return r, nil
	}
	if limit := memoryLimit(pod); limit > 0 && (r.SizeLimit == 0 || r.SizeLimit > limit) {
		r.SizeLimit = limit
	}
	return r, nil
}

// memoryLimit is the pod's in bytes, 0 when some container has none.
func memoryLimit(pod *v1.Pod) int64 {
	if !resourcehelper.IsPodLevelLimitsSet(pod) {
		for _, c := range pod.Spec.Containers {
			if c.Resources.Limits.Memory().IsZero() {
				return 0
			}
		}
	}
	limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{ExcludeOverhead: true})
	return limits.Memory().Value()
}

// emptyDir is one volume that lives in a guest.
type emptyDir struct {
	path   string
	podUID types.UID
	record vmpod.VolumeRecord
	usage  UsageFunc
}

var (
	_ volume.Mounter   = (*emptyDir)(nil)
	_ volume.Unmounter = (*emptyDir)(nil)
)

func (e *emptyDir) GetPath() string { return e.path }

func (e *emptyDir) GetAttributes() volume.Attributes { return volume.Attributes{Managed: true} }

func (e *emptyDir) SetUp(args volume.MounterArgs) error { return e.SetUpAt(e.path, args) }

func (e *emptyDir) SetUpAt(dir string, args volume.MounterArgs) error {
	r := e.record
	r.FSGroup = args.FsGroup
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return vmpod.WriteVolumeRecord(dir, r)
}

func (e *emptyDir) TearDown() error { return e.TearDownAt(e.path) }

// TearDownAt removes the record and its directory; the data goes with the
// guest. A directory with anything else in it is not ours to erase.
func (e *emptyDir) TearDownAt(dir string) error {
	if err := vmpod.RemoveVolumeRecord(dir); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// GetMetrics asks the guest; the kubelet evicts by what it says.
func (e *emptyDir) GetMetrics() (*volume.Metrics, error) {
	if e.usage == nil {
		return nil, volume.NewNotSupportedError()
	}
	ctx, cancel := context.WithTimeout(context.Background(), usageTimeout)
	defer cancel()
	u, err := e.usage(ctx, string(e.podUID), e.path)
	if err != nil {
		return nil, fmt.Errorf("use of emptyDir %s of pod %s: %w", e.path, e.podUID, err)
	}
	q := func(n uint64) *resource.Quantity { return resource.NewQuantity(int64(n), resource.BinarySI) }
	at := u.Time
	if at.IsZero() {
		at = time.Now()
	}
	return &volume.Metrics{
		Time: metav1.NewTime(at),
		Used: q(u.Bytes), Capacity: q(u.CapacityBytes), Available: q(u.AvailableBytes), InodesUsed: q(u.Inodes),
		Inodes: q(u.InodesCapacity), InodesFree: q(u.InodesFree),
	}, nil
}
