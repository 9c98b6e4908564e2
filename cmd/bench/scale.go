package main

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/cri"
)

// scalePods is more than a machine for tests can boot.
const scalePods = 100

// benchScale measures the polled calls with a hundred sandboxes. The runtime
// is the real one, in this process; what is below it is made up (fakes.go).
func benchScale(ctx context.Context, all *results) (err error) {
	dir, err := os.MkdirTemp("", "atoll-bench-scale-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	server, err := cri.New(ctx, cri.Config{
		Driver: newFakeDriver(), Network: fakeNetwork{}, Images: fakeImages{}, Ephemeral: fakeEphemeral{},
		StateDir: filepath.Join(dir, "cri"), Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	socket := filepath.Join(dir, "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	go func() { _ = server.Serve(ctx, l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return err
	}
	defer conn.Close()
	rt := runtimeapi.NewRuntimeServiceClient(conn)
	say("making %d sandboxes on machines that are not real", scalePods)
	pods := make([]criPod, scalePods)
	var g errgroup.Group
	g.SetLimit(8)
	for i := range pods {
		g.Go(func() (err error) {
			pods[i], err = startPod(ctx, rt, filepath.Join(dir, "logs"), pauseImage)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return runPolls(ctx, conn, pods, allocations(conn), all)
}
