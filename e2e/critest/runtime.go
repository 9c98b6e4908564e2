package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/openatoll/atoll/netplugin/tap"
)

const (
	nodeIP  = "198.18.0.1"
	podCIDR = "198.19.0.0/24"
)

// A runtime is `spherelet cri` on directories of its own.
type runtime struct {
	dir, config, socket string
	// shared is the one directory that pods may mount live: the suite's for
	// temporary files.
	shared    string
	spherelet string
	cmd       *exec.Cmd
	ended     chan error
	log       *os.File
}

func startRuntime(ctx context.Context, o options, m *mirror) (_ *runtime, err error) {
	if err := tap.EnsureNodeLink(ctx, "atoll0", []netip.Prefix{netip.MustParsePrefix(nodeIP + "/32")}); err != nil {
		return nil, err
	}
	r := &runtime{ended: make(chan error, 1)}
	if r.spherelet, err = filepath.Abs(o.spherelet); err != nil {
		return nil, err
	}
	guest, err := filepath.Abs(o.guest)
	if err != nil {
		return nil, err
	}
	if r.dir, err = os.MkdirTemp("/var/tmp", "atoll-critest-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, r.stop(context.WithoutCancel(ctx)))
		}
	}()
	r.shared = filepath.Join(r.dir, "shared")
	if err := os.Mkdir(r.shared, 0o755); err != nil {
		return nil, err
	}
	hosts := filepath.Join(r.dir, "hosts")
	if err := m.writeHosts(hosts); err != nil {
		return nil, err
	}
	// The run directory is named by the process, as sockets' paths are short.
	run := fmt.Sprintf("/run/atoll/critest-%d", os.Getpid())
	r.config, r.socket = filepath.Join(r.dir, "config.json"), filepath.Join(run, "cri.sock")
	level := "info"
	if o.benchmark > 0 {
		level = "debug" // tells how long each call took, and the guest's part
	}
	text, err := json.MarshalIndent(map[string]any{
		"logLevel":   level,
		"apiVersion": "atoll.dev/v1alpha1", "kind": "SphereletConfiguration", "nodeName": "critest", "nodeIP": nodeIP,
		"dataDir": filepath.Join(r.dir, "data"), "runDir": run, "kubeProxy": false, "clusterCIDR": "198.19.0.0/16",
		"hypervisor": map[string]any{"guest": guest, "ephemeralDefault": "2Gi"}, "images": map[string]any{"hostsDir": hosts},
		"hostDirectories": []any{map[string]any{"path": r.shared}},
	}, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(r.dir, 0o711); err != nil { // QEMU runs as another user
		return nil, err
	}
	if err := os.WriteFile(r.config, text, 0o600); err != nil {
		return nil, err
	}
	if r.log, err = os.Create(o.log); err != nil {
		return nil, err
	}
	r.cmd = exec.Command(r.spherelet, "cri", "--config", r.config, "--pod-cidr", podCIDR)
	r.cmd.Stdout, r.cmd.Stderr = r.log, r.log
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := r.cmd.Start(); err != nil {
		r.cmd = nil
		return nil, err
	}
	go func() { r.ended <- r.cmd.Wait() }()
	return r, r.wait(ctx)
}

// wait waits until the socket answers.
func (r *runtime) wait(ctx context.Context) error {
	deadline := time.After(time.Minute)
	for {
		if c, err := net.Dial("unix", r.socket); err == nil {
			return c.Close()
		}
		select {
		case err := <-r.ended:
			r.cmd = nil
			return fmt.Errorf("spherelet cri ended: %v: see %s", err, r.log.Name())
		case <-deadline:
			return fmt.Errorf("%s does not answer after a minute: see %s", r.socket, r.log.Name())
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// stop ends the runtime and removes all that it made.
func (r *runtime) stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var errs []error
	if r.cmd != nil {
		errs = append(errs, r.cmd.Process.Signal(syscall.SIGTERM))
		select {
		case err := <-r.ended:
			if err != nil {
				errs = append(errs, fmt.Errorf("spherelet cri: %w", err))
			}
		case <-ctx.Done():
			errs = append(errs, fmt.Errorf("spherelet cri did not end: %w", r.cmd.Process.Kill()))
		}
		if said, err := exec.CommandContext(ctx, r.spherelet, "cleanup", "--config", r.config).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("spherelet cleanup: %w:\n%s", err, said))
		}
	}
	if r.log != nil {
		errs = append(errs, r.log.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(r.dir))...)
}

// runSuite runs critest and returns the path of Ginkgo's report.
func runSuite(ctx context.Context, o options, r *runtime) (string, error) {
	build, err := filepath.Abs(filepath.Join(o.build, "critest"))
	if err != nil {
		return "", err
	}
	args := []string{
		fmt.Sprintf("--procs=%d", o.procs), "--no-color", "--skip=benchmark", "--output-dir=" + build, "--json-report=report.json",
		fmt.Sprintf("--timeout=%s", o.timeout),
	}
	if o.focus != "" {
		args = append(args, "--focus="+o.focus)
	}
	if o.short {
		for _, s := range shortSpecs {
			args = append(args, "--focus="+s)
		}
	}
	if !o.all {
		for _, e := range exclusions {
			args = append(args, "--skip="+e.spec)
		}
	}
	args = append(args, filepath.Join(build, "critest.test"), "--", "-runtime-endpoint=unix://"+r.socket)
	report := filepath.Join(build, "report.json")
	if err := os.Remove(report); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	said, err := os.Create(filepath.Join(build, "output.txt"))
	if err != nil {
		return "", err
	}
	defer said.Close()
	cmd := exec.CommandContext(ctx, filepath.Join(build, "ginkgo"), args...)
	cmd.Dir = r.dir
	cmd.Env = append(os.Environ(), "TMPDIR="+r.shared)
	// Ginkgo leaves it to the terminal to tell the suite's processes.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	cmd.Stdout, cmd.Stderr = said, said
	fmt.Printf("critest: %s; it writes %s\n", strings.Join(args[len(args)-3:], " "), said.Name())
	err = cmd.Run()
	var exit *exec.ExitError
	if _, serr := os.Stat(report); errors.As(err, &exit) && serr == nil {
		return report, ctx.Err() // some failed
	}
	if err != nil {
		return "", fmt.Errorf("ginkgo: %w: see %s", err, said.Name())
	}
	return report, nil
}
