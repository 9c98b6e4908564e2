// Command critest runs upstream's CRI test suite, critest, against Atoll's
// runtime, without a kubelet:
//
//	go run ./e2e/critest                       all of it
//	go run ./e2e/critest -focus 'runtime info' a part
//	go run ./e2e/critest -short                a little of everything
//	go run ./e2e/critest -benchmark 20         its benchmarks instead
//
// It builds the suite's images (see package images), and then works in a
// network namespace of its own, without a way out: a registry that serves the
// images under their public names, `spherelet cri`, and the suite. Results go
// to -out as JSON and, for a whole run, to -table as Markdown. It fails if a
// spec fails that is not excluded by exclusions.go.
//
// bin/spherelet and build/guest must be there; `make critest` sees to it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/openatoll/atoll/e2e/critest/images"
)

// options of one run.
type options struct {
	focus, out, table, log, build string
	spherelet, guest, samples     string
	procs, benchmark              int
	timeout                       time.Duration
	all, short                    bool
}

func parseOptions() options {
	var o options
	flag.StringVar(&o.focus, "focus", "", "run only specs that match this `expression`")
	flag.StringVar(&o.out, "out", "build/critest.json", "`file` for the results")
	flag.StringVar(&o.table, "table", "", "`file` for the results of a whole run as a table")
	flag.StringVar(&o.log, "log", "build/critest.log", "`file` for what spherelet says")
	flag.StringVar(&o.build, "build", "build", "`directory` for what is built")
	flag.StringVar(&o.spherelet, "spherelet", "bin/spherelet", "the `program` to judge")
	flag.StringVar(&o.guest, "guest", "build/guest", "`directory` of the guest that its pods boot")
	flag.IntVar(&o.benchmark, "benchmark", 0, "run the suite's benchmarks, `n` samples each, instead of its specs")
	flag.StringVar(&o.samples, "samples", "build/critest/benchmark", "`directory` for the benchmarks' samples")
	flag.IntVar(&o.procs, "procs", 2, "specs that run side by side")
	flag.DurationVar(&o.timeout, "timeout", 30*time.Minute, "for the suite")
	flag.BoolVar(&o.short, "short", false, "run a few specs of each kind, in a minute")
	flag.BoolVar(&o.all, "all", false, "run the excluded specs as well")
	flag.Parse()
	return o
}

// layoutEnv tells the second run of this program, which is inside the network
// namespace, where the images are.
const layoutEnv = "ATOLL_CRITEST_LAYOUT"

func main() {
	o := parseOptions()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if layout := os.Getenv(layoutEnv); layout != "" {
		err = inside(ctx, o, layout)
	} else {
		err = outside(ctx, o)
	}
	if errors.Is(err, errInside) {
		os.Exit(1) // it has said why
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		os.Exit(1)
	}
}

// outside builds, while there is a network, and runs this program once more
// in a network namespace.
func outside(ctx context.Context, o options) error {
	layout, err := images.Build(ctx, filepath.Join(o.build, "critest-images"))
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	suite := filepath.Join(o.build, "critest", "upstream.test")
	for _, args := range [][]string{
		{"test", "-c", "-o", suite, "sigs.k8s.io/cri-tools/cmd/critest"},
		{"build", "-o", filepath.Join(o.build, "critest", "ginkgo"), "github.com/onsi/ginkgo/v2/ginkgo"},
	} {
		if said, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w:\n%s", args[len(args)-1], err, said)
		}
	}
	if err := patchDigest(suite, filepath.Join(o.build, "critest", "critest.test"), layout); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Minute
	cmd.Env = append(os.Environ(), layoutEnv+"="+layout)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %w", errInside, err)
	}
	return nil
}

// errInside is a failure of the run inside the network namespace.
var errInside = errors.New("the run inside the network namespace failed")

// inside runs the suite and judges it.
func inside(ctx context.Context, o options, layout string) (err error) {
	registry, err := serveImages(layout)
	if err != nil {
		return err
	}
	defer registry.Close()
	rt, err := startRuntime(ctx, o, registry)
	if err != nil {
		return err
	}
	// What was made is removed whatever became of ctx.
	defer func() { err = errors.Join(err, rt.stop(context.WithoutCancel(ctx))) }()
	if o.benchmark > 0 {
		return runBenchmark(ctx, o, rt)
	}
	began := time.Now()
	report, err := runSuite(ctx, o, rt)
	if err != nil {
		return err
	}
	r, err := judge(report, time.Since(began))
	if err != nil {
		return err
	}
	if err := r.writeJSON(o.out); err != nil {
		return err
	}
	if o.table != "" && o.focus == "" && !o.all && !o.short {
		if err := r.writeTable(o.table); err != nil {
			return err
		}
	}
	fmt.Println(r.summary())
	if len(r.Failed) > 0 || len(r.Passed) == 0 {
		return fmt.Errorf("%d specs failed, %d passed; what spherelet said is in %s", len(r.Failed), len(r.Passed), o.log)
	}
	return nil
}
