package placement

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/cache"
	storagehelpers "k8s.io/component-helpers/storage/volume"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/keyqueue"
)

const (
	// anyRoom is the index key of the claims that begin empty.
	anyRoom = "room"
	// settleTime is how long a claim stays with a node whose room no longer is
	// enough: what took it may be this claim's own volume, whose PersistentVolume
	// is written within it.
	settleTime = 10 * time.Second
)

// empty: a volume is to be made that begins as nothing. The controller manager says
// by whom: of a class that binds at once when no volume that is there fits, of one
// that waits when a node is selected.
func empty(claim *corev1.PersistentVolumeClaim) bool {
	return claim.Spec.DataSourceRef == nil && claim.Annotations[storagehelpers.AnnStorageProvisioner] == v1alpha1.CSIDriverName
}

// atOnce: nodes make the class's volumes, and no pod is waited for.
func atOnce(class *storagev1.StorageClass) bool {
	return !ofVCenter(class) &&
		(class.VolumeBindingMode == nil || *class.VolumeBindingMode == storagev1.VolumeBindingImmediate)
}

// ofVCenter: no node makes the class's volumes.
func ofVCenter(class *storagev1.StorageClass) bool {
	return class.Parameters[v1alpha1.PolicyIDParameter] != ""
}

// watchRoom looks again at claims that begin empty when it may have become
// another node's turn.
func (p *Placer) watchRoom() {
	again := func() { p.changed(anyRoom) }
	keyqueue.Handle(p.Core.Storage().V1().CSIStorageCapacities().Informer(), func(*storagev1.CSIStorageCapacity) { again() })
	keyqueue.Handle(p.Core.Storage().V1().StorageClasses().Informer(), func(*storagev1.StorageClass) { again() })
	_, _ = p.Core.Core().V1().Nodes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { again() },
		DeleteFunc: func(any) { again() },
		UpdateFunc: func(before, now any) {
			a, _ := before.(*corev1.Node)
			b, _ := now.(*corev1.Node)
			if a == nil || b == nil || usable(a) != usable(b) || !labels.Equals(a.Labels, b.Labels) {
				again() // and not at each heartbeat
			}
		},
	})
}

// A room is what a node has for volumes of a class, in bytes.
type room struct {
	node string
	free int64 // in all
	most int64 // for one volume
}

// rooms are those of the nodes that say so, by node.
func (p *Placer) rooms(class *storagev1.StorageClass, nodes []*corev1.Node) (map[string]room, error) {
	all, err := p.Core.Storage().V1().CSIStorageCapacities().Lister().List(labels.Everything())
	if err != nil {
		return nil, err
	}
	out := map[string]room{}
	for _, c := range all {
		if c.StorageClassName != class.Name || c.Capacity == nil && c.MaximumVolumeSize == nil {
			continue
		}
		at, err := metav1.LabelSelectorAsSelector(c.NodeTopology)
		if err != nil {
			return nil, fmt.Errorf("CSIStorageCapacity %s: %w", c.Name, err)
		}
		most, free := c.MaximumVolumeSize, c.Capacity
		if most == nil {
			most = free // as the scheduler reads it
		}
		if free == nil {
			free = most
		}
		for _, n := range nodes {
			if r := (room{n.Name, free.Value(), most.Value()}); at.Matches(labels.Set(n.Labels)) && r.most >= out[n.Name].most {
				out[n.Name] = r
			}
		}
	}
	return out, nil
}

// placeByRoom says on which node the volume of a claim that begins empty is made,
// or why on none.
func (p *Placer) placeByRoom(ctx context.Context, key string, claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) error {
	nodes, err := p.Core.Core().V1().Nodes().Lister().List(labels.Everything())
	if err != nil {
		return err
	}
	rooms, err := p.rooms(class, nodes)
	if err != nil {
		return err
	}
	size := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	selected := claim.Annotations[storagehelpers.AnnSelectedNode]
	isThere := slices.ContainsFunc(nodes, func(n *corev1.Node) bool { return n.Name == selected })
	if selected != "" {
		r, known := rooms[selected]
		if isThere && (!known || r.most >= size.Value()) {
			delete(p.short, key)
			return nil
		}
		if stays, err := p.settling(ctx, key, claim); stays || err != nil {
			return err
		}
	}
	best, why := choose(size, class, nodes, rooms)
	switch {
	case why == "":
		delete(p.short, key)
		return p.selectNode(ctx, claim, best.node, "PlacedByRoom",
			fmt.Sprintf("the volume is made on node %s, which has %s free for StorageClass %s", best.node, bytes(best.free), class.Name))
	case !isThere: // else it says itself why it makes none
		p.Events.Event(claim, corev1.EventTypeWarning, "NotPlaced", why)
	}
	return nil
}

