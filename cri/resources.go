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

// UpdateContainerResources changes a container's limits inside its guest. They
// may not exceed the machine.
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
	if err := fits(sb, merged); err != nil {
		return nil, fmt.Errorf("update container %s: %w", c.ID, err)
	}
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

// fits refuses what the machine cannot give: it does not grow yet.
func fits(sb *sandbox, r *runtimeapi.LinuxContainerResources) error {
	if m := r.GetMemoryLimitInBytes(); m > sb.Memory {
		return fmt.Errorf("memory limit %d MiB is above the pod VM's %d MiB, and a running VM does not grow: recreate the pod with the larger limit: %w", m/mib, sb.Memory/mib, errdefs.ErrFailedPrecondition)
	}
	if q, p := r.GetCpuQuota(), r.GetCpuPeriod(); q > 0 && p > 0 && q > int64(sb.CPUs)*p {
		return fmt.Errorf("CPU limit %.2f is above the pod VM's %d CPUs, and a running VM does not grow: recreate the pod with the larger limit: %w", float64(q)/float64(p), sb.CPUs, errdefs.ErrFailedPrecondition)
	}
	return nil
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

// UpdatePodSandboxResources is where a machine would grow before its
// containers may use more. What fits already needs nothing.
func (r *runtimeService) UpdatePodSandboxResources(_ context.Context, req *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	sb, err := r.findSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if sb.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return nil, fmt.Errorf("sandbox %s is not ready: %w", sb.ID, errdefs.ErrFailedPrecondition)
	}
	if err := fits(sb, req.GetResources()); err != nil {
		return nil, fmt.Errorf("update sandbox %s: %w", sb.ID, err)
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}
