// Package placement says on which node a volume is made, where the scheduler does
// not or was wrong. Claims carry the answer as the scheduler itself gives it, in the
// annotation volume.kubernetes.io/selected-node, which it heeds:
//
//   - A claim that begins as a snapshot or as another claim can be made where its
//     source is, and nowhere else (placement.go); of several such nodes on the one
//     that writes to the source, when another says that this alone can copy it
//     (reschedule.go).
//   - A claim that begins empty, of a class that binds at once, has no pod by which
//     the scheduler would select a node: it gets the one with most room, by what
//     nodes say in CSIStorageCapacity objects (room.go).
//   - A claim whose node, selected by the scheduler, makes no volume after all, or
//     has left the cluster, is given back to the scheduler (reschedule.go).
package placement

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotinformers "github.com/kubernetes-csi/external-snapshotter/client/v8/informers/externalversions"
	"github.com/kubernetes-csi/external-snapshotter/v8/pkg/utils"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	storagehelpers "k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/internal/keyqueue"
)

const (
	kindSnapshot = "VolumeSnapshot"
	kindClaim    = "PersistentVolumeClaim"
	bySource     = "atoll-source"
)

// managedBy is the label of a VolumeSnapshotContent that names the node which
// cares for it.
const managedBy = utils.VolumeSnapshotContentManagedByLabel

// What failed is tried again after retryFirst, doubling up to retryAtMost.
const (
	retryFirst  = 250 * time.Millisecond
	retryAtMost = 30 * time.Second
)

// A Cluster is what a Placer sees of it, with the rights of atoll:snapshots.
type Cluster struct {
	Client kubernetes.Interface
	// Core and Kinds are started after New.
	Core   informers.SharedInformerFactory
	Kinds  snapshotinformers.SharedInformerFactory
	Events record.EventRecorder
	Log    *slog.Logger
}

// A Placer gives claims that begin as something the node on which that is, and
// those of classes that bind at once one that has room. From those that wait for
// a pod it takes a node that makes no volume.
type Placer struct {
	Cluster
	claims cache.SharedIndexInformer
	queue  keyqueue.Queue
	// short is since when claims that have a node are known to have no room there.
	// place alone has it.
	short map[string]time.Time
	// again is of claims that were taken from their nodes. place alone has it.
	again map[string]rescheduling
	now   func() time.Time
}

// New returns a Placer that does nothing before Run.
func New(w Cluster) *Placer {
	p := &Placer{Cluster: w, claims: w.Core.Core().V1().PersistentVolumeClaims().Informer(), queue: keyqueue.New(retryFirst, retryAtMost), short: map[string]time.Time{}, again: map[string]rescheduling{}, now: time.Now}
	// Only before the informer starts, which is now.
	_ = p.claims.AddIndexers(cache.Indexers{bySource: func(o any) ([]string, error) {
		claim, ok := o.(*corev1.PersistentVolumeClaim)
		switch {
		case !ok || !waiting(claim):
			return nil, nil
		case empty(claim):
			return []string{anyRoom}, nil
		}
		return []string{sourceOf(claim).key(claim.Namespace)}, nil
	}})
	keyqueue.Handle(p.claims, func(claim *corev1.PersistentVolumeClaim) {
		if waiting(claim) || refusal(claim) != nil {
			p.queue.Add(claim.Namespace + "/" + claim.Name)
		}
		p.changed(source{kindClaim, claim.Name}.key(claim.Namespace))
	})
	keyqueue.Handle(w.Kinds.Snapshot().V1().VolumeSnapshots().Informer(), func(s *snapshotv1.VolumeSnapshot) {
		p.changed(source{kindSnapshot, s.Name}.key(s.Namespace))
	})
	keyqueue.Handle(w.Kinds.Snapshot().V1().VolumeSnapshotContents().Informer(), func(c *snapshotv1.VolumeSnapshotContent) {
		p.changed(source{kindSnapshot, c.Spec.VolumeSnapshotRef.Name}.key(c.Spec.VolumeSnapshotRef.Namespace))
	})
	// Instantiated before the factory starts.
	w.Core.Core().V1().PersistentVolumes().Informer()
	p.watchRoom()
	return p
}

