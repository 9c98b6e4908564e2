package podmirror

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"strings"

	"github.com/google/uuid"
	corev1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const mib = 1 << 20

// A place is where a pod's mirror goes.
type place struct{ pool, folder string }

// placeOf picks the pool of a node's zone; a namespace with one pool has it for
// every node. ok is false while the namespace has none.
func placeOf(status v1alpha1.SupervisorNamespaceStatus, zone string) (p place, ok bool) {
	if status.Folder == nil || status.Folder.ID == "" {
		return place{}, false
	}
	for _, pool := range status.Pools {
		if pool.ID != "" && (pool.Zone == zone || len(status.Pools) == 1) {
			return place{pool: pool.ID, folder: status.Folder.ID}, true
		}
	}
	return place{}, false
}

// vmOf is what the mirror of a pod shows; ok is false while its node has not
// named its VM.
func vmOf(pod *corev1.Pod, at place) (vm VM, ok bool) {
	id, err := uuid.Parse(pod.Annotations[v1alpha1.PodVMUUIDAnnotation])
	if err != nil || pod.Spec.NodeName == "" {
		return VM{}, false
	}
	var size v1alpha1.PodVMSize
	if json.Unmarshal([]byte(pod.Annotations[v1alpha1.PodVMSizeAnnotation]), &size) != nil || size.CPUs < 1 || size.CPUs > math.MaxInt16 || size.Memory < 1 {
		return VM{}, false
	}
	vm = VM{
		UUID: id.String(), Name: vmName(pod.Name), CPUs: int32(size.CPUs), MemoryMiB: (size.Memory + mib - 1) / mib, On: running(pod),
		HostName: hostName(pod), MAC: pod.Annotations[v1alpha1.PodMACAnnotation], DiskUUID: pod.Annotations[v1alpha1.PodEphemeralDiskAnnotation],
		Host: pod.Spec.NodeName, Pool: at.pool, Folder: at.folder,
		Annotations: map[string]string{
			AnnotationPod: pod.Namespace + "/" + pod.Name, AnnotationPodUID: string(pod.UID),
			AnnotationPodPhase: string(pod.Status.Phase), AnnotationCreatedBy: "atoll.dev/pod-mirror",
		},
		Note: fmt.Sprintf("Pod %s/%s on node %s. Change it with kubectl; powering it off here deletes the pod.", pod.Namespace, pod.Name, pod.Spec.NodeName),
	}
	for _, ip := range pod.Status.PodIPs {
		vm.Addresses = append(vm.Addresses, ip.IP)
	}
	for _, k := range v1alpha1.PodVMAnnotations() {
		if v, ok := pod.Annotations[k]; ok && k != v1alpha1.PodVMMoIDAnnotation { // the inventory knows that itself
			vm.Annotations[k] = v
		}
	}
	return vm, true
}

// running says whether the pod's VM runs, as its node says: the VM ends with the
// pod, and is missing while the node makes another one in its place.
func running(pod *corev1.Pod) bool {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReadyToStartContainers {
			return c.Status != corev1.ConditionFalse
		}
	}
	return true
}

// hostName is what the guest calls itself: the kubelet cuts at 63 characters.
func hostName(pod *corev1.Pod) string {
	name := pod.Name
	if pod.Spec.Hostname != "" {
		name = pod.Spec.Hostname
	}
	if len(name) > 63 {
		name = strings.TrimRight(name[:63], "-.")
	}
	return name
}

// maxVMName is the longest name that vSphere gives a VM, in characters.
const maxVMName = 80

// vmName is the pod's name, or as much of it as fits and a part that tells it
// from others that begin alike.
func vmName(pod string) string {
	if len(pod) <= maxVMName {
		return pod
	}
	sum := sha256.Sum256([]byte(pod))
	tail := "-" + hex.EncodeToString(sum[:5])
	return strings.TrimRight(pod[:maxVMName-len(tail)], "-.") + tail
}
