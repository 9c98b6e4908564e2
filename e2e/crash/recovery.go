package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// poll is the pause between two looks, and with it how exact times are.
	// More looks would cost those who are looked at what they need themselves.
	poll = 100 * time.Millisecond
	// backLimit is when a spherelet that is not back is given up.
	backLimit = 2 * time.Minute
)

// A recovery is what followed one kill. Times are seconds from the kill.
type recovery struct {
	Kill int `json:"kill"`
	// Alive is how long the killed spherelet had run, in seconds.
	Alive float64 `json:"alive"`
	// Interrupted says that the next kill came before all was back; then
	// there are no times.
	Interrupted bool `json:"interrupted,omitempty"`
	// Listed: the CRI lists every pod's sandbox ready and its containers
	// running, as they were. Agents: every guest's agent answers. Exec: a
	// `kubectl exec` succeeds. Node: the kubelet has renewed the node's lease.
	Listed float64 `json:"listed"`
	Agents float64 `json:"agents"`
	Exec   float64 `json:"exec"`
	Node   float64 `json:"node"`
	// Back is the last of them.
	Back float64 `json:"back"`
	// Load is the host's load average (1 min) then.
	Load float64 `json:"load"`
}

// A target is what must be back.
type target struct {
	client *client
	socket string
	node   string
	// containers are the IDs of all that ran; podUIDs their pods'.
	containers []string
	podUIDs    []string
	pods       []string
}

// measure waits until all is back after a kill at the time given, and fills r.
func (t *target) measure(ctx context.Context, at time.Time, r *recovery) error {
	ctx, cancel := context.WithDeadlineCause(ctx, at.Add(backLimit), fmt.Errorf("not back %s after the kill", backLimit))
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		conn, err := t.dial(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		rt := runtimeapi.NewRuntimeServiceClient(conn)
		if err := until(ctx, "the CRI's lists", func(ctx context.Context) error { return t.listed(ctx, rt) }); err != nil {
			return err
		}
		r.Listed = time.Since(at).Seconds()
		if err := until(ctx, "the guests' agents", func(ctx context.Context) error { return t.answered(ctx, rt) }); err != nil {
			return err
		}
		r.Agents = time.Since(at).Seconds()
		return nil
	})
	g.Go(func() error {
		pod := t.pods[r.Kill%len(t.pods)]
		err := until(ctx, "kubectl exec", func(ctx context.Context) error {
			out, err := t.client.exec(ctx, pod, writer, "echo", "here")
			if err == nil && out != "here\n" {
				return fmt.Errorf("printed %q", out)
			}
			return err
		})
		r.Exec = time.Since(at).Seconds()
		return err
	})
	g.Go(func() error {
		err := until(ctx, "the node's lease", func(ctx context.Context) error {
			l, err := t.client.CoordinationV1().Leases("kube-node-lease").Get(ctx, t.node, metav1.GetOptions{})
			if err == nil && (l.Spec.RenewTime == nil || l.Spec.RenewTime.Before(&metav1.MicroTime{Time: at})) {
				err = fmt.Errorf("was last renewed at %s", l.Spec.RenewTime)
			}
			return err
		})
		r.Node = time.Since(at).Seconds()
		return err
	})
	err := g.Wait()
	r.Back = max(r.Agents, r.Exec, r.Node)
	return err
}

// until repeats what may fail until it succeeds or ctx ends.
func until(ctx context.Context, what string, f func(context.Context) error) error {
	for {
		// One attempt at a time, and time for it: those that a busy guest has
		// not answered yet are still its work.
		try, cancel := context.WithTimeout(ctx, 45*time.Second)
		err := f(try)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return fmt.Errorf("%s: %w (%w)", what, err, context.Cause(ctx))
		}
	}
}

// dial returns a connection to the CRI socket that does not wait longer and
// longer between its attempts.
func (t *target) dial(ctx context.Context) (conn *grpc.ClientConn, err error) {
	err = until(ctx, "the CRI socket", func(ctx context.Context) error {
		conn, err = grpc.NewClient("unix://"+t.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
		if err != nil {
			return err
		}
		if _, err = runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
			conn.Close()
		}
		return err
	})
	return conn, err
}

func (t *target) listed(ctx context.Context, rt runtimeapi.RuntimeServiceClient) error {
	sandboxes, err := rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}}})
	if err != nil {
		return err
	}
	containers, err := rt.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}}})
	if err != nil {
		return err
	}
	var ready, running []string
	for _, s := range sandboxes.Items {
		ready = append(ready, s.GetMetadata().GetUid())
	}
	for _, c := range containers.Containers {
		running = append(running, c.Id)
	}
	return missing(t.podUIDs, ready, t.containers, running)
}

func missing(wantPods, pods, wantContainers, containers []string) error {
	var none []string
	for _, p := range wantPods {
		if !slices.Contains(pods, p) {
			none = append(none, "pod "+p)
		}
	}
	for _, c := range wantContainers {
		if !slices.Contains(containers, c) {
			none = append(none, "container "+c)
		}
	}
	if len(none) > 0 {
		return fmt.Errorf("missing: %s", strings.Join(none, ", "))
	}
	return nil
}

// answered asks for statistics, which only the guests can give.
func (t *target) answered(ctx context.Context, rt runtimeapi.RuntimeServiceClient) error {
	stats, err := rt.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
	if err != nil {
		return err
	}
	var answered []string
	for _, s := range stats.Stats {
		if s.GetCpu().GetUsageCoreNanoSeconds() != nil {
			answered = append(answered, s.GetAttributes().GetId())
		}
	}
	return missing(nil, nil, t.containers, answered)
}