// settling: it is not certain yet that the node that a claim has will make no
// volume.
func (p *Placer) settling(ctx context.Context, key string, claim *corev1.PersistentVolumeClaim) (bool, error) {
	since, seen := p.short[key]
	if !seen {
		since = p.now()
		p.short[key] = since
	}
	if left := settleTime - p.now().Sub(since); left > 0 {
		p.queue.AddAfter(key, left)
		return true, nil
	}
	return p.made(ctx, claim)
}

// choose is the node with the most room of those that may take a volume; if there
// is none, why.
func choose(size resource.Quantity, class *storagev1.StorageClass, nodes []*corev1.Node, rooms map[string]room) (best room, why string) {
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n *corev1.Node) bool { return !usable(n) })
	if len(nodes) == 0 {
		return room{}, "no node is ready and schedulable"
	}
	which := ""
	if len(class.AllowedTopologies) > 0 {
		which = fmt.Sprintf(" of the allowedTopologies of StorageClass %s", class.Name)
	}
	nodes = slices.DeleteFunc(nodes, func(n *corev1.Node) bool { return !allowed(class.AllowedTopologies, n) })
	var has []room
	for _, n := range nodes {
		if r := rooms[n.Name]; r.most > 0 {
			has = append(has, r)
		}
	}
	policy := cmp.Or(class.Parameters[v1alpha1.PolicyParameter], "of StorageClass "+class.Name)
	switch {
	case len(nodes) == 0:
		return room{}, "no node" + which + " is ready and schedulable"
	case len(has) == 0:
		return room{}, fmt.Sprintf("no node%s offers policy %s, or none has any room for it", which, policy)
	}
	largest := slices.MaxFunc(has, func(a, b room) int {
		return cmp.Or(cmp.Compare(a.most, b.most), strings.Compare(b.node, a.node))
	})
	has = slices.DeleteFunc(has, func(r room) bool { return r.most < size.Value() })
	if len(has) == 0 {
		return room{}, fmt.Sprintf("no node%s has room for %s of policy %s: the most is %s, on node %s", which, size.String(), policy, bytes(largest.most), largest.node)
	}
	return slices.MaxFunc(has, func(a, b room) int {
		return cmp.Or(cmp.Compare(a.free, b.free), strings.Compare(b.node, a.node))
	}), ""
}

// usable: a pod that tolerates nothing may come to the node.
func usable(n *corev1.Node) bool {
	return isReady(n) && n.DeletionTimestamp == nil && !n.Spec.Unschedulable && !slices.ContainsFunc(n.Spec.Taints, func(t corev1.Taint) bool {
		return t.Effect == corev1.TaintEffectNoSchedule || t.Effect == corev1.TaintEffectNoExecute
	})
}

// allowed: one of the terms is met, or there is none.
func allowed(terms []corev1.TopologySelectorTerm, n *corev1.Node) bool {
	return len(terms) == 0 || slices.ContainsFunc(terms, func(t corev1.TopologySelectorTerm) bool {
		return !slices.ContainsFunc(t.MatchLabelExpressions, func(e corev1.TopologySelectorLabelRequirement) bool {
			value, has := n.Labels[e.Key]
			return !has || !slices.Contains(e.Values, value)
		})
	})
}

// bytes as people read them: from 1 MiB on, in whole ones.
func bytes(n int64) string {
	const mebi = 1 << 20
	if n >= mebi {
		n -= n % mebi
	}
	return resource.NewQuantity(n, resource.BinarySI).String()
}
