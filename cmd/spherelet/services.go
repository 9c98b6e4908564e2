package main

import (
	"context"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/openatoll/atoll/netplugin/proxy"
	"github.com/openatoll/atoll/spherelet"
)

// kubeconfigPoll is how often we look whether the node has joined.
const kubeconfigPoll = 100 * time.Millisecond

// serveServices runs upstream's kube-proxy in this process until ctx ends,
// with the node's own credentials, as soon as it has them.
func (h *host) serveServices(ctx context.Context) error {
	if !*h.cfg.KubeProxy {
		return nil
	}
	for {
		if _, err := os.Stat(h.cfg.Kubeconfig); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(kubeconfigPoll):
		}
	}
	ip, err := spherelet.NodeIP(h.cfg)
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(h.cfg.ClusterCIDR, ",")
	cidr, err := netip.ParsePrefix(first)
	if err != nil {
		return err // the configuration was checked
	}
	return ended(ctx, "kube-proxy", proxy.Run(ctx, proxy.Config{
		Kubeconfig: h.cfg.Kubeconfig, NodeName: h.cfg.NodeName, NodeIP: ip, ClusterCIDR: cidr,
	}))
}
