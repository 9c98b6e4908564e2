// Command bench measures what docs/spec.md promises and writes build/bench.json.
//
//	bench [-n 20] [-only PART,…] [-out build/bench.json] [-kvm]
//	bench -compare    what has changed since the last committed run
//	bench -save       put the run into docs/bench, to be committed
//
// Its parts work in places that it makes and takes away: an isolated cluster,
// or a network namespace with `spherelet cri` alone. Figures that are promises
// are ratios to something measured turn by turn in the same run, so that a slow
// or busy machine changes both.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/openatoll/atoll/vmpod/qemu"
)

// A place is where a part works.
type place string

const (
	here      place = "here"      // the process that the user started
	namespace place = "namespace" // a network namespace with `spherelet cri`
	cluster   place = "cluster"   // inside an isolated cluster
	// inside an isolated cluster whose namespaces are kept by a process of their own
	apartCluster place = "cluster of namespaces"
)

// A part is what -only names.
type part struct {
	name, what string
	place      place
	apart      bool // runs only if -only names it: it takes minutes
}

// parts, in the order of their running within a place.
var parts = []part{
	{name: "machines", what: "raw boots and launches", place: cluster},
	{name: "clones", what: "launches of clones beside raw boots", place: cluster},
	{name: "sandboxes", what: "RunPodSandbox without a kubelet, booted", place: cluster},
	{name: "clonepods", what: "pods that are clones, through the API", place: cluster},
	{name: "burst", what: "20 pods at once; memory and CPU of those while they do nothing", place: cluster},
	{name: "density", what: "how many pods the host holds, up to 200", place: cluster, apart: true},
	{name: "volumes", what: "a pod's volume: reading and writing beside a raw guest, until it is ready", place: cluster},
	{name: "daily", what: "exec into a pod; memory of the daemons", place: cluster},
	{name: "pods", what: "pods that are booted, through the API: start, memory", place: cluster},
	{name: "namespaces", what: "1,000 namespaces in vSphere and Kubernetes, beside a plain loop", place: apartCluster},
	{name: "critest", what: "the benchmarks of upstream's CRI suite", place: here},
	{name: "pull", what: "pulling an image into disks, beside tar -x", place: here},
	{name: "scale", what: "lists and stats of 100 sandboxes, on machines that are not real", place: here},
	{name: "volumes", what: "1,000 volumes on the simulator, beside a plain loop", place: here},
	{name: "lists", what: "lists and stats of 10 real sandboxes", place: namespace},
	{name: "containers", what: "a container's life in a pod that runs", place: namespace},
	{name: "execsync", what: "ExecSync beside a plain fork and exec in the guest", place: namespace},
	{name: "logs", what: "what a container's log does, and costs", place: namespace},
	{name: "memory", what: "memory of 20 sandboxes, cloned and booted", place: namespace},
	{name: "imageread", what: "reading an image's files in the guest, beside a raw disk", place: namespace},
}

// Environment of the runs inside a place.
const (
	placeEnv   = "ATOLL_BENCH_PLACE"
	dataEnv    = "ATOLL_BENCH_DATA"    // the cluster's data directory
	resultsEnv = "ATOLL_BENCH_RESULTS" // where the figures go
)

type options struct {
	n         int
	only, out string
	spherelet string
	guest     string
	// kvm refuses to measure anything but KVM.
	kvm bool
	// add keeps what -out has of other figures.
	add           bool
	compare, save bool
	// namespaces is how many the part of that name makes, idle how long it then
	// watches them.
	namespaces int
	idle       time.Duration
	// volumes is how many the part of that name makes, and once more by hand.
	volumes int
}

