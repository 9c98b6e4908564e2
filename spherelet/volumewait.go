package spherelet

import (
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/util"
)

const (
	// volumesAtMost is how long a pod's first sync may wait for its volumes
	// here: for as long as the kubelet would before it looks for the second
	// time (podAttachAndMountRetryInterval), so that nothing gets later.
	volumesAtMost = 300 * time.Millisecond
	// volumesEvery is how often they are looked for.
	volumesEvery = 5 * time.Millisecond
)

// mountedVolumes is the part of the kubelet that tells what of a pod's volumes
// is mounted, by the names in its spec.
type mountedVolumes interface {
	ListVolumesForPod(types.UID) (map[string]volume.Volume, bool)
	ListBlockVolumesForPod(types.UID) (map[string]volume.BlockVolume, bool)
}

// awaitVolumes returns when all volumes that a pod uses are mounted, or after
// volumesAtMost. The kubelet looks for them at once, when they never are, and
// then every 300 ms, while its volume manager needs 100 to 300 (two loops of
// 100 ms, the second one twice). It is called right before the kubelet looks,
// from the pod's own worker.
func awaitVolumes(k mountedVolumes, pod *v1.Pod) {
	mounts, devices, _ := util.GetPodVolumeNames(pod, false)
	mounted := func() bool {
		have, _ := k.ListVolumesForPod(pod.UID)
		for name := range mounts {
			if have[name] == nil {
				return false
			}
		}
		if len(devices) == 0 {
			return true
		}
		blocks, _ := k.ListBlockVolumesForPod(pod.UID)
		for name := range devices {
			if blocks[name] == nil {
				return false
			}
		}
		return true
	}
	for end := time.Now().Add(volumesAtMost); !mounted() && time.Now().Before(end); {
		time.Sleep(volumesEvery)
	}
}
