// Command crash shows that pods do not notice what happens to the node agent:
//
//	go run ./e2e/crash                   100 kills, as `make crash` does
//	go run ./e2e/crash -kills 5 -seed 7  fewer, at the same instants each time
//	go run ./e2e/crash volumes -for 10m  what volumes go through: see volumes.go
//
// It brings up an isolated cluster of its own with ten pods, and sends
// spherelet SIGKILL at random instants while other pods are made, used and
// deleted. Each time it starts spherelet again, as systemd would, and measures
// how long everything takes to be back. A pod that restarts, is not Ready for
// a moment, or loses or repeats a line of its log, fails the run; so does what
// is left behind at the end. Results go to -out as JSON and to -table as
// Markdown.
//
// bin and build/guest must be there; `make crash` sees to it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// options of one run.
type options struct {
	Kills, Pods, Churners int
	Seed                  uint64
	// Within is how soon all must be back after a kill.
	Within time.Duration
	// Timeout bounds everything between `atoll up` and `atoll down`. No kill
	// comes in its last minutes (checkTime).
	Timeout    time.Duration
	Bin        string
	Out, Table string
	// Keep is a directory for the logs of a cluster in which something went
	// wrong; empty for none.
	Keep string
}

func parseOptions(args []string) (options, error) {
	var o options
	f := flag.NewFlagSet("crash", flag.ContinueOnError)
	f.IntVar(&o.Kills, "kills", 100, "how often spherelet is killed")
	f.IntVar(&o.Pods, "pods", len(kinds), "pods that must not notice")
	f.IntVar(&o.Churners, "churners", 2, "pods that are made and deleted at a time")
	f.Uint64Var(&o.Seed, "seed", 0, "of the random instants; 0 chooses one")
	f.DurationVar(&o.Within, "within", 5*time.Second, "how soon all must be back after a kill")
	f.DurationVar(&o.Timeout, "timeout", 25*time.Minute, "for the run, without `atoll up` and `atoll down`")
	f.StringVar(&o.Bin, "bin", "bin", "`directory` of atoll and spherelet")
	f.StringVar(&o.Out, "out", "build/crash.json", "`file` for the results")
	f.StringVar(&o.Table, "table", "", "`file` for the results as a table")
	f.StringVar(&o.Keep, "keep", "build/crash-logs", "`directory` for the cluster's logs if something goes wrong")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	if o.Kills < 1 || o.Pods < 1 || o.Churners < 0 {
		return o, errors.New("-kills and -pods must be at least 1, -churners at least 0")
	}
	if o.Seed == 0 {
		o.Seed = rand.Uint64N(1 << 32)
	}
	var err error
	if o.Bin, err = filepath.Abs(o.Bin); err == nil {
		o.Out, err = filepath.Abs(o.Out)
	}
	return o, err
}

func main() {
	if err := program(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		os.Exit(1)
	}
}

func program(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if text := os.Getenv(insideEnv); text != "" {
		var in handover
		if err := json.Unmarshal([]byte(text), &in); err != nil {
			return err
		}
		if in.Volumes != nil {
			return insideVolumes(ctx, in)
		}
		return inside(ctx, in)
	}
	if len(args) > 0 && args[0] == "volumes" {
		return volumesProgram(ctx, args[1:])
	}
	o, err := parseOptions(args)
	if err != nil {
		return err
	}
	r, err := run(ctx, o)
	if err != nil {
		return err
	}
	fmt.Println(r.summary())
	return r.verdict()
}

// insideEnv holds a handover for the second run of this program, which is
// inside the cluster's network namespace.
const insideEnv = "ATOLL_CRASH"

// A handover is what the inner run needs of the outer.
type handover struct {
	Options options
	// Volumes is set for `crash volumes`.
	Volumes *volumesOptions
	Data    string
	// Result is where the inner run puts a result.
	Result string
}

// run brings a cluster up, kills, takes it down and looks for leftovers. Its
// error is about the run; what the run found is in the result.
func run(ctx context.Context, o options) (r *result, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("needs root: it makes network namespaces and taps")
	}
	c := cluster{atoll: filepath.Join(o.Bin, "atoll")}
	if c.data, err = os.MkdirTemp("", "atoll-crash-"); err != nil {
		return nil, err
	}
	if out, err := c.command(ctx, "up", "--isolated").CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("atoll up: %w\n%s", err, out), c.down())
	}
	in := handover{Options: o, Data: c.data, Result: filepath.Join(c.data, "crash.json")}
	err = c.enter(ctx, in)
	if err == nil {
		r, err = readResult(in.Result)
	}
	if o.Keep != "" && (err != nil || r.verdict() != nil) {
		err = errors.Join(err, c.keepLogs(o.Keep))
	}
	if downErr := c.down(); downErr != nil {
		if r == nil {
			return nil, errors.Join(err, downErr)
		}
		r.violate("orphan", "%v", downErr)
	}
	if err != nil {
		return r, err
	}
	if err := r.writeJSON(o.Out); err != nil {
		return r, err
	}
	if o.Table != "" {
		err = r.writeTable(o.Table)
	}
	return r, err
}

// A cluster is one that `atoll up` has made, seen from outside.
type cluster struct {
	atoll, data string
}

func (c cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, c.atoll, append([]string{"--data-dir", c.data}, args...)...)
}

// enter runs this program once more in the cluster's network namespace.
func (c cluster) enter(ctx context.Context, in handover) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	text, err := json.Marshal(in)
	if err != nil {
		return err
	}
	cmd := c.command(ctx, "enter", "--", self)
	cmd.Env = append(os.Environ(), insideEnv+"="+string(text))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("inside the cluster: %w", err)
	}
	return nil
}

// down stops the cluster and erases it; what is left then is an error.
func (c cluster) down() error {
	if out, err := c.command(context.Background(), "down", "--purge").CombinedOutput(); err != nil {
		return fmt.Errorf("atoll down: %w\n%s", err, out)
	}
	left, err := c.leftovers()
	if err != nil {
		return err
	}
	if _, err := os.Stat(c.data); err == nil {
		left = append(left, c.data)
	}
	if len(left) > 0 {
		return fmt.Errorf("left after atoll down: %s", strings.Join(left, "; "))
	}
	return nil
}

// leftovers is what this cluster still has on this host.
func (c cluster) leftovers() (lines []string, err error) {
	out, err := c.command(context.Background(), "leftovers").Output() // fails when there is something
	if len(out) == 0 {
		return nil, fmt.Errorf("atoll leftovers said nothing: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); line != "" && line != "nothing is left" {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

func (c cluster) keepLogs(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"spherelet.log", "supervisor.log"} {
		b, err := os.ReadFile(filepath.Join(c.data, "log", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
