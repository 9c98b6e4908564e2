package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/cmd/atoll/internal/leftovers"
	"github.com/openatoll/atoll/cmd/atoll/internal/process"
	"github.com/openatoll/atoll/supervisor/controlplane"
)

// Supervise is the supervisor's process: the control plane and the embedded
// registry. It returns when ctx ends or one of them fails. It must be started
// in the cluster's network namespace.
func Supervise(ctx context.Context, l Layout, images string, r *Reporter) error {
	s, err := ReadState(l)
	if err != nil {
		return err
	}
	// As spherelet logs, and before Kubernetes takes the standard logger over.
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stopped, err := serveRegistry(ctx, l, images, cancel)
	if err != nil {
		return err
	}
	err = controlplane.Run(ctx, ControlPlaneConfig(l, s), r.Phase)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	cancel(nil)
	<-stopped
	return err
}

// Watch returns when ctx ends (nil) or a component does (which one).
func Watch(ctx context.Context, l Layout) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for _, name := range components {
		id, ok := process.Running(l.Record(name))
		if !ok {
			return componentEnded(l, name)
		}
		go func() {
			if id.Wait(ctx) == nil {
				cancel(componentEnded(l, name))
			}
		}()
	}
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

func componentEnded(l Layout, name string) error {
	return component{name: name, log: l.Log(name)}.fail(errors.New("it ended by itself"))
}

// Restore fills the data directory from a backup, and marks it as Atoll's.
// What it was told about this host (isolation, the node's name) is kept if
// the directory has it.
func Restore(ctx context.Context, l Layout, file string) (controlplane.BackupHeader, error) {
	s, err := ReadState(l)
	if err != nil && !errdefs.IsNotFound(err) {
		return controlplane.BackupHeader{}, err
	}
	if _, err := os.Stat(file); err != nil {
		return controlplane.BackupHeader{}, fmt.Errorf("backup: %w", err)
	}
	h, err := controlplane.Restore(ctx, ControlPlaneConfig(l, s), file)
	if err != nil {
		return h, err
	}
	return h, WriteState(l, s)
}

// Scope is what a search for the cluster's leftovers looks for.
func Scope(l Layout) leftovers.Scope {
	scope := leftovers.Scope{IDs: []string{l.ID()}, Paths: []string{l.DataDir(), l.RunDir()}}
	for _, dir := range nodeRunDirs(l) {
		scope.IDs = append(scope.IDs, filepath.Base(dir))
		scope.Paths = append(scope.Paths, dir)
	}
	return scope
}

// nodeRunDirs are those of the nodes that have data, and of the node that
// has this host's name: after a purge it is not known which there were.
func nodeRunDirs(l Layout) []string {
	nodes := l.Nodes()
	if name, err := DefaultNodeName(); err == nil && !slices.Contains(nodes, name) {
		nodes = append(nodes, name)
	}
	var dirs []string
	for _, node := range nodes {
		dirs = append(dirs, l.NodeRunDir(node))
	}
	return dirs
}
