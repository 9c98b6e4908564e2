package namespaces

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// defaultOrphanGrace is how long something in vSphere must have been without a
// SupervisorNamespace before it is taken away, if it is empty.
const defaultOrphanGrace = 10 * time.Minute

// collectOrphans takes away empty pools and folders that bear our mark and
// whose SupervisorNamespace is gone, as when somebody took its finalizer away.
// It goes by a list from the API server and not by the cache, waits for
// the grace, and does nothing where that list is empty: after a restored
// backup or a mistake, losing everything must not follow from having nothing.
// What holds VMs stays (vc.Delete), and is told. It returns when to look again.
func (r *supervisorReconciler) collectOrphans(ctx context.Context, sup *v1alpha1.Supervisor) (again time.Duration, err error) {
	vcenter, err := r.conn.client()
	if err != nil {
		return supervisorEvery, nil
	}
	refs, err := vcenter.List()
	if err != nil {
		return supervisorEvery, nil // nothing is known
	}
	known := map[string]bool{}
	cached := &v1alpha1.SupervisorNamespaceList{}
	if err := r.client.List(ctx, cached, client.UnsafeDisableDeepCopy); err != nil {
		return 0, err
	}
	again = supervisorEvery
	for i := range cached.Items {
		known[string(cached.Items[i].UID)] = true
	}
	seen := map[string]time.Time{}
	var due []int
	for i, ref := range refs {
		if known[ref.UID] {
			continue
		}
		at, ok := r.orphans[ref.UID]
		if !ok {
			at = r.now()
		}
		seen[ref.UID] = at
		if left := r.orphanGrace - r.now().Sub(at); left <= 0 {
			due = append(due, i)
		} else {
			again = min(again, left)
		}
	}
	r.orphans = seen
	r.metrics.orphans.Set(float64(len(seen)))
	if len(due) == 0 {
		return again, nil
	}
	live := &v1alpha1.SupervisorNamespaceList{}
	if err := r.live.List(ctx, live); err != nil {
		return 0, err
	}
	if len(live.Items) == 0 {
		return again, nil
	}
	for i := range live.Items {
		known[string(live.Items[i].UID)] = true
	}
	for _, i := range due {
		ref := refs[i]
		if known[ref.UID] {
			continue
		}
		switch err := vcenter.Delete(ctx, ref); {
		case err == nil:
			r.log.Info("removed what a namespace without an object had in vSphere", "namespace", ref.Name, "uid", ref.UID)
		case errdefs.IsUnavailable(err):
			return again, nil
		default:
			seen[ref.UID] = r.now() // asked again after the grace
			r.events.Eventf(sup, nil, corev1.EventTypeWarning, "Orphan", "Collect", "%s",
				clip(fmt.Sprintf("namespace %q has no SupervisorNamespace, but something in vSphere: %v", ref.Name, err), maxText))
		}
	}
	return again, nil
}