// changed looks again at the claims that begin as something, or at those that
// begin empty.
func (p *Placer) changed(key string) {
	keys, _ := p.claims.GetIndexer().IndexKeys(bySource, key)
	for _, k := range keys {
		p.queue.Add(k)
	}
}

// A source is what a claim of the same namespace begins as.
type source struct{ kind, name string }

func (s source) key(namespace string) string { return s.kind + "/" + namespace + "/" + s.name }

func (s source) String() string { return s.kind + " " + s.name }

// sourceOf is the zero source for a claim that begins empty, or as something of
// which the driver knows nothing. The API server fills dataSourceRef wherever
// dataSource is set.
func sourceOf(claim *corev1.PersistentVolumeClaim) source {
	ref := claim.Spec.DataSourceRef
	if ref == nil || ref.Namespace != nil && *ref.Namespace != claim.Namespace {
		return source{}
	}
	group := ""
	if ref.APIGroup != nil {
		group = *ref.APIGroup
	}
	if group == "" && ref.Kind == kindClaim || group == snapshotv1.GroupName && ref.Kind == kindSnapshot {
		return source{ref.Kind, ref.Name}
	}
	return source{}
}

func waiting(claim *corev1.PersistentVolumeClaim) bool {
	return claim.Spec.VolumeName == "" && claim.DeletionTimestamp == nil && (empty(claim) || sourceOf(claim) != source{})
}

// Run places claims until ctx ends. The caches are full before.
func (p *Placer) Run(ctx context.Context) {
	keyqueue.Run(ctx, p.queue, p.Log, "claim", p.place)
}

// place says on which node a claim's volume is to be made, if it waits for that.
// What is wrong with the source is the provisioner's to say, which looks at it
// once more.
func (p *Placer) place(ctx context.Context, key string) error {
	namespace, name, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	claim, err := p.Core.Core().V1().PersistentVolumeClaims().Lister().PersistentVolumeClaims(namespace).Get(name)
	if err != nil || !waiting(claim) {
		delete(p.short, key)
		if err == nil {
			err = p.heard(ctx, claim)
		}
		return client.IgnoreNotFound(err)
	}
	class := p.classOf(claim)
	switch {
	case class == nil || ofVCenter(class):
		return nil
	case empty(claim) && !atOnce(class):
		return p.reschedule(ctx, key, claim)
	case empty(claim):
		return p.placeByRoom(ctx, key, claim, class)
	}
	nodes, err := p.reaching(claim)
	if errors.Is(err, errInVCenter) {
		p.Events.Event(claim, corev1.EventTypeWarning, "NotPlaced", fmt.Sprintf(
			"%s is of a disk in vCenter, and StorageClass %s makes volumes on nodes: name a StorageClass of one of vCenter's policies, as that of its volume", sourceOf(claim), class.Name))
		return nil
	}
	if said := refusal(claim); said != nil && client.IgnoreNotFound(err) == nil {
		return p.handOver(ctx, key, claim, nodes, said.Reason)
	}
	if err != nil || len(nodes) == 0 {
		return client.IgnoreNotFound(err) // looked at again when the source changes
	}
	if slices.Contains(nodes, claim.Annotations[storagehelpers.AnnSelectedNode]) {
		return nil
	}
	return p.selectNode(ctx, claim, nodes[0], "PlacedBySource", fmt.Sprintf("the volume is made on node %s, where %s is", nodes[0], sourceOf(claim)))
}

