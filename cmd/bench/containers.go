package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// containerSamples is how many containers are made one after another.
const containerSamples = 20

// A containerStep is one call in a container's life.
type containerStep struct {
	name, rpc string
	call      func(ctx context.Context, id *string, i int) error
	took, cpu []float64
}

// containers measures a container's life in a pod that has run one of the same
// image already: without the plugging of the image's disk, and with all in the
// guest that is made once. The VM's CPU time of each call is told as well; it
// does not grow with the neighbours' load.
func (b *criBench) containers(ctx context.Context, all *results) (err error) {
	p, err := b.pod(ctx, benchImage, "sleep", "3600")
	defer func() { err = errors.Join(err, removePod(ctx, b.rt, p)) }()
	if err != nil {
		return err
	}
	vm, err := vmProcess(p.uid)
	if err != nil {
		return err
	}
	steps := b.containerSteps(p)
	for i := range containerSamples + 1 {
		id := ""
		for s := range steps {
			step := &steps[s]
			before, err := runTime(vm)
			if err != nil {
				return err
			}
			start := time.Now()
			if err := step.call(ctx, &id, i); err != nil {
				return fmt.Errorf("%s: %w", step.rpc, err)
			}
			took := ms(start)
			after, err := runTime(vm)
			if err != nil {
				return err
			}
			if i > 0 {
				step.took, step.cpu = append(step.took, took), append(step.cpu, after-before)
			}
		}
	}
	guest, err := guestTimes(b.log.Name())
	if err != nil {
		return err
	}
	for _, step := range steps {
		r := all.add(step.name, "ms", step.took)
		// The last of them are these; RemoveContainer and the like are called
		// by nobody else here.
		g := guest[step.rpc]
		r.Guest = median(g[max(0, len(g)-containerSamples):])
		all.add(step.name+"_cpu", "ms", step.cpu)
	}
	return nil
}

func (b *criBench) containerSteps(p criPod) []containerStep {
	return []containerStep{
		{name: "next_create_container", rpc: "CreateContainer", call: func(ctx context.Context, id *string, i int) error {
			c, err := b.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
				PodSandboxId: p.sandbox, SandboxConfig: p.config, Config: containerConfig(fmt.Sprintf("next-%d", i), benchImage, "sleep", "3600"),
			})
			*id = c.GetContainerId()
			return err
		}},
		{name: "next_start_container", rpc: "StartContainer", call: func(ctx context.Context, id *string, _ int) error {
			_, err := b.rt.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: *id})
			return err
		}},
		{name: "next_stop_container", rpc: "StopContainer", call: func(ctx context.Context, id *string, _ int) error {
			_, err := b.rt.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: *id})
			return err
		}},
		{name: "next_remove_container", rpc: "RemoveContainer", call: func(ctx context.Context, id *string, _ int) error {
			_, err := b.rt.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: *id})
			return err
		}},
	}
}