func parseOptions() (options, error) {
	var o options
	flag.IntVar(&o.n, "n", 20, "measurements of each figure, at least 10")
	flag.StringVar(&o.only, "only", "", "run `parts` alone, separated by commas, and write no file unless -out says so")
	flag.StringVar(&o.out, "out", "build/bench.json", "`file` for the figures")
	flag.StringVar(&o.spherelet, "spherelet", "bin/spherelet", "the `program` that serves the CRI")
	flag.StringVar(&o.guest, "guest", "build/guest", "`directory` of the guest, where there is no cluster")
	flag.BoolVar(&o.kvm, "kvm", false, "refuse to run where KVM is not usable")
	flag.BoolVar(&o.add, "add", false, "put the figures beside those that -out has already")
	flag.BoolVar(&o.compare, "compare", false, "compare the run in -out with the last committed one of "+historyDir+"; fail if it is worse")
	flag.BoolVar(&o.save, "save", false, "copy the run in -out to "+historyDir)
	flag.IntVar(&o.namespaces, "namespaces", 1000, "namespaces of the part of that name")
	flag.IntVar(&o.volumes, "volumes", 1000, "volumes of the part of that name")
	flag.DurationVar(&o.idle, "idle", 5*time.Minute, "how long namespaces are watched while nothing changes: what is asked of vCenter at intervals is asked every 5 minutes")
	usage := flag.Usage
	flag.Usage = func() {
		usage()
		fmt.Fprintln(flag.CommandLine.Output(), "Parts:")
		for _, p := range parts {
			note := ""
			if p.apart {
				note = " (only if named)"
			}
			fmt.Fprintf(flag.CommandLine.Output(), "  %-10s %s%s\n", p.name, p.what, note)
		}
	}
	flag.Parse()
	if o.n < 10 {
		return o, fmt.Errorf("-n %d: a median and a p99 want at least 10", o.n)
	}
	if o.namespaces < 2 || o.volumes < 2 || o.idle <= 0 {
		return o, fmt.Errorf("-namespaces %d -volumes %d -idle %s: at least 2, and some time", o.namespaces, o.volumes, o.idle)
	}
	for _, name := range o.names() {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == name }) {
			return o, fmt.Errorf("-only %s: there is no such part; see -help", name)
		}
	}
	if o.only != "" && !o.add && !o.compare && !o.save {
		given := false
		flag.Visit(func(f *flag.Flag) { given = given || f.Name == "out" })
		if !given {
			o.out = ""
		}
	}
	return o, nil
}

func (o options) names() []string {
	return strings.FieldsFunc(o.only, func(r rune) bool { return r == ',' })
}

// wanted says whether a part is to be run.
func (o options) wanted(name string) bool {
	if o.only != "" {
		return slices.Contains(o.names(), name)
	}
	return !slices.ContainsFunc(parts, func(p part) bool { return p.name == name && p.apart })
}

// has says whether any part is to be run in a place.
func (o options) has(at place) bool {
	for _, p := range parts {
		if p.place == at && o.wanted(p.name) {
			return true
		}
	}
	return false
}

func main() {
	qemu.RunProbeChild()
	o, err := parseOptions()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch {
	case err != nil:
	case o.compare:
		err = compareWithHistory(ctx, o.out)
	case o.save:
		err = saveToHistory(o.out)
	default:
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	var all results
	switch place(os.Getenv(placeEnv)) {
	case cluster:
		if err := measureCluster(ctx, o, os.Getenv(dataEnv), &all); err != nil {
			return err
		}
		return writeJSON(os.Getenv(resultsEnv), all)
	case apartCluster:
		if err := measureNamespaces(ctx, o, os.Getenv(dataEnv), &all); err != nil {
			return fmt.Errorf("namespaces: %w", err)
		}
		return writeJSON(os.Getenv(resultsEnv), all)
	case namespace:
		if err := measureRuntime(ctx, o, &all); err != nil {
			return err
		}
		return writeJSON(os.Getenv(resultsEnv), all)
	}
	if err := requireKVM(ctx, o); err != nil {
		return err
	}
	if _, err := os.Stat(o.spherelet); err != nil {
		return fmt.Errorf("%w: run `make build`, and bench from the top of the checkout", err)
	}
	began := time.Now()
	for _, at := range []struct {
		place   place
		measure func(context.Context, options, *results) error
	}{{cluster, inCluster(cluster)}, {apartCluster, inCluster(apartCluster, "--namespaces-apart")}, {here, measureHere}, {namespace, inNamespace}} {
		if !o.has(at.place) {
			continue
		}
		if err := at.measure(ctx, o, &all); err != nil {
			return err
		}
	}
	all.table(os.Stdout)
	say("%d figures in %s", len(all), time.Since(began).Round(time.Second))
	if o.out == "" {
		return nil
	}
	r, err := newReport(ctx, o, all, began)
	if err == nil && o.add {
		r, err = r.addTo(o.out)
	}
	if err != nil {
		return err
	}
	return writeJSON(o.out, r)
}

// requireKVM says why -kvm cannot be, if so.
func requireKVM(ctx context.Context, o options) error {
	if !o.kvm {
		return nil
	}
	kvm, err := probeKVM(ctx)
	if err == nil && !kvm.Usable {
		err = fmt.Errorf("KVM is not usable on this host: %s; `make bench` measures emulation, which says nothing about KVM", kvm.Reason)
	}
	return err
}

// measureHere runs the parts that make their own surroundings.
func measureHere(ctx context.Context, o options, all *results) error {
	if o.wanted("critest") {
		if err := benchCritest(ctx, o, all); err != nil {
			return fmt.Errorf("critest: %w", err)
		}
	}
	if o.wanted("pull") {
		if err := benchPull(ctx, o.n, all); err != nil {
			return fmt.Errorf("pull: %w", err)
		}
	}
	if o.wanted("scale") {
		if err := benchScale(ctx, all); err != nil {
			return fmt.Errorf("scale: %w", err)
		}
	}
	if o.wanted("volumes") {
		if err := benchVolumes(ctx, o.volumes, all); err != nil {
			return fmt.Errorf("volumes: %w", err)
		}
	}
	return nil
}

// again returns this program, to be run once more in a place, and how to run it
// and read its figures.
func again(ctx context.Context, at place, argv ...string) (cmd *exec.Cmd, run func(*results) error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	dir, err := os.MkdirTemp("", "atoll-bench-results-")
	if err != nil {
		return nil, nil, err
	}
	file := filepath.Join(dir, "results.json")
	argv = append(append(argv, self), os.Args[1:]...)
	cmd = exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), placeEnv+"="+string(at), resultsEnv+"="+file)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 90 * time.Second
	return cmd, func(all *results) error {
		defer os.RemoveAll(dir)
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("the run in the %s: %w", at, err)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("the run in the %s left no figures: %w", at, err)
		}
		var some results
		err = json.Unmarshal(text, &some)
		*all = append(*all, some...)
		return err
	}, nil
}