// selectNode writes a node onto a claim that is as it was when it was chosen, and
// tells of it.
func (p *Placer) selectNode(ctx context.Context, claim *corev1.PersistentVolumeClaim, node, reason, message string) error {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"resourceVersion": claim.ResourceVersion, "annotations": map[string]string{storagehelpers.AnnSelectedNode: node},
	}})
	if err != nil {
		return err
	}
	if _, err := p.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Patch(ctx, claim.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return client.IgnoreNotFound(err)
	}
	p.Events.Event(claim, corev1.EventTypeNormal, reason, message)
	return nil
}

// classOf is a claim's class, if it is one of the driver's; else nil.
func (p *Placer) classOf(claim *corev1.PersistentVolumeClaim) *storagev1.StorageClass {
	class, err := p.Core.Storage().V1().StorageClasses().Lister().Get(storagehelpers.GetPersistentVolumeClaimClass(claim))
	if err != nil || class.Provisioner != v1alpha1.CSIDriverName {
		return nil
	}
	return class
}

// errInVCenter: a snapshot is on no node.
var errInVCenter = errors.New("the snapshot is in vCenter")

// reaching are the nodes on which a claim's source is, best first; none while
// that is not known.
func (p *Placer) reaching(claim *corev1.PersistentVolumeClaim) ([]string, error) {
	s := sourceOf(claim)
	if s.kind == kindSnapshot {
		return p.reachingSnapshot(claim.Namespace, s.name)
	}
	from, err := p.Core.Core().V1().PersistentVolumeClaims().Lister().PersistentVolumeClaims(claim.Namespace).Get(s.name)
	if err != nil || from.Status.Phase != corev1.ClaimBound {
		return nil, err
	}
	pv, err := p.Core.Core().V1().PersistentVolumes().Lister().Get(from.Spec.VolumeName)
	if err != nil || pv.Spec.CSI == nil || pv.Spec.CSI.Driver != v1alpha1.CSIDriverName {
		return nil, err
	}
	nodes, err := p.Core.Core().V1().Nodes().Lister().List(labels.Everything())
	if err != nil {
		return nil, err
	}
	return meeting(pv, nodes)
}

func (p *Placer) reachingSnapshot(namespace, name string) ([]string, error) {
	snapshot, err := p.Kinds.Snapshot().V1().VolumeSnapshots().Lister().VolumeSnapshots(namespace).Get(name)
	if err != nil || !ready(snapshot) {
		return nil, err
	}
	content, err := p.Kinds.Snapshot().V1().VolumeSnapshotContents().Lister().Get(*snapshot.Status.BoundVolumeSnapshotContentName)
	if err != nil || content.Spec.Driver != v1alpha1.CSIDriverName || content.Labels[managedBy] == "" {
		return nil, err
	}
	if strings.HasPrefix(content.Labels[managedBy], v1alpha1.ContentOfVCenter) {
		return nil, errInVCenter
	}
	return []string{content.Labels[managedBy]}, nil
}

// meeting are the nodes that meet a volume's affinity, those that are ready
// first, by name.
func meeting(pv *corev1.PersistentVolume, nodes []*corev1.Node) ([]string, error) {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return nil, nil // any: the scheduler's choice
	}
	selector, err := nodeaffinity.NewNodeSelector(pv.Spec.NodeAffinity.Required)
	if err != nil {
		return nil, fmt.Errorf("PersistentVolume %s: %w", pv.Name, err)
	}
	nodes = slices.DeleteFunc(slices.Clone(nodes), func(n *corev1.Node) bool { return !selector.Match(n) })
	slices.SortFunc(nodes, func(a, b *corev1.Node) int {
		if ra, rb := isReady(a), isReady(b); ra != rb {
			if ra {
				return -1
			}
			return 1
		}
		return strings.Compare(a.Name, b.Name)
	})
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	return names, nil
}

func isReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

func ready(s *snapshotv1.VolumeSnapshot) bool {
	return s.Status != nil && s.Status.ReadyToUse != nil && *s.Status.ReadyToUse && s.Status.BoundVolumeSnapshotContentName != nil
}
