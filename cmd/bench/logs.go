package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	logBytes   = 96 << 20 // written at most
	logSeconds = 20       // written for at most
	logLine    = 128      // bytes of a line, its end included
	// rawBytes come out of an ExecSync, whose answer may not be larger.
	rawBytes = 15 << 20
	// clockTicks is USER_HZ, the unit of /proc/PID/stat.
	clockTicks = 100
)

// logs measures a container that writes lines as fast as it can, from its start
// to the last byte in the log file, and what that costs spherelet; and, beside
// it, bytes that take the same channel without being lines.
func (b *criBench) logs(ctx context.Context, all *results) error {
	pid := b.cmd.Process.Pid
	if err := os.WriteFile(filepath.Join("/proc", strconv.Itoa(pid), "clear_refs"), []byte("5"), 0); err != nil { // VmHWM anew
		return err
	}
	p, err := b.pod(ctx, benchImage, "/inguest", "lines", strconv.Itoa(logBytes), strconv.Itoa(logLine), strconv.Itoa(logSeconds))
	defer func() { _ = removePod(ctx, b.rt, p) }()
	if err != nil {
		return err
	}
	// The clock begins with the first byte.
	size, err := awaitSize(ctx, p.log, 1)
	if err != nil {
		return err
	}
	before, err := cpuSeconds(pid)
	if err != nil {
		return err
	}
	start := time.Now()
	if err := b.awaitEnd(ctx, p); err != nil {
		return err
	}
	took := time.Since(start)
	after, err := cpuSeconds(pid)
	if err != nil {
		return err
	}
	final, err := awaitSize(ctx, p.log, size)
	if err != nil {
		return err
	}
	// A line of the file has CRI's prefix before it: time, stream, tag.
	lines := final / (logLine + int64(len("2006-01-02T15:04:05.000000000Z stdout F ")))
	mb := float64(lines*logLine) / 1e6
	say("%d lines of %d bytes in %s", lines, logLine, took.Round(time.Millisecond))
	all.add("log_throughput", "MB/s", []float64{mb / took.Seconds()})
	all.add("log_cpu_per_gb", "s/GB", []float64{(after - before) / mb * 1000})
	all.add("log_cpu_share", "% of a core", []float64{(after - before) / took.Seconds() * 100})
	rss, err := procMB(pid, "status", "VmHWM:")
	if err != nil {
		return err
	}
	all.add("log_rss_peak", "MB", []float64{rss})
	return b.rawOutput(ctx, all)
}

// rawOutput is the throughput of the channel, without journal and lines.
func (b *criBench) rawOutput(ctx context.Context, all *results) error {
	p, err := b.pod(ctx, benchImage, "sleep", "3600")
	defer func() { _ = removePod(ctx, b.rt, p) }()
	if err != nil {
		return err
	}
	var rates []float64
	for range 4 {
		start := time.Now()
		if _, err := b.exec(ctx, p, plainCommand...); err != nil {
			return err
		}
		idle := time.Since(start)
		start = time.Now()
		out, err := b.exec(ctx, p, "head", "-c", strconv.Itoa(rawBytes), "/dev/zero")
		if err != nil {
			return err
		}
		rates = append(rates, float64(len(out))/1e6/(time.Since(start)-idle).Seconds())
	}
	all.add("raw_output", "MB/s", rates[1:])
	return nil
}

// awaitEnd waits until a container has exited, and so its log is complete.
func (b *criBench) awaitEnd(ctx context.Context, p criPod) error {
	ctx, cancel := context.WithTimeout(ctx, 10*logSeconds*time.Second)
	defer cancel()
	for {
		r, err := b.rt.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: p.container})
		if err != nil {
			return err
		}
		if s := r.Status; s.State == runtimeapi.ContainerState_CONTAINER_EXITED {
			if s.ExitCode != 0 {
				return fmt.Errorf("the writer ended with %d: %s", s.ExitCode, s.Message)
			}
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func awaitSize(ctx context.Context, file string, least int64) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if fi, err := os.Stat(file); err == nil && fi.Size() >= least {
			return fi.Size(), nil
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("%s has not got %d bytes: %w", file, least, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// cpuSeconds is what a process has used, user and system.
func cpuSeconds(pid int) (float64, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), ") ") // behind the name
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat is %q", pid, b)
	}
	user, err := strconv.ParseFloat(f[11], 64)
	if err != nil {
		return 0, err
	}
	system, err := strconv.ParseFloat(f[12], 64)
	return (user + system) / clockTicks, err
}
