package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"
)

// An operation of upstream's benchmarks: its name in their files, the RPC
// behind it, and p50 and p90 in ms of containerd 2.4.2 with runc 1.5.2 on a
// machine of this kind (n = 20), 0 where that was not measured.
type operation struct {
	name, upstream, rpc string
	p50, p90            float64
}

// upstreamFiles are the files that the benchmarks leave.
var upstreamFiles = []struct {
	file       string
	operations []operation
}{
	{"pod_benchmark_data.json", []operation{
		{"cri_run_pod_sandbox", "CreatePod", "", 88, 99},
		{"cri_pod_sandbox_status", "StatusPod", "", 0, 0},
		{"cri_stop_pod_sandbox", "StopPod", "", 63, 71},
		{"cri_remove_pod_sandbox", "RemovePod", "", 14, 17},
	}},
	{"container_benchmark_data.json", []operation{
		{"cri_create_container", "CreateContainer", "CreateContainer", 6, 8},
		{"cri_start_container", "StartContainer", "StartContainer", 40, 48},
		{"cri_container_status", "StatusContainer", "", 0, 0},
		{"cri_stop_container", "StopContainer", "StopContainer", 38, 44},
		{"cri_remove_container", "RemoveContainer", "RemoveContainer", 0, 0},
	}},
	{"image_lifecycle_benchmark_data.json", []operation{
		{"cri_pull_image", "PullImage", "", 18, 20},
		{"cri_image_status", "StatusImage", "", 0, 0},
		{"cri_remove_image", "RemoveImage", "", 0, 0},
	}},
	{"image_listing_benchmark_data.json", []operation{{"cri_list_images", "ListImages", "", 0, 0}}},
}

// criSamples is the n of the figures that these stand beside.
const criSamples = 20

// benchCritest runs the benchmarks of upstream's suite. It makes a network
// namespace of its own.
func benchCritest(ctx context.Context, o options, all *results) error {
	dir, err := os.MkdirTemp("", "atoll-bench-critest-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	say("running the benchmarks of upstream's suite, n=%d", criSamples)
	log := filepath.Join(dir, "spherelet.log")
	cmd := exec.CommandContext(ctx, "go", "run", "./e2e/critest", "-benchmark", strconv.Itoa(criSamples),
		"-samples", filepath.Join(dir, "samples"), "-log", log, "-spherelet", o.spherelet, "-guest", o.guest)
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 2 * time.Minute
	if said, err := cmd.CombinedOutput(); err != nil {
		text, _ := os.ReadFile(filepath.Join(dir, "samples", "output.txt"))
		return fmt.Errorf("%w\n%s%s", err, text, said)
	}
	guest, err := guestTimes(log)
	if err != nil {
		return err
	}
	for _, f := range upstreamFiles {
		if err := addUpstream(filepath.Join(dir, "samples", f.file), f.operations, guest, all); err != nil {
			return err
		}
	}
	return nil
}

func addUpstream(file string, operations []operation, guest map[string][]float64, all *results) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var set struct {
		OperationsNames []string
		Datapoints      []struct {
			OperationsDurationsNs []int64
		}
	}
	if err := json.Unmarshal(text, &set); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	for i, name := range set.OperationsNames {
		var samples []float64
		for _, d := range set.Datapoints {
			samples = append(samples, float64(d.OperationsDurationsNs[i])/1e6)
		}
		for _, op := range operations {
			if op.upstream != name {
				continue
			}
			r := all.add(op.name, "ms", samples)
			if op.p50 > 0 {
				r.Beside = fmt.Sprintf("containerd and runc %g/%g", op.p50, op.p90)
			}
			r.Guest = median(guest[op.rpc])
		}
	}
	return nil
}

// callLine is what the runtime logs, at level debug, about an RPC.
var callLine = regexp.MustCompile(`msg="CRI call" rpc=(\S+) took=(\S+) guest=(\S+)`)

// guestTimes reads from spherelet's log how many milliseconds of each RPC, by
// name, were spent waiting for the guest.
func guestTimes(log string) (map[string][]float64, error) {
	f, err := os.Open(log)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out := map[string][]float64{}
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		m := callLine.FindStringSubmatch(s.Text())
		if m == nil {
			continue
		}
		d, err := time.ParseDuration(m[3])
		if err != nil {
			return nil, err
		}
		out[m[1]] = append(out[m[1]], float64(d.Microseconds())/1000)
	}
	return out, s.Err()
}
