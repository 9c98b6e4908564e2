// Package resources computes the size of a pod's virtual machine from the
// whole Pod. It is pure: the same Pod and Policy always give the same Size.
//
// The rule, container by container and resource by resource:
//
//   - A container counts with the largest of its request and its limit.
//   - A container that names neither counts with half a core and 512 MiB
//     (DefaultCPU, DefaultMemory), as vSphere Pods do.
//   - Containers are summed as Kubernetes sums them: all regular containers
//     and sidecars (restartable init containers) together, or the largest
//     moment of the start-up (an init container and the sidecars started
//     before it), whichever is more.
//   - A pod-level limit replaces the sum; a pod-level request only raises it.
//   - Memory-backed emptyDirs count inside the containers' limits, as in
//     Kubernetes; their size limits are added when some container has no
//     memory limit, because then nothing else made room for them.
//   - CPU is rounded up to whole virtual CPUs, at least one.
//   - Memory is at least MinWorkload, plus the guest's own share: the pod's
//     overhead (RuntimeClass) or Policy.GuestFixed and one byte in
//     Policy.GuestPerByte of RAM, whichever is more, rounded up to whole MiB.
//   - The writable disk is the sum of the ephemeral-storage limits with room
//     on top (DiskRoom), so that the kubelet evicts before the guest sees
//     ENOSPC; Policy.EphemeralDefault when a container has no limit.
//   - CPU and memory are never more than the host has: a limit beyond the
//     node cannot be reached on any Kubernetes node. The Size says so
//     (CPUCapped, MemoryCapped). Requests beyond the host are refused by
//     package admission.
package resources

