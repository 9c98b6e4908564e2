package main

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	listedPods  = 10 // of real VMs
	listSamples = 100
	// statsSamples is lower, as each asks every guest, behind a rest in which
	// the answers before grow too old to be given again.
	statsSamples = 20
	statsRest    = 600 * time.Millisecond
)

// A poll is one of the calls that a kubelet makes again and again.
type poll struct {
	name, method string
	samples      int
	rest         time.Duration // before each; the call right behind it is a figure of its own
	most         float64       // promised for 100 sandboxes, in ms; 0: nothing
	request      func(criPod) proto.Message
	answer       func() proto.Message
	count        func(proto.Message) int // what the answer lists; nil for a single thing
}

var polls = []poll{
	{"list_sandboxes", "ListPodSandbox", listSamples, 0, 10, func(criPod) proto.Message { return &runtimeapi.ListPodSandboxRequest{} },
		func() proto.Message { return &runtimeapi.ListPodSandboxResponse{} },
		func(m proto.Message) int { return len(m.(*runtimeapi.ListPodSandboxResponse).Items) }},
	{"list_containers", "ListContainers", listSamples, 0, 10, func(criPod) proto.Message { return &runtimeapi.ListContainersRequest{} },
		func() proto.Message { return &runtimeapi.ListContainersResponse{} },
		func(m proto.Message) int { return len(m.(*runtimeapi.ListContainersResponse).Containers) }},
	{"container_status", "ContainerStatus", listSamples, 0, 10, func(p criPod) proto.Message { return &runtimeapi.ContainerStatusRequest{ContainerId: p.container} },
		func() proto.Message { return &runtimeapi.ContainerStatusResponse{} }, nil},
	{"sandbox_stats", "ListPodSandboxStats", statsSamples, statsRest, 0, func(criPod) proto.Message { return &runtimeapi.ListPodSandboxStatsRequest{} },
		func() proto.Message { return &runtimeapi.ListPodSandboxStatsResponse{} },
		func(m proto.Message) int { return len(m.(*runtimeapi.ListPodSandboxStatsResponse).Stats) }},
	{"container_stats", "ListContainerStats", statsSamples, statsRest, 0, func(criPod) proto.Message { return &runtimeapi.ListContainerStatsRequest{} },
		func() proto.Message { return &runtimeapi.ListContainerStatsResponse{} },
		func(m proto.Message) int { return len(m.(*runtimeapi.ListContainerStatsResponse).Stats) }},
}

// lists measures the polled calls with real VMs.
func (b *criBench) lists(ctx context.Context, all *results) error {
	return b.withPods(ctx, listedPods, func(pods []criPod) error {
		return runPolls(ctx, b.conn, pods, nil, all)
	})
}

// runPolls takes the samples of each poll; own, if it is set, prepares for
// counting what this process allocates.
func runPolls(ctx context.Context, conn *grpc.ClientConn, pods []criPod, own func(context.Context, poll, criPod) (allocs, bytes float64, err error), all *results) error {
	for _, p := range polls {
		var samples, again []float64
		for i := range p.samples + 1 {
			time.Sleep(p.rest)
			took, err := p.once(ctx, conn, pods, i)
			if err != nil {
				return err
			}
			if i > 0 {
				samples = append(samples, took)
			}
			if p.rest == 0 {
				continue
			}
			if took, err = p.once(ctx, conn, pods, i); err != nil {
				return err
			}
			again = append(again, took)
		}
		if len(again) > 0 {
			all.add(fmt.Sprintf("%s_again_%d", p.name, len(pods)), "ms", again)
		}
		r := all.add(fmt.Sprintf("%s_%d", p.name, len(pods)), "ms", samples)
		if own == nil {
			continue
		}
		if p.most > 0 {
			r.most(p.most)
		}
		var err error
		if r.Allocs, r.Bytes, err = own(ctx, p, pods[0]); err != nil {
			return err
		}
	}
	return nil
}

// once makes the call and returns how many milliseconds it took.
func (p poll) once(ctx context.Context, conn *grpc.ClientConn, pods []criPod, i int) (float64, error) {
	answer, start := p.answer(), time.Now()
	if err := conn.Invoke(ctx, "/runtime.v1.RuntimeService/"+p.method, p.request(pods[i%len(pods)]), answer); err != nil {
		return 0, err
	}
	took := ms(start)
	if p.count != nil && p.count(answer) != len(pods) {
		return 0, fmt.Errorf("%s lists %d of %d", p.method, p.count(answer), len(pods))
	}
	return took, nil
}

// rawCodec passes messages as they travel, so that a client in this process
// allocates nearly nothing.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (rawCodec) Name() string                       { return "proto" }

// allocations counts what one call allocates in this process, which has the
// server in it, and for stats the guests as well.
func allocations(conn *grpc.ClientConn) func(context.Context, poll, criPod) (float64, float64, error) {
	return func(ctx context.Context, p poll, of criPod) (float64, float64, error) {
		request, err := proto.Marshal(p.request(of))
		if err != nil {
			return 0, 0, err
		}
		const calls = 20
		var before, after runtime.MemStats
		var allocs, bytes float64
		for i := range calls + 1 {
			time.Sleep(p.rest)
			runtime.ReadMemStats(&before)
			var answer []byte
			if err := conn.Invoke(ctx, "/runtime.v1.RuntimeService/"+p.method, &request, &answer, grpc.ForceCodec(rawCodec{})); err != nil {
				return 0, 0, err
			}
			runtime.ReadMemStats(&after)
			if i > 0 {
				allocs += float64(after.Mallocs-before.Mallocs) / calls
				bytes += float64(after.TotalAlloc-before.TotalAlloc) / calls
			}
		}
		return allocs, bytes, nil
	}
}
