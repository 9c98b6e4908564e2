// Command bench measures what docs/spec.md promises and writes build/bench.json.
//
// It brings up an isolated cluster of its own, measures inside its network
// namespace, and takes it down. Figures that are promises are ratios to a raw
// boot of the same kernel and initramfs, taken turn by turn in the same run,
// so that a slow or busy machine changes both.
//
//	bench [-n 10] [-out build/bench.json]
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/openatoll/atoll/vmpod/qemu"
)

// insideEnv holds the data directory in the run inside the cluster.
const insideEnv = "ATOLL_BENCH_DATA"

func main() {
	qemu.RunProbeChild()
	n := flag.Int("n", 10, "measurements of each figure, at least 10")
	out := flag.String("out", "build/bench.json", "where the figures go")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch data := os.Getenv(insideEnv); {
	case *n < 10:
		err = fmt.Errorf("-n %d: a median and a p99 want at least 10", *n)
	case data != "":
		err = measure(ctx, data, *n, *out)
	default:
		err = withCluster(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// withCluster runs this program once more inside a cluster made for it.
func withCluster(ctx context.Context) (err error) {
	atoll, err := filepath.Abs("bin/atoll")
	if err != nil {
		return err
	}
	if _, err := os.Stat(atoll); err != nil {
		return fmt.Errorf("%w: run `make build`, and bench from the top of the checkout", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	data, err := os.MkdirTemp("", "atoll-bench-")
	if err != nil {
		return err
	}
	defer func() {
		down := exec.Command(atoll, "--data-dir", data, "down", "--purge")
		if b, derr := down.CombinedOutput(); derr != nil && err == nil {
			err = fmt.Errorf("atoll down --purge: %w\n%s", derr, b)
		}
	}()
	say("bringing a cluster up")
	if b, err := exec.CommandContext(ctx, atoll, "--data-dir", data, "up", "--isolated").CombinedOutput(); err != nil {
		return fmt.Errorf("atoll up: %w\n%s", err, b)
	}
	cmd := exec.CommandContext(ctx, atoll, append([]string{"--data-dir", data, "enter", "--", self}, os.Args[1:]...)...)
	cmd.Env = append(os.Environ(), insideEnv+"="+data)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	return cmd.Run()
}

// measure takes every figure, prints the table and writes the file.
func measure(ctx context.Context, data string, n int, out string) error {
	guest, err := guestDir(data)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "atoll-bench-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var all results
	vm, err := newVMBench(dir, guest)
	if err != nil {
		return err
	}
	defer vm.close()
	if err := vm.run(ctx, n, &all); err != nil {
		return fmt.Errorf("machines: %w", err)
	}
	if err := benchSandbox(ctx, vm, n, &all); err != nil {
		return fmt.Errorf("sandboxes: %w", err)
	}
	pods, err := newPodBench(data)
	if err != nil {
		return err
	}
	if err := pods.run(ctx, n, &all); err != nil {
		return fmt.Errorf("pods: %w", err)
	}
	all.table(os.Stdout)
	say("guest kernel: %s (%s), accelerator: %s", vm.guest.KernelRelease, vm.guest.Flavour, vm.accelerator)
	return all.write(out)
}

// say reports progress: measuring takes minutes.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
