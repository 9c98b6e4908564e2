package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/cri"
	"github.com/openatoll/atoll/spherelet/config"
)

const criLong = `Serve the CRI alone, without the kubelet: for crictl, for test suites, and for a
kubelet that runs beside it.

The socket is RUNDIR/cri.sock, where RUNDIR is the configuration's runDir. Of the
configuration, what is about the kubelet and the cluster may be left out. Pods
get their addresses from --pod-cidr, or from the range that a client sets by
UpdateRuntimeConfig; until then none can be run.

On SIGTERM the VMs are left running, as ever; "spherelet cleanup" removes them.`

// defaultKubeletRoot is where a stock kubelet keeps its pods' volumes.
const defaultKubeletRoot = "/var/lib/kubelet"

func criCommand(file *string) *cobra.Command {
	var podCIDR, kubeletRoot string
	cmd := &cobra.Command{
		Use:   "cri --config FILE",
		Short: "Serve the CRI socket alone, for crictl and other kubelets",
		Long:  criLong,
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			cidrs, err := parseCIDRs(podCIDR)
			if err != nil {
				return err
			}
			cfg, err := start(*file, config.LoadRuntime, true)
			if err != nil {
				return err
			}
			tuneMemory()
			if err := raiseOpenFiles(); err != nil {
				return err
			}
			ctx, stop := signals()
			defer stop()
			return serveCRI(ctx, cfg, cidrs, kubeletRoot)
		},
	}
	cmd.Flags().StringVar(&podCIDR, "pod-cidr", "", "the `range` of this host's pods, such as 198.19.0.0/24")
	cmd.Flags().StringVar(&kubeletRoot, "kubelet-root", defaultKubeletRoot, "the root `directory` of the kubelet that uses the socket")
	return cmd
}

// raiseOpenFiles lets this process, and each QEMU that it starts, open as many
// files as it may. The image of a pod's container is some two files a layer,
// and the usual limit 1024; with the kubelet, upstream's code does this.
func raiseOpenFiles() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	l.Cur = l.Max
	return os.NewSyscallError("setrlimit", unix.Setrlimit(unix.RLIMIT_NOFILE, &l))
}

func parseCIDRs(s string) ([]netip.Prefix, error) {
	if s == "" {
		return nil, nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return nil, fmt.Errorf("--pod-cidr is %q, must be a range like 198.19.0.0/24: %w", s, errdefs.ErrInvalidArgument)
	}
	return []netip.Prefix{p}, nil
}

// serveCRI is run without the kubelet.
func serveCRI(ctx context.Context, cfg *v1alpha1.SphereletConfiguration, cidrs []netip.Prefix, kubeletRoot string) (err error) {
	paths, err := config.Prepare(cfg)
	if err != nil {
		return err
	}
	paths.Kubelet = kubeletRoot
	if err := config.KeepHostDirectoriesFrom(cfg, "--kubelet-root", kubeletRoot); err != nil {
		return err
	}
	unlock, err := lock(paths.Lock)
	if err != nil {
		return err
	}
	defer unlock()
	h := &host{cfg: cfg, paths: paths}
	defer func() { err = errors.Join(err, h.close()) }()
	if err := h.open(ctx); err != nil {
		return err
	}
	if len(cidrs) > 0 {
		if err := h.network.Configure(ctx, cidrs); err != nil {
			return fmt.Errorf("--pod-cidr: %w", err)
		}
	}
	if err := serveHints(ctx, h); err != nil {
		return err
	}
	listener, err := cri.Listen(paths.CRISocket)
	if err != nil {
		return err
	}
	slog.Info("CRI is served", "socket", paths.CRISocket)
	return ended(ctx, "the CRI server", h.runtime.Serve(ctx, listener))
}
