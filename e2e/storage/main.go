// Command storage runs upstream's external storage suite (what e2e.test is with
// -storage.testdriver) on csi.atoll.dev:
//
//	go run ./e2e/storage                         all of it
//	go run ./e2e/storage -focus 'volume-expand'  a part
//	go run ./e2e/storage -continue -timeout 6m   what has no result yet, for so long
//	go run ./e2e/storage -xfs -focus snapshot    a part, on files that share blocks
//
// It builds the suite and its images, brings an isolated cluster up, and works
// inside that cluster's network namespace: a registry on loopback and the suite.
// Then the cluster goes, with its data. Results are added to those in -out and
// written to -table as Markdown. It fails if a spec failed in this run that
// known.go does not explain.
//
// bin and build/guest must be there; `make e2e-storage` sees to it.
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
)

// options of one run.
type options struct {
	focus, skip, out, table, build, bin, busybox string
	procs                                        int
	timeout                                      time.Duration
	all, resume, tableOnly, built, xfs           bool
}

func parseOptions() options {
	var o options
	flag.StringVar(&o.focus, "focus", "", "run only specs that match this `expression`")
	flag.StringVar(&o.skip, "skip", "", "leave out specs that match this `expression`; they have no result")
	flag.StringVar(&o.out, "out", "build/e2e-storage.json", "`file` of the results, to which this run's are added")
	flag.StringVar(&o.table, "table", "", "`file` for the results as tables")
	flag.StringVar(&o.build, "build", "build/e2e-storage", "`directory` for what is built and what the suite says")
	flag.StringVar(&o.bin, "bin", "bin", "`directory` of the programs to judge")
	flag.StringVar(&o.busybox, "busybox", "/bin/busybox", "static busybox, a `file`")
	flag.IntVar(&o.procs, "procs", 2, "specs that run side by side")
	flag.DurationVar(&o.timeout, "timeout", 3*time.Hour, "for the suite; specs that it has no time for have no result")
	flag.BoolVar(&o.all, "all", false, "run the excluded specs as well")
	flag.BoolVar(&o.resume, "continue", false, "leave out what has a result, other than a failure that is not known")
	flag.BoolVar(&o.built, "built", false, "compile nothing: -build has the suite")
	flag.BoolVar(&o.xfs, "xfs", false, "have the cluster's data on an XFS of its own, whose files share blocks")
	flag.BoolVar(&o.tableOnly, "table-only", false, "run nothing: write the table of the results there are")
	flag.Parse()
	return o
}

// dataEnv tells the second run of this program, which is inside the cluster's
// network namespace, where the cluster's data is.
const dataEnv = "ATOLL_E2E_STORAGE_DATA"

func main() {
	o := parseOptions()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch data := os.Getenv(dataEnv); {
	case o.tableOnly:
		err = rewrite(o)
	case data != "":
		err = inside(ctx, o, data)
	default:
		err = outside(ctx, o)
	}
	if errors.Is(err, errInside) {
		os.Exit(1) // it has said why
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e-storage:", err)
		os.Exit(1)
	}
}

// errInside is a failure of the run inside the network namespace.
var errInside = errors.New("the run inside the cluster's network namespace failed")

// outside builds, while there is a network, brings a cluster up, runs this
// program once more inside it, and takes the cluster down.
func outside(ctx context.Context, o options) (err error) {
	if o.xfs {
		if err := ownMounts(); err != nil {
			return err
		}
	}
	if !o.built {
		if err := buildSuite(ctx, o.build); err != nil {
			return err
		}
	}
	data, err := os.MkdirTemp("", "atoll-e2e-storage-")
	if err != nil {
		return err
	}
	if o.xfs {
		dir := data
		unmount, mountErr := mountXFS(ctx, dir, o.build)
		if mountErr != nil {
			return errors.Join(mountErr, os.Remove(dir))
		}
		defer func() { err = errors.Join(err, unmount(), os.Remove(dir)) }()
		data = filepath.Join(dir, "atoll")
	}
	atoll := filepath.Join(o.bin, "atoll")
	defer func() {
		// What was made is removed whatever became of ctx.
		err = errors.Join(err, keepLogs(data, o.build), run(context.WithoutCancel(ctx), atoll, "--data-dir", data, "down", "--purge"))
	}()
	began := time.Now()
	if err := run(ctx, atoll, "--data-dir", data, "up", "--isolated"); err != nil {
		return err
	}
	fmt.Printf("cluster up in %.1f s\n", time.Since(began).Seconds())
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, atoll, append([]string{"--data-dir", data, "enter", "--", self}, os.Args[1:]...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Minute
	cmd.Env = append(os.Environ(), dataEnv+"="+data)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %w", errInside, err)
	}
	return nil
}

// run runs a program; its error says what the program said.
func run(ctx context.Context, program string, args ...string) error {
	if said, err := exec.CommandContext(ctx, program, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w:\n%s", program, args, err, said)
	}
	return nil
}

// keepLogs copies the daemons' logs, which go with the cluster.
func keepLogs(data, to string) error {
	logs, err := filepath.Glob(filepath.Join(data, "log", "*.log"))
	for _, l := range logs {
		if filepath.Base(l) == "audit.log" {
			continue // a line an API call
		}
		text, readErr := os.ReadFile(l)
		err = errors.Join(err, readErr, os.WriteFile(filepath.Join(to, filepath.Base(l)), text, 0o600))
	}
	return err
}

// inside runs the suite and judges it.
func inside(ctx context.Context, o options, data string) error {
	address, err := serveImages(o)
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	before, err := readResults(o.out)
	if err != nil {
		return err
	}
	began := time.Now()
	report, err := runSuite(ctx, o, data, address, before)
	if err != nil {
		return err
	}
	now, err := judge(report)
	if err != nil {
		return err
	}
	now.Seconds = time.Since(began).Seconds()
	if o.focus != "" || o.skip != "" || o.resume {
		now = merge(before, now)
	}
	if err := now.writeJSON(o.out); err != nil {
		return err
	}
	if o.table != "" {
		if err := now.writeTable(o.table); err != nil {
			return err
		}
	}
	fmt.Println(now.summary())
	if n := now.unexplained(); n > 0 {
		return fmt.Errorf("%d specs failed that known.go does not explain; what the suite said is in %s", n, o.build)
	}
	return nil
}

// rewrite writes the table of results that there are: what known.go says may
// have changed.
func rewrite(o options) error {
	r, err := readResults(o.out)
	if err != nil {
		return err
	}
	fmt.Println(r.summary())
	return r.writeTable(o.table)
}