// inNamespace runs this program once more in a network namespace of its own.
func inNamespace(ctx context.Context, _ options, all *results) error {
	cmd, run, err := again(ctx, namespace)
	if err != nil {
		return err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGTERM}
	return run(all)
}

// inCluster runs this program once more inside a cluster made for it, with
// further flags of `up`.
func inCluster(at place, flags ...string) func(context.Context, options, *results) error {
	return func(ctx context.Context, _ options, all *results) (err error) {
		atoll, err := filepath.Abs("bin/atoll")
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
		up := append([]string{"--data-dir", data, "up", "--isolated"}, flags...)
		if b, err := exec.CommandContext(ctx, atoll, up...).CombinedOutput(); err != nil {
			return fmt.Errorf("atoll up: %w\n%s", err, b)
		}
		cmd, run, err := again(ctx, at, atoll, "--data-dir", data, "enter", "--")
		if err != nil {
			return err
		}
		cmd.Env = append(cmd.Env, dataEnv+"="+data)
		return run(all)
	}
}

// measureCluster takes the figures of the parts inside a cluster.
func measureCluster(ctx context.Context, o options, data string, all *results) error {
	guest, err := guestDir(data)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "atoll-bench-vm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	vm, err := newVMBench(dir, guest)
	if err != nil {
		return err
	}
	defer vm.close()
	say("guest kernel: %s (%s), accelerator: %s", vm.guest.KernelRelease, vm.guest.Flavour, vm.accelerator)
	for _, p := range []struct {
		name    string
		measure func() error
	}{
		{"machines", func() error { return vm.run(ctx, o.n, all) }},
		{"clones", func() error { return vm.clones(ctx, o.n, all) }},
		{"sandboxes", func() error { return benchSandbox(ctx, vm, o.n, all) }},
	} {
		if !o.wanted(p.name) {
			continue
		}
		if err := p.measure(); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return measurePods(ctx, o, data, vm, all)
}

// measurePods takes the figures of pods through the API; those of pods that are
// booted come last, with a node's agent that clones none.
func measurePods(ctx context.Context, o options, data string, vm *vmBench, all *results) (err error) {
	pods, err := newPodBench(data)
	if err != nil {
		return err
	}
	for _, p := range []struct {
		name    string
		measure func() error
	}{
		{"clonepods", func() error { return pods.cloneStarts(ctx, vm, o.n, all) }},
		{"burst", func() error { return pods.burst(ctx, vm, all) }},
		{"density", func() error { return pods.density(ctx, all) }},
		{"volumes", func() error { return pods.volumes(ctx, vm, o.n, all) }},
		{"daily", func() error { return pods.daily(ctx, o.n, all) }},
		{"pods", func() error { return pods.booted(ctx, o, all) }},
	} {
		if !o.wanted(p.name) {
			continue
		}
		if err := p.measure(); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// say reports progress: measuring takes minutes.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}
