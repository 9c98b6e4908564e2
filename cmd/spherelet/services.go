package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/api/v1alpha1"
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
	if !h.joined(ctx) {
		return nil
	}
	if err := claimServices(ctx, h.cfg); err != nil {
		return err
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

// Names in the run directory, beside those of config.PathsOf.
const (
	vmSocketsName    = "vm"
	secretsName      = "secrets"
	servicesMarkName = "kube-proxy"
)

// servicesMark says that the packet filter's table "kube-proxy", whose name is
// upstream's, is ours: another node agent of this host may have one as well.
// Like the table it does not outlive the host's next start.
func servicesMark(cfg *v1alpha1.SphereletConfiguration) string {
	return filepath.Join(cfg.RunDir, servicesMarkName)
}

// claimServices refuses to write into a table that somebody else has made.
func claimServices(ctx context.Context, cfg *v1alpha1.SphereletConfiguration) error {
	mark := servicesMark(cfg)
	if _, err := os.Stat(mark); err == nil {
		return nil
	}
	there, err := proxy.Present(ctx)
	if err != nil {
		return err
	}
	if there {
		return fmt.Errorf("nftables has a table \"ip kube-proxy\" that this spherelet did not make: set kubeProxy: false if another kube-proxy serves this host, or remove the table (nft delete table ip kube-proxy) if nothing does: %w", errdefs.ErrAlreadyExists)
	}
	return os.WriteFile(mark, nil, 0o600)
}
