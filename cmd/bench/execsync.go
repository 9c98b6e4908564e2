package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// execSamples is how often a command is run either way.
const execSamples = 50

// plainCommand does nothing, and is no shell's built-in.
var plainCommand = []string{"/bin/true"}

// execSync measures ExecSync of a command that does nothing, beside a program
// in the same container that forks and executes it: the first is all that a
// runtime adds, namespaces, cgroup, capabilities, seccomp, two round trips. The
// VM's CPU time of each tells the same with neighbours that load the host.
func (b *criBench) execSync(ctx context.Context, all *results) error {
	p, err := b.pod(ctx, benchImage, "sleep", "3600")
	defer func() { _ = removePod(ctx, b.rt, p) }()
	if err != nil {
		return err
	}
	vm, err := vmProcess(p.uid)
	if err != nil {
		return err
	}
	var samples, forks []float64
	var execCPU, forkCPU []float64 // of the VM, a lot's mean
	// Turn by turn, in lots, so that a neighbour's load is in both.
	const lots = 5
	for lot := range lots + 1 {
		var times []float64
		cpu := [3]float64{}
		if cpu[0], err = runTime(vm); err != nil {
			return err
		}
		for range execSamples / lots {
			start := time.Now()
			if _, err := b.exec(ctx, p, plainCommand...); err != nil {
				return err
			}
			times = append(times, ms(start))
		}
		if cpu[1], err = runTime(vm); err != nil {
			return err
		}
		out, err := b.exec(ctx, p, append([]string{"/inguest", "fork", strconv.Itoa(execSamples / lots)}, plainCommand...)...)
		if err != nil {
			return err
		}
		if cpu[2], err = runTime(vm); err != nil {
			return err
		}
		if lot == 0 {
			continue // warm
		}
		each := (cpu[1] - cpu[0]) / (execSamples / lots)
		execCPU = append(execCPU, each)
		// The forks came by an exec themselves.
		forkCPU = append(forkCPU, (cpu[2]-cpu[1]-each)/(execSamples/lots))
		samples = append(samples, times...)
		for _, f := range strings.Fields(out) {
			us, err := strconv.ParseFloat(f, 64)
			if err != nil {
				return fmt.Errorf("inguest said %q", f)
			}
			forks = append(forks, us/1000)
		}
	}
	all.add("fork_exec", "ms", forks)
	guest, err := guestTimes(b.log.Name())
	if err != nil {
		return err
	}
	r := all.add("exec_sync", "ms", samples)
	r.Guest = median(guest["ExecSync"])
	r.to(*all, "fork_exec", 0)
	ratio := r.Ratio
	all.add("exec_ratio", "x", []float64{ratio})
	all.add("fork_exec_cpu", "ms", forkCPU)
	all.add("exec_sync_cpu", "ms", execCPU).to(*all, "fork_exec_cpu", 0)
	return nil
}

// exec runs a command and returns its output.
func (b *criBench) exec(ctx context.Context, p criPod, cmd ...string) (string, error) {
	r, err := b.rt.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: p.container, Cmd: cmd, Timeout: 60})
	if err != nil {
		return "", err
	}
	if r.ExitCode != 0 {
		return "", fmt.Errorf("%s ended with %d: %s", cmd[0], r.ExitCode, r.Stderr)
	}
	return string(r.Stdout), nil
}
