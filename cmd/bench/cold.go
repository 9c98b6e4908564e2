package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"sigs.k8s.io/yaml"
)

// restart has the node's agent run with other settings until
// end is called. Pods stay. The cluster's own agent is not started again.
func (b *podBench) restart(ctx context.Context, o options, settings map[string]any) (end func() error, err error) {
	files, err := filepath.Glob(filepath.Join(b.data, "nodes", "*", "spherelet.yaml"))
	if err != nil || len(files) != 1 {
		return nil, fmt.Errorf("%d nodes below %s have a spherelet.yaml; want one", len(files), b.data)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		return nil, err
	}
	config := map[string]any{}
	if err := yaml.Unmarshal(text, &config); err != nil {
		return nil, err
	}
	maps.Copy(config, settings)
	if text, err = yaml.Marshal(config); err != nil {
		return nil, err
	}
	file := filepath.Join(b.data, "bench-spherelet.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return nil, err
	}
	if err := b.endDaemon(ctx, "spherelet"); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(filepath.Join(b.data, "log", "spherelet.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(o.spherelet, "--config", file)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	return func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-ended:
			return err
		case <-time.After(30 * time.Second):
			return errors.Join(errors.New("spherelet did not end"), cmd.Process.Kill(), <-ended)
		}
	}, nil
}

// endDaemon ends one of the cluster's processes and waits until it is gone.
func (b *podBench) endDaemon(ctx context.Context, name string) error {
	pids, err := b.daemons(ctx)
	if err != nil {
		return err
	}
	process, err := os.FindProcess(pids[name]) // a pidfd: no other of the same number
	if err != nil || pids[name] <= 0 {
		return fmt.Errorf("the cluster has no %s: %w", name, err)
	}
	if err := process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("end %s: %w", name, err)
	}
	for range 300 {
		if err := process.Signal(syscall.Signal(0)); errors.Is(err, os.ErrProcessDone) {
			return nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s does not end", name)
}