import (
	"fmt"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

const (
	mib = 1 << 20

	// DefaultCPU (millicores) and DefaultMemory (bytes) of a container that
	// names neither request nor limit. Source: vSphere with Kubernetes
	// documentation, "0.5 CPU and 512 MB".
	DefaultCPU    = 500
	DefaultMemory = 512 * mib

	// MinWorkload is the least memory (bytes) that containers of a pod share,
	// however small their limits. Unused guest memory costs the host nothing.
	MinWorkload = 128 * mib

	// DefaultEphemeral is the size (bytes) of the writable disk when the pod
	// sets no ephemeral-storage limit. The disk is sparse.
	DefaultEphemeral = 10 << 30

	// MinEphemeral is the smallest writable disk (bytes).
	MinEphemeral = 64 * mib
)

// A Policy holds what a node knows and a Pod does not.
type Policy struct {
	// HostCPUs and HostMemory (bytes) cap the VM; 0 means no cap.
	HostCPUs   int
	HostMemory int64
	// EphemeralDefault is the size (bytes) of the writable disk of a pod
	// without an ephemeral-storage limit; 0 means DefaultEphemeral.
	EphemeralDefault int64
	// GuestFixed (bytes) is what kernel and agent take of any VM's RAM, and
	// one byte in GuestPerByte more grows with the RAM (page structures,
	// slabs). 0 means DefaultGuestFixed, DefaultGuestPerByte.
	GuestFixed   int64
	GuestPerByte int64
}

// The guest's own share of its RAM, so that containers can really use what
// they named. Measured as RAM less MemAvailable, with one idle container, on
// Debian's 6.1 cloud kernel (on the tuned kernel): 80 (57) MiB of 228, 154
// (104) of 624, 191 (116) of 1152, 218 (138) of 2208. It is the kernel, the
// initramfs (12 MiB), slabs, page structures and the reserve below which the
// kernel does not go.
const (
	DefaultGuestFixed   = 176 * mib
	DefaultGuestPerByte = 40
)

// A Size is what one pod's virtual machine gets.
type Size struct {
	// CPUs is the number of virtual CPUs, at least 1.
	CPUs int
	// Memory is the VM's RAM in bytes, the guest's own share included.
	Memory int64
	// Workload is the part of Memory meant for containers.
	Workload int64
	// EphemeralBytes is the size of the writable disk.
	EphemeralBytes int64
	// MemoryVolumes is the sum (bytes) of the size limits of memory-backed
	// emptyDirs.
	MemoryVolumes int64
	// CPUCapped and MemoryCapped say that the pod's values sum to more than
	// the host has, so that the VM has the host's size.
	CPUCapped, MemoryCapped bool
}

// ForPod computes the size of pod's virtual machine.
func ForPod(pod *v1.Pod, p Policy) Size {
	p = p.withDefaults()
	var s Size
	s.MemoryVolumes = memoryVolumes(pod)

	milli := podValue(pod, v1.ResourceCPU, DefaultCPU)
	s.CPUs = int((milli + 999) / 1000)
	if s.CPUs < 1 {
		s.CPUs = 1
	}
	if p.HostCPUs > 0 && s.CPUs > p.HostCPUs {
		s.CPUs, s.CPUCapped = p.HostCPUs, true
	}

	s.Workload = podValue(pod, v1.ResourceMemory, DefaultMemory)
	if !everyContainerLimited(pod, v1.ResourceMemory) {
		s.Workload = addSaturating(s.Workload, s.MemoryVolumes)
	}
	s.Workload = max(s.Workload, MinWorkload)
	s.Memory = roundUp(addSaturating(s.Workload, p.guestShare(pod, s.Workload)), mib)
	if p.HostMemory > 0 && s.Memory > p.HostMemory {
		s.Memory, s.MemoryCapped = p.HostMemory/mib*mib, true
		s.Workload = max(s.Memory-p.guestShare(pod, s.Memory), 0)
	}
	s.EphemeralBytes = ephemeral(pod, p.EphemeralDefault)
	return s
}

// Requests returns what the pod asks of the host for certain: its requests
// (a container without any counts nothing), in millicores and bytes.
func Requests(pod *v1.Pod) (milliCPU, memory, ephemeralBytes int64) {
	none := func(v1.Container, v1.ResourceName) int64 { return 0 }
	req := func(name v1.ResourceName) int64 {
		sum := aggregate(pod, name, func(c v1.Container, n v1.ResourceName) int64 {
			if q, ok := c.Resources.Requests[n]; ok {
				return value(q, n)
			}
			return none(c, n)
		})
		if r := pod.Spec.Resources; r != nil {
			if q, ok := r.Requests[name]; ok {
				sum = value(q, name)
			}
		}
		if q, ok := pod.Spec.Overhead[name]; ok {
			sum = addSaturating(sum, value(q, name))
		}
		return sum
	}
	return req(v1.ResourceCPU), req(v1.ResourceMemory), req(v1.ResourceEphemeralStorage)
}

// DiskRoom is what the writable disk has on top of the limits it was sized
// from: a tenth, at least 64 MiB, for the file system's own structures and
// for the time until the kubelet has noticed and evicts.
func DiskRoom(limit int64) int64 { return max(limit/10, 64*mib) }

// String is the size as people read it.
func (s Size) String() string {
	return fmt.Sprintf("%d CPU, %d MiB memory, %d MiB disk", s.CPUs, s.Memory/mib, s.EphemeralBytes/mib)
}

func (p Policy) withDefaults() Policy {
	if p.EphemeralDefault == 0 {
		p.EphemeralDefault = DefaultEphemeral
	}
	if p.GuestFixed == 0 {
		p.GuestFixed = DefaultGuestFixed
	}
	if p.GuestPerByte == 0 {
		p.GuestPerByte = DefaultGuestPerByte
	}
	return p
}

// GuestShare is what a guest keeps of its RAM for itself, in bytes, by the
// default policy, when its containers may use workload bytes.
func GuestShare(workload int64) int64 {
	return Policy{}.withDefaults().guestShare(&v1.Pod{}, workload)
}

// guestShare is the RAM (bytes) that a VM with so much workload memory needs
// for itself. A pod overhead smaller than what was measured does not shrink
// it: the guest would not boot.
func (p Policy) guestShare(pod *v1.Pod, workload int64) int64 {
	share := p.GuestFixed + workload/p.GuestPerByte
	if q, ok := pod.Spec.Overhead[v1.ResourceMemory]; ok {
		share = max(share, q.Value())
	}
	return share
}

// podValue applies the rule of the package comment to one resource. The unit
// is millicores for CPU and bytes for everything else.
func podValue(pod *v1.Pod, name v1.ResourceName, missing int64) int64 {
	sum := aggregate(pod, name, func(c v1.Container, n v1.ResourceName) int64 {
		v, ok := largest(c.Resources.Requests, c.Resources.Limits, n)
		if !ok {
			return missing
		}
		return v
	})
	r := pod.Spec.Resources
	if r == nil {
		return sum
	}
	if q, ok := r.Limits[name]; ok {
		v, _ := largest(r.Requests, r.Limits, name)
		return max(v, value(q, name))
	}
	if q, ok := r.Requests[name]; ok {
		return max(sum, value(q, name))
	}
	return sum
}

// aggregate sums as Kubernetes does: sidecars stay, init containers run one
// after the other beside the sidecars that were started before them.
func aggregate(pod *v1.Pod, name v1.ResourceName, of func(v1.Container, v1.ResourceName) int64) int64 {
	var running, sidecars, peak int64
	for _, c := range pod.Spec.Containers {
		running = addSaturating(running, of(c, name))
	}
	for _, c := range pod.Spec.InitContainers {
		v := of(c, name)
		if c.RestartPolicy != nil && *c.RestartPolicy == v1.ContainerRestartPolicyAlways {
			running = addSaturating(running, v)
			sidecars = addSaturating(sidecars, v)
			v = sidecars
		} else {
			v = addSaturating(v, sidecars)
		}
		peak = max(peak, v)
	}
	return max(running, peak)
}

func largest(requests, limits v1.ResourceList, name v1.ResourceName) (int64, bool) {
	var v int64
	r, inRequests := requests[name]
	l, inLimits := limits[name]
	if inRequests {
		v = value(r, name)
	}
	if inLimits {
		v = max(v, value(l, name))
	}
	return v, inRequests || inLimits
}

func value(q resource.Quantity, name v1.ResourceName) int64 {
	if name == v1.ResourceCPU {
		return q.MilliValue()
	}
	return q.Value()
}

func everyContainerLimited(pod *v1.Pod, name v1.ResourceName) bool {
	if r := pod.Spec.Resources; r != nil {
		if _, ok := r.Limits[name]; ok {
			return true
		}
	}
	for _, c := range pod.Spec.Containers {
		if _, ok := c.Resources.Limits[name]; !ok {
			return false
		}
	}
	return true
}

func memoryVolumes(pod *v1.Pod) int64 {
	return sumEmptyDirs(pod, v1.StorageMediumMemory)
}

func sumEmptyDirs(pod *v1.Pod, medium v1.StorageMedium) (sum int64) {
	for _, v := range pod.Spec.Volumes {
		if e := v.EmptyDir; e != nil && e.Medium == medium && e.SizeLimit != nil {
			sum = addSaturating(sum, e.SizeLimit.Value())
		}
	}
	return sum
}

func ephemeral(pod *v1.Pod, byDefault int64) int64 {
	sum := aggregate(pod, v1.ResourceEphemeralStorage, func(c v1.Container, n v1.ResourceName) int64 {
		v, _ := largest(c.Resources.Requests, c.Resources.Limits, n)
		return v
	})
	volumes := sumEmptyDirs(pod, v1.StorageMediumDefault)
	if everyContainerLimited(pod, v1.ResourceEphemeralStorage) {
		return roundUp(max(addSaturating(sum, DiskRoom(sum)), MinEphemeral), mib)
	}
	need := max(sum, volumes)
	if need > 0 {
		need = addSaturating(need, DiskRoom(need))
	}
	return roundUp(max(need, byDefault, MinEphemeral), mib)
}

func addSaturating(a, b int64) int64 {
	if s := a + b; s >= a {
		return s
	}
	return 1<<63 - 1 - mib
}

func roundUp(v, unit int64) int64 {
	if r := v % unit; r != 0 {
		return v + unit - r
	}
	return v
}
