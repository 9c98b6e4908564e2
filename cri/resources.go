package cri

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// UpdateContainerResources changes a container's limits inside its guest, and
// grows the machine before if they would exceed it.
func (r *runtimeService) UpdateContainerResources(ctx context.Context, req *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	c, err := r.findContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if req.GetWindows() != nil {
		return nil, refuse("windows", "pod VMs run Linux")
	}
	if req.GetLinux() == nil {
		return &runtimeapi.UpdateContainerResourcesResponse{}, nil
	}
	if err := checkResources("linux", req.GetLinux()); err != nil {
		return nil, err
	}
	p, sb, err := r.podOf(c.SandboxID)
	if err != nil {
		return nil, err
	}
	if err := p.makeRoom(ctx, r.needsOf(sb, req.Linux)); err != nil {
		return nil, fmt.Errorf("update container %s: %w", c.ID, err)
	}
	unlock, err := p.process(c.ID).lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if c, err = r.findContainer(c.ID); err != nil {
		return nil, err
	}
	if c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
		return nil, fmt.Errorf("container %s has ended: %w", c.ID, errdefs.ErrFailedPrecondition)
	}
	merged := mergeResources(c.Resources, req.Linux)
	limits, unified := linuxResources(merged)
	b, err := json.Marshal(limits)
	if err != nil {
		return nil, err
	}
	if _, err := call(ctx, p.link, agentapi.AgentService.UpdateContainer, &agentapi.UpdateContainerRequest{Id: c.ID, Resources: b, Unified: unified}); err != nil {
		return nil, fmt.Errorf("update container %s: %w", c.ID, err)
	}
	err = r.store.updateContainer(c.ID, noEvent, func(c *container) bool {
		c.Resources = merged
		return true
	})
	return &runtimeapi.UpdateContainerResourcesResponse{}, err
}

// needsOf is the VM that a container with these limits must have at least. What
// fits into the VM that is there, with no share for the guest, needs no more.
func (s *Server) needsOf(sb *sandbox, r *runtimeapi.LinuxContainerResources) size {
	z := size{cpus: sb.CPUs, memory: sb.Memory}
	if m := r.GetMemoryLimitInBytes(); m > sb.Memory {
		z.memory = m + s.config.GuestOverhead(m)
	}
	if q, p := r.GetCpuQuota(), r.GetCpuPeriod(); q > 0 && p > 0 {
		z.cpus = max(z.cpus, wholeCPUs(q, p))
	}
	return z
}

// mergeResources keeps what the update leaves unset.
func mergeResources(old, update *runtimeapi.LinuxContainerResources) *runtimeapi.LinuxContainerResources {
	out := &runtimeapi.LinuxContainerResources{}
	if old != nil {
		out = proto.Clone(old).(*runtimeapi.LinuxContainerResources)
	}
	set := func(dst *int64, v int64) {
		if v != 0 {
			*dst = v
		}
	}
	set(&out.CpuPeriod, update.CpuPeriod)
	set(&out.CpuQuota, update.CpuQuota)
	set(&out.CpuShares, update.CpuShares)
	set(&out.MemoryLimitInBytes, update.MemoryLimitInBytes)
	set(&out.OomScoreAdj, update.OomScoreAdj)
	set(&out.MemorySwapLimitInBytes, update.MemorySwapLimitInBytes)
	out.CpusetCpus = firstOf(update.CpusetCpus, out.CpusetCpus)
	out.CpusetMems = firstOf(update.CpusetMems, out.CpusetMems)
	if len(update.Unified) > 0 {
		if out.Unified == nil {
			out.Unified = map[string]string{}
		}
		for k, v := range update.Unified {
			out.Unified[k] = v
		}
	}
	return out
}

// UpdatePodSandboxResources grows the machine to what the pod is to have, if it
// is not as large already, before its containers may use more. Less leaves the
// machine as it is.
func (r *runtimeService) UpdatePodSandboxResources(ctx context.Context, req *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	found, err := r.findSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	p, sb, err := r.podOf(found.ID)
	if err != nil {
		return nil, err
	}
	for field, res := range map[string]*runtimeapi.LinuxContainerResources{"resources": req.GetResources(), "overhead": req.GetOverhead()} {
		// The kubelet takes the overhead off limits that may be -1, "none"
		// (subtractOverheadFromResourceConfig).
		if res.GetMemoryLimitInBytes() < 0 || res.GetCpuQuota() < -1 {
			res = proto.Clone(res).(*runtimeapi.LinuxContainerResources)
			res.MemoryLimitInBytes, res.CpuQuota = max(res.MemoryLimitInBytes, 0), max(res.CpuQuota, -1)
		}
		if err := checkResources(field, res); err != nil {
			return nil, err
		}
	}
	needs := size{cpus: sb.CPUs, memory: sb.Memory}
	res := req.GetResources()
	if q, p := res.GetCpuQuota(), res.GetCpuPeriod(); q > 0 && p > 0 {
		needs.cpus = wholeCPUs(q, p)
	}
	if m := res.GetMemoryLimitInBytes(); m > 0 {
		needs.memory = m + max(r.config.GuestOverhead(m), req.GetOverhead().GetMemoryLimitInBytes())
	}
	if err := p.makeRoom(ctx, needs); err != nil {
		return nil, fmt.Errorf("update sandbox %s: %w", sb.ID, err)
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
