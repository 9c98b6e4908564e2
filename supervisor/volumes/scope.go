package volumes

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	storagehelpers "k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"github.com/openatoll/atoll/api/v1alpha1"
	atollcsi "github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/storage/csi/controllers"
)

// A scope is the volumes of one vCenter, as controllers have it.
type scope struct{ *connection }

var _ controllers.Scope = (*scope)(nil)

// Claim: a policy of vCenter is to make the volume. A class that has not been
// seen yet is waited for.
func (s *scope) Claim(_ *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) bool {
	return class == nil || class.Parameters[v1alpha1.PolicyIDParameter] != ""
}

// Where are the datastores that the Supervisor lets the policy have, the freest
// first.
func (s *scope) Where(ctx context.Context, claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) (*csi.TopologyRequirement, error) {
	id := class.Parameters[v1alpha1.PolicyIDParameter]
	if id == "" {
		return nil, &controller.IgnoredError{Reason: "the class names no policy of vCenter"}
	}
	policy, err := s.policy(ctx, id)
	if err != nil {
		return nil, err
	}
	if policy == nil {
		return nil, fmt.Errorf("StorageClass %s names storage policy %s, which vCenter %s is not known to have: name another class", class.Name, id, s.address) //nolint:staticcheck // a kind's name
	}
	if ready := meta.FindStatusCondition(policy.Status.Conditions, v1alpha1.ConditionReady); ready != nil && ready.Reason == v1alpha1.ReasonPolicyGone {
		return nil, fmt.Errorf("vCenter %s has no storage policy %q any more: name another class than %s", s.address, policy.Status.PolicyName, class.Name)
	}
	stores := slices.Clone(policy.Status.Datastores)
	slices.SortStableFunc(stores, func(a, b v1alpha1.DatastoreStatus) int {
		return cmp.Or(b.Free.Cmp(a.Free), cmp.Compare(a.Name, b.Name))
	})
	if stores, err = s.reachable(ctx, claim, stores); err != nil {
		return nil, err
	}
	if len(stores) == 0 {
		return nil, fmt.Errorf("storage policy %s fits no datastore that the Supervisor may use: tag one in vCenter, or add one to the Supervisor's spec.datastores", policy.Name)
	}
	out := &csi.TopologyRequirement{}
	for _, d := range stores {
		out.Requisite = append(out.Requisite, &csi.Topology{Segments: map[string]string{atollcsi.DatastoreKey(d.ID): atollcsi.Reachable}})
	}
	return out, nil
}

// reachable leaves those datastores that the node can reach which the scheduler
// has selected, if it has.
func (s *scope) reachable(ctx context.Context, claim *corev1.PersistentVolumeClaim, all []v1alpha1.DatastoreStatus) ([]v1alpha1.DatastoreStatus, error) {
	name := claim.Annotations[storagehelpers.AnnSelectedNode]
	if name == "" {
		return all, nil
	}
	node, err := s.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(d v1alpha1.DatastoreStatus) bool {
		return node.Labels[atollcsi.DatastoreKey(d.ID)] != atollcsi.Reachable
	})
	if len(all) == 0 {
		return nil, fmt.Errorf("node %s, which the scheduler has selected, reaches no datastore of the storage policy in vCenter %s: volumes of vSphere are for pods on ESXi nodes", name, s.address)
	}
	return all, nil
}

// Made says which vCenter has the volume, and keeps pods on nodes that are its
// hosts.
func (s *scope) Made(ctx context.Context, pv *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) error {
	uuid, err := s.store.VCenter(ctx)
	if err != nil {
		return err
	}
	if pv.Spec.CSI.VolumeAttributes == nil {
		pv.Spec.CSI.VolumeAttributes = map[string]string{}
	}
	pv.Spec.CSI.VolumeAttributes[controllers.VCenterAttribute] = uuid
	pv.Spec.CSI.VolumeAttributes[v1alpha1.PolicyIDParameter] = class.Parameters[v1alpha1.PolicyIDParameter]
	if pv.Spec.NodeAffinity == nil {
		pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{}
	}
	if pv.Spec.NodeAffinity.Required == nil {
		pv.Spec.NodeAffinity.Required = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{}}}
	}
	for i := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
		term := &pv.Spec.NodeAffinity.Required.NodeSelectorTerms[i]
		// A host of vCenter may bear a KVM node's name.
		term.MatchExpressions = append(term.MatchExpressions, corev1.NodeSelectorRequirement{
			Key: atollcsi.TopologyVCenter, Operator: corev1.NodeSelectorOpIn, Values: []string{uuid},
		})
	}
	nodes, err := s.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{Limit: 1, LabelSelector: labels.Set{atollcsi.TopologyVCenter: uuid}.String()})
	if err == nil && len(nodes.Items) == 0 {
		s.events.Eventf(claim, corev1.EventTypeNormal, "NoNodeReachesVolume",
			"the volume is a disk in vCenter %s, and no node of the cluster is an ESXi host of it: pods with this claim stay Pending until there is one", s.address)
	}
	return nil
}

