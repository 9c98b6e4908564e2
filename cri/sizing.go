package cri

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

const (
	mib = 1 << 20
	// defaultMemory and one vCPU are what a pod gets that says nothing, as
	// vSphere Pods do it (512 MB a container; CRI does not say how many).
	defaultMemory = 512 * mib
	// defaultEphemeral is the writable disk of a pod that sets no limit; it
	// is sparse.
	defaultEphemeral = 10 << 30
)

// defaultGuestOverhead is what a guest keeps for itself: kernel, page
// structures (1.56 % of RAM) and podinit.
func defaultGuestOverhead(memory int64) int64 { return 96*mib + memory/64 }

// A size is what a machine is launched with.
type size struct {
	cpus      int
	memory    int64
	ephemeral int64
	pool      string
	images    []string
	hint      *vmpod.Hint
}

// sizeOf decides a sandbox's size: from the hint, which knows the whole pod,
// else from the little that CRI carries.
func (s *Server) sizeOf(hint *vmpod.Hint, config *runtimeapi.PodSandboxConfig) size {
	if hint != nil {
		z := size{cpus: max(hint.CPUs, 1), memory: hint.Memory, ephemeral: hint.EphemeralBytes, pool: hint.Pool, images: hint.Images, hint: hint}
		if z.memory <= 0 {
			z.memory = defaultMemory + s.config.GuestOverhead(defaultMemory)
		}
		if z.ephemeral <= 0 {
			z.ephemeral = s.config.DefaultEphemeralBytes
		}
		return z
	}
	z := size{cpus: 1, memory: defaultMemory, ephemeral: s.config.DefaultEphemeralBytes}
	res := config.GetLinux().GetResources()
	if q, p := res.GetCpuQuota(), res.GetCpuPeriod(); q > 0 && p > 0 {
		z.cpus = wholeCPUs(q, p)
	}
	if m := res.GetMemoryLimitInBytes(); m > 0 {
		z.memory = m
	}
	z.memory += max(s.config.GuestOverhead(z.memory), config.GetLinux().GetOverhead().GetMemoryLimitInBytes())
	return z
}

// wholeCPUs is how many CPUs a quota takes, at least one.
func wholeCPUs(quota, period int64) int { return int(max(1, (quota+period-1)/period)) }
