package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
)

// fencePoll is how often it is asked whether lost nodes hold shared volumes.
const fencePoll = 15 * time.Second

// fenceLostNodes frees shared volumes of nodes that an admin has declared out
// of service, until ctx ends.
func (h *host) fenceLostNodes(ctx context.Context) error {
	shared := slices.ContainsFunc(h.cfg.Storage.Datastores, func(d v1alpha1.Datastore) bool { return d.Shared })
	if h.volumes == nil || !shared || !h.joined(ctx) {
		return nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", h.cfg.Kubeconfig)
	if err != nil {
		return err
	}
	config.UserAgent = "spherelet/fence"
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	tick := time.NewTicker(fencePoll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if err := fenceOutOfService(ctx, h.volumes, client.CoreV1().Nodes(), h.cfg.NodeName); err != nil && ctx.Err() == nil {
			slog.Warn("not all volumes of lost nodes could be looked after", "err", err)
		}
	}
}

// fenceOutOfService looks once. The taint is an admin's word that the node is
// off (KEP-2268); a node that is only silent, or whose object is gone, keeps
// what it holds.
func fenceOutOfService(ctx context.Context, disks storage.Disks, nodes typedcorev1.NodeInterface, self string) error {
	vs, err := disks.List(ctx)
	errs := []error{err}
	held := map[string]bool{}
	for _, v := range vs {
		if v.At.Host != "" {
			continue
		}
		hs, err := disks.Holders(ctx, v.ID)
		errs = append(errs, err)
		for _, h := range hs {
			held[h.Host] = h.Host != self
		}
	}
	for name, other := range held {
		if !other {
			continue
		}
		node, err := nodes.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("node %s: %w", name, err))
			continue
		}
		if !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService }) {
			continue
		}
		freed, err := disks.Fence(ctx, storage.Holder{Host: name})
		errs = append(errs, err)
		if len(freed) > 0 {
			slog.Warn("volumes of a node that is out of service are free", "node", name, "volumes", freed)
		}
	}
	return errors.Join(errs...)
}
