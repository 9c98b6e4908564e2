package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/version"
	"github.com/openatoll/atoll/spherelet/config"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/storage/csi/controllers"
	"github.com/openatoll/atoll/storage/local"
	"github.com/openatoll/atoll/vmpod"
)

// openVolumes opens the datastores of the configuration; nil without any. The VMs
// of vms, nil if there are none, copy the volumes that they write to.
func openVolumes(ctx context.Context, c *v1alpha1.SphereletConfiguration, p config.Paths, vms local.LiveCopier) (storage.Disks, error) {
	if c.Storage.Disabled || len(c.Storage.Datastores) == 0 {
		return nil, nil
	}
	dc := local.DisksConfig{Host: c.NodeName, StateDir: p.VolumeState, Live: vms, Log: slog.Default()}
	for _, d := range c.Storage.Datastores {
		store := local.Datastore{Name: d.Name, Path: d.Path, MountPoint: d.MountPoint, Shared: d.Shared, Format: d.Format}
		for _, p := range d.Policies {
			policy, err := policyOf(p)
			if err != nil {
				return nil, fmt.Errorf("storage.datastores[%s]: %w", d.Name, err)
			}
			store.Policies = append(store.Policies, policy)
		}
		dc.Datastores = append(dc.Datastores, store)
		if d.Path == p.Volumes {
			if err := os.MkdirAll(d.Path, 0o700); err != nil {
				return nil, err
			}
		}
	}
	disks, err := local.OpenDisks(ctx, dc)
	if err != nil {
		return nil, fmt.Errorf("volumes: %w", err)
	}
	go disks.KeepAlive(ctx)
	return disks, nil
}

// liveCopier finds the VM that has a volume among a driver's.
type liveCopier struct{ driver vmpod.Driver }

func (l liveCopier) CopyDisk(ctx context.Context, vm, diskID string, to *os.File, progress func(done, total int64)) error {
	id, err := vmpod.ParseID(vm)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	m, err := l.driver.Open(ctx, id)
	if err != nil {
		return err
	}
	copier, ok := m.(vmpod.DiskCopier)
	if !ok {
		return fmt.Errorf("this hypervisor cannot copy the disks of a running VM: %w", errdefs.ErrNotFound)
	}
	return copier.CopyDisk(ctx, diskID, to, progress)
}

func policyOf(p v1alpha1.DatastorePolicy) (local.DatastorePolicy, error) {
	out := local.DatastorePolicy{KeyFile: p.KeyFile, Policy: storage.Policy{
		Name: p.Name, Description: p.Description, Thick: p.Thick, Encrypted: p.Encrypted, IOPS: p.IOPS,
	}}
	if p.Bandwidth != "" {
		q, err := resource.ParseQuantity(p.Bandwidth)
		if err != nil {
			return out, fmt.Errorf("policies[%s].bandwidth: %v: %w", p.Name, err, errdefs.ErrInvalidArgument)
		}
		out.BytesPerSecond = q.Value()
	}
	return out, nil
}

// csiSocket is where the driver answers; empty without volumes.
func (h *host) csiSocket() string {
	if h.volumes == nil {
		return ""
	}
	return h.paths.CSISocket
}

// serveVolumes serves the CSI driver until ctx ends.
func (h *host) serveVolumes(ctx context.Context) error {
	if h.volumes == nil {
		return nil
	}
	driver, err := csi.New(csi.Config{Disks: h.volumes, NodeName: h.cfg.NodeName, Guest: h.runtime, Version: version.Version})
	if err != nil {
		return err
	}
	l, err := csi.Listen(h.paths.CSISocket)
	if err != nil {
		return err
	}
	return ended(ctx, "the CSI driver", driver.Serve(ctx, l))
}

// controlVolumes runs the driver's controllers, as soon as the node has joined.
func (h *host) controlVolumes(ctx context.Context) error {
	if h.volumes == nil || !h.joined(ctx) {
		return nil
	}
	client, err := clientcmd.BuildConfigFromFlags("", h.cfg.Kubeconfig)
	if err != nil {
		return err
	}
	client.QPS, client.Burst, client.UserAgent = 50, 100, "spherelet/csi"
	auditor, _ := h.volumes.(storage.Auditor)
	return ended(ctx, "the CSI driver's controllers", controllers.Run(ctx, controllers.Config{
		Auditor: auditor, Changed: h.volumesChanged, Client: client, Socket: h.paths.CSISocket, NodeName: h.cfg.NodeName, Namespace: metav1.NamespaceSystem,
	}))
}

// joined waits until the node has credentials of its own.
func (h *host) joined(ctx context.Context) bool {
	for {
		if _, err := os.Stat(h.cfg.Kubeconfig); err == nil || !errors.Is(err, os.ErrNotExist) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(kubeconfigPoll):
		}
	}
}
