package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// benchmarkParams is upstream's file of benchmark parameters: n samples of each
// kind, one after another.
const benchmarkParams = `containersNumber: %[1]d
containersNumberParallel: 1
containerBenchmarkTimeoutSeconds: 120
podsNumber: %[1]d
podsNumberParallel: 1
podBenchmarkTimeoutSeconds: 120
imagesNumber: %[1]d
imagesNumberParallel: 1
imageBenchmarkTimeoutSeconds: 120
podContainerStartBenchmarkTimeoutSeconds: 120
`

// runBenchmark runs the suite's benchmarks, which write their samples into
// o.samples, in upstream's form.
func runBenchmark(ctx context.Context, o options, r *runtime) error {
	dir, err := filepath.Abs(o.samples)
	if err != nil {
		return err
	}
	program, err := filepath.Abs(filepath.Join(o.build, "critest", "critest.test"))
	if err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	params := filepath.Join(r.dir, "benchmark.yaml")
	if err := os.WriteFile(params, fmt.Appendf(nil, benchmarkParams, o.benchmark), 0o600); err != nil {
		return err
	}
	said, err := os.Create(filepath.Join(dir, "output.txt"))
	if err != nil {
		return err
	}
	defer said.Close()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "-benchmark", "-benchmarking-params-file="+params, "-benchmarking-output-dir="+dir, "-runtime-endpoint=unix://"+r.socket)
	cmd.Dir = r.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the benchmarks: %w: see %s", err, said.Name())
	}
	return nil
}
