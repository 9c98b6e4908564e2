package podmirror

import (
	"context"
	"fmt"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/util/workqueue"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// hosts are the nodes, as the inventory was told of them.
type hosts struct {
	queue workqueue.TypedRateLimitingInterface[string]
	shown map[string]Host // of nextHost alone
}

// host is a node as the inventory should show it; ok is false for one that is
// not there, and for those whose pods are no VMs of its own.
func (c *caches) host(name string) (h Host, ok bool) {
	o, exists, err := c.nodes.GetByKey(name)
	if err != nil || !exists {
		return Host{}, false
	}
	return hostOf(o.(*corev1.Node))
}

func hostOf(node *corev1.Node) (h Host, ok bool) {
	if node.Labels[v1alpha1.LabelAccelerator] == "" {
		return Host{}, false
	}
	h = Host{Name: node.Name, CPUs: int(node.Status.Capacity.Cpu().Value()), Memory: node.Status.Capacity.Memory().Value(), State: HostNotResponding}
	for _, c := range node.Status.Conditions {
		if c.Type != corev1.NodeReady {
			continue
		}
		switch c.Status {
		case corev1.ConditionTrue:
			h.State = HostConnected
		case corev1.ConditionFalse:
			h.State = HostTroubled
		}
	}
	return h, true
}

// nextHost makes one host what its node is. One goroutine calls it.
func (c *Controller) nextHost(ctx context.Context) bool {
	name, shutdown := c.hosts.queue.Get()
	if shutdown {
		return false
	}
	defer c.hosts.queue.Done(name)
	err := c.reconcileHost(ctx, name)
	switch {
	case err == nil:
		c.hosts.queue.Forget(name)
	case ctx.Err() == nil:
		level := slog.LevelWarn
		if c.hosts.queue.NumRequeues(name) > 0 {
			level = slog.LevelDebug // the counter goes on
		}
		c.log.Log(ctx, level, "a host is not shown as its node is, trying again", "node", name, "err", err)
		c.hosts.queue.AddRateLimited(name)
	}
	return true
}

func (c *Controller) reconcileHost(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	h, wanted := c.caches.host(name)
	old, had := c.hosts.shown[name]
	if !wanted {
		delete(c.hosts.shown, name)
		hostsShown.Set(float64(len(c.hosts.shown)))
		err := c.o.Inventory.RemoveHost(ctx, name)
		count(opRemoveHost, err)
		if err != nil {
			return fmt.Errorf("take the host away: %w", err)
		}
		if had {
			c.log.Info("host of a node that is gone taken away", "node", name)
		}
		return nil
	}
	if had && old == h {
		return nil
	}
	err := c.o.Inventory.ShowHost(ctx, h)
	count(opShowHost, err)
	if err != nil {
		return fmt.Errorf("show the host: %w", err)
	}
	c.hosts.shown[name] = h
	hostsShown.Set(float64(len(c.hosts.shown)))
	if had {
		return nil
	}
	c.log.Info("node shown as a host", "node", name, "cpus", h.CPUs, "memory", h.Memory)
	// Their mirrors have waited for it.
	for _, key := range c.caches.podsBy(byNode, name) {
		c.queue.Forget(key)
		c.queue.Add(key)
	}
	return nil
}