// Volume: one that a vCenter has, whichever: Reach tells.
func (s *scope) Volume(pv *corev1.PersistentVolume) bool { return controllers.OfVCenter(pv) }

// Reach: what one vCenter does not know another may have.
func (s *scope) Reach(ctx context.Context, pv *corev1.PersistentVolume) error {
	uuid, err := s.store.VCenter(ctx)
	if err != nil {
		return fmt.Errorf("volume %s: %w", pv.Name, err)
	}
	if of := pv.Spec.CSI.VolumeAttributes[controllers.VCenterAttribute]; of != uuid {
		return fmt.Errorf("volume %s is in the vCenter with the instance UUID %s, and the Supervisor names %s (%s): nothing is done about it", pv.Name, of, s.address, uuid)
	}
	return nil
}

// Keeper names the vCenter: of another one nothing is taken or deleted here.
func (s *scope) Keeper(ctx context.Context) (string, error) {
	uuid, err := s.store.VCenter(ctx)
	if err != nil {
		return "", err
	}
	s.instance.Store(&uuid)
	return v1alpha1.ContentOfVCenter + uuid, nil
}

// Content: snapshots of vCenter's volumes are the supervisor's, whichever node the
// snapshot controller has found for the volume. Where no PersistentVolume tells,
// vCenter is asked.
func (s *scope) Content(c *snapshotv1.VolumeSnapshotContent) controllers.Ownership {
	keeper := c.Labels[controllers.ContentKeeper]
	of, known := strings.CutPrefix(keeper, v1alpha1.ContentOfVCenter)
	if !known {
		of, known = s.vcenterOf(c)
	}
	uuid := s.instance.Load()
	switch {
	case !known && keeper == "":
		return controllers.Whoever
	case !known || uuid == nil:
		return controllers.Theirs // a node's, or not asked yet
	case of == *uuid:
		return controllers.Ours
	}
	if ready := c.Status != nil && c.Status.ReadyToUse != nil && *c.Status.ReadyToUse; !ready || c.DeletionTimestamp != nil {
		message := fmt.Sprintf("the snapshot is of a disk in the vCenter with the instance UUID %s, and the Supervisor names %s (%s): nothing is done about it", of, s.address, *uuid)
		s.events.Event(c, corev1.EventTypeWarning, "SnapshotElsewhere", message)
		if ref := c.Spec.VolumeSnapshotRef; ref.UID != "" {
			s.events.Event(&ref, corev1.EventTypeWarning, "SnapshotElsewhere", message+" ("+c.Name+")")
		}
	}
	return controllers.Theirs
}

// vcenterOf is the vCenter of the volume of which a content is the snapshot; false
// where that is not known, or none.
func (s *scope) vcenterOf(c *snapshotv1.VolumeSnapshotContent) (string, bool) {
	if c.Spec.Source.VolumeHandle == nil {
		return "", false
	}
	all, err := s.factory.Core().V1().PersistentVolumes().Lister().List(labels.Everything())
	if err != nil {
		return "", false
	}
	for _, pv := range all {
		if controllers.OfVCenter(pv) && pv.Spec.CSI.Driver == c.Spec.Driver && pv.Spec.CSI.VolumeHandle == *c.Spec.Source.VolumeHandle {
			return pv.Spec.CSI.VolumeAttributes[controllers.VCenterAttribute], true
		}
	}
	return "", false
}
