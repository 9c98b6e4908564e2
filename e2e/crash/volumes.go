package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

// The run `crash volumes`: a StatefulSet of three writes counters to volumes of
// a datastore that two nodes share. Each value is acknowledged to an observer
// outside the cluster's VMs once fsync has returned. Pods, spherelets, QEMUs and
// a node are killed at random. At the end every acknowledged value is there, in
// order; no volume was open in two VMs, none was formatted twice, nothing is
// left.

// volumesOptions of one run.
type volumesOptions struct {
	// For is how long there are kills; what must be waited for afterwards comes
	// on top.
	For  time.Duration
	Seed uint64
	// Kinds are the kinds of kills; all, if empty.
	Kinds      []string
	Bin        string
	Out, Table string
	Keep       string
	// Work has the second node and the shared datastore.
	Work string
}

func parseVolumesOptions(args []string) (volumesOptions, error) {
	var o volumesOptions
	f := flag.NewFlagSet("crash volumes", flag.ContinueOnError)
	f.DurationVar(&o.For, "for", 10*time.Minute, "how long there are kills")
	f.Uint64Var(&o.Seed, "seed", 0, "of what is killed and when; 0 chooses one")
	f.Func("kill", "`kind` of kill, to be repeated: pod, spherelet, qemu, node, lost (default all)", func(s string) error {
		if _, ok := killWeights[s]; !ok {
			return fmt.Errorf("%q is no kind of kill", s)
		}
		o.Kinds = append(o.Kinds, s)
		return nil
	})
	f.StringVar(&o.Bin, "bin", "bin", "`directory` of atoll and spherelet")
	f.StringVar(&o.Out, "out", "build/crash-volumes.json", "`file` for the results")
	f.StringVar(&o.Table, "table", "", "`file` for the results as a table")
	f.StringVar(&o.Keep, "keep", "build/crash-volumes-logs", "`directory` for the cluster's logs if something goes wrong")
	if err := f.Parse(args); err != nil {
		return o, err
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

func volumesProgram(ctx context.Context, args []string) error {
	o, err := parseVolumesOptions(args)
	if err != nil {
		return err
	}
	r, err := runVolumes(ctx, o)
	if r != nil {
		fmt.Println(r.summary())
	}
	if err != nil {
		return err
	}
	return r.verdict()
}

// runVolumes brings a cluster up, kills, takes it down and looks for leftovers.
func runVolumes(ctx context.Context, o volumesOptions) (r *volumesResult, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("needs root: it makes network namespaces and taps")
	}
	if o.Work, err = os.MkdirTemp("", "atoll-crash-volumes-"); err != nil {
		return nil, err
	}
	if err := os.Chmod(o.Work, 0o711); err != nil { // QEMU runs as another user
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(o.Work)) }()
	c := cluster{atoll: filepath.Join(o.Bin, "atoll")}
	if c.data, err = os.MkdirTemp("", "atoll-crash-"); err != nil {
		return nil, err
	}
	if out, err := c.command(ctx, "up", "--isolated").CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("atoll up: %w\n%s", err, out), c.down())
	}
	in := handover{Volumes: &o, Data: c.data, Result: filepath.Join(c.data, "crash.json")}
	if err = c.enter(ctx, in); err == nil {
		r, err = readVolumesResult(in.Result)
	}
	if o.Keep != "" && (err != nil || r.verdict() != nil) {
		err = errors.Join(err, c.keepLogs(o.Keep), copyFile(secondLog(o.Work), filepath.Join(o.Keep, "second.log")))
	}
	if downErr := c.down(); downErr != nil {
		if r == nil {
			return nil, errors.Join(err, downErr)
		}
		r.Violations = append(r.Violations, violation{Kind: "left", Message: downErr.Error(), Kills: r.kills()})
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

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

func (r *volumesResult) writeJSON(file string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

func readVolumesResult(file string) (*volumesResult, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := &volumesResult{}
	return r, json.Unmarshal(text, r)
}
