package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

// Version says who answers.
func (r *runtimeService) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: RuntimeName, RuntimeVersion: r.config.Version, RuntimeApiVersion: "v1"}, nil
}

// Status says whether pods can be run, and if not, why.
func (r *runtimeService) Status(ctx context.Context, req *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	features := &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: true}
	resp := &runtimeapi.StatusResponse{
		Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
			condition(runtimeapi.RuntimeReady, "HypervisorNotReady", r.runtimeReady(ctx)),
			condition(runtimeapi.NetworkReady, "NetworkNotReady", r.config.Network.Ready(ctx)),
		}},
		RuntimeHandlers: []*runtimeapi.RuntimeHandler{{Name: "", Features: features}, {Name: RuntimeName, Features: features}},
		Features:        &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: true},
	}
	resp.Status.Conditions = append(resp.Status.Conditions, r.healthConditions()...)
	if req.GetVerbose() {
		info, err := json.Marshal(r.View(ctx))
		if err != nil {
			return nil, err
		}
		resp.Info = map[string]string{"config": string(info)}
	}
	return resp, nil
}

func condition(typ, reason string, err error) *runtimeapi.RuntimeCondition {
	if err != nil {
		return &runtimeapi.RuntimeCondition{Type: typ, Reason: reason, Message: err.Error()}
	}
	return &runtimeapi.RuntimeCondition{Type: typ, Status: true}
}

// runtimeReady asks the hypervisor for its list, and for what it needs: it
// answers, or pods cannot be run.
func (s *Server) runtimeReady(ctx context.Context) error {
	if s.ctx.Err() != nil {
		return errServerClosed
	}
	if _, err := s.config.Driver.List(ctx); err != nil {
		return err
	}
	if c, ok := s.config.Driver.(vmpod.Checker); ok {
		return c.Ready(ctx)
	}
	return nil
}

// RuntimeConfig tells the kubelet which cgroup driver to think in. Containers
// have cgroups in their guests, by file.
func (r *runtimeService) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: runtimeapi.CgroupDriver_CGROUPFS}}, nil
}

// UpdateRuntimeConfig takes the node's pod CIDRs, comma-separated.
func (r *runtimeService) UpdateRuntimeConfig(ctx context.Context, req *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	text := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if text == "" {
		return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
	}
	var cidrs []netip.Prefix
	for _, part := range strings.Split(text, ",") {
		c, err := netip.ParsePrefix(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("network_config.pod_cidr %q: %w: %w", text, err, errdefs.ErrInvalidArgument)
		}
		cidrs = append(cidrs, c)
	}
	if err := r.config.Network.Configure(ctx, cidrs); err != nil {
		return nil, fmt.Errorf("pod CIDR %s: %w", text, err)
	}
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}
