package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"net"

	"github.com/openatoll/atoll/cri"
	"github.com/openatoll/atoll/netplugin/tap"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/image"
	"github.com/openatoll/atoll/storage/local"
)

// benchPods is a range beside the cluster's own, inside the cluster's network
// namespace, and nowhere else.
var benchPods = netip.MustParsePrefix("198.19.240.0/24")

// benchSandbox measures RunPodSandbox on a CRI server of its own, over its
// socket, without a kubelet and without a hint.
func benchSandbox(ctx context.Context, vm *vmBench, n int, all *results) error {
	images, err := image.Open(ctx, image.Config{Root: filepath.Join(vm.dir, "images"), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer images.Close()
	client, end, err := serveCRI(ctx, vm, images)
	if err != nil {
		return err
	}
	defer end()
	var samples []float64
	for i := range n + 1 {
		took, err := oneSandbox(ctx, client, vm.dir)
		if err != nil {
			return err
		}
		say("sandbox %d of %d: %.0f ms", i, n, took)
		if i > 0 {
			samples = append(samples, took)
		}
	}
	all.add("run_pod_sandbox", "ms", samples).to(*all, "raw_boot", 0)
	return nil
}

// serveCRI runs a CRI server in this process, on the machines of vm, until end
// is called.
func serveCRI(ctx context.Context, vm *vmBench, images storage.Images) (_ runtimeapi.RuntimeServiceClient, end func(), err error) {
	log := slog.New(slog.DiscardHandler)
	var ends []func()
	end = func() {
		for _, f := range slices.Backward(ends) {
			f()
		}
	}
	defer func() {
		if err != nil {
			end()
		}
	}()
	network, err := tap.New(tap.Config{StateDir: filepath.Join(vm.dir, "net"), NodeIP: netip.MustParseAddr("198.18.0.1"), Logger: log})
	if err != nil {
		return nil, nil, err
	}
	ends = append(ends, func() { network.Close() })
	if err := network.Configure(ctx, []netip.Prefix{benchPods}); err != nil {
		return nil, nil, err
	}
	ephemeral, err := local.NewEphemeral(local.Config{Dir: filepath.Join(vm.dir, "disks")})
	if err != nil {
		return nil, nil, err
	}
	server, err := cri.New(ctx, cri.Config{
		Driver: vm.driver, Network: network, Images: images, Ephemeral: ephemeral,
		StateDir: filepath.Join(vm.dir, "cri"), Logger: log,
	})
	if err != nil {
		return nil, nil, err
	}
	ends = append(ends, func() { server.Close() })
	socket := filepath.Join(vm.dir, "cri.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	go func() { _ = server.Serve(ctx, l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	ends = append(ends, func() { conn.Close() })
	return runtimeapi.NewRuntimeServiceClient(conn), end, nil
}

func oneSandbox(ctx context.Context, c runtimeapi.RuntimeServiceClient, dir string) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	uid := uuid.NewString()
	logs := filepath.Join(dir, "podlogs", uid)
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return 0, err
	}
	start := time.Now()
	r, err := c.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: "bench", Namespace: "bench", Uid: uid},
		Hostname:     "bench",
		LogDirectory: logs,
		Linux:        &runtimeapi.LinuxPodSandboxConfig{},
	}})
	took := ms(start)
	if err != nil {
		return 0, fmt.Errorf("RunPodSandbox: %w", err)
	}
	if _, err := c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		return 0, fmt.Errorf("StopPodSandbox: %w", err)
	}
	if _, err := c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
		return 0, fmt.Errorf("RemovePodSandbox: %w", err)
	}
	return took, nil
}
