package controllers

import (
	"context"
	"fmt"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	storagehelpers "k8s.io/component-helpers/storage/volume"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"github.com/openatoll/atoll/api/v1alpha1"
	atollcsi "github.com/openatoll/atoll/storage/csi"
)

// A Scope says for which claims and volumes an instance cares. Those of two
// instances never overlap: nothing else keeps them from making a volume twice.
type Scope interface {
	// Claim tells whether the volume of a claim of a class is to be made here.
	Claim(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) bool
	// Where is where it may be made.
	Where(ctx context.Context, claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) (*csi.TopologyRequirement, error)
	// Made amends the PersistentVolume of a volume that was made, before it is
	// written.
	Made(ctx context.Context, pv *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) error
	// Volume tells whether a volume is deleted and expanded here.
	Volume(pv *corev1.PersistentVolume) bool
	// Reach is nil if the driver's back end is the volume's; else the driver is
	// not called.
	Reach(ctx context.Context, pv *corev1.PersistentVolume) error
	// Keeper is the label managed-by of the contents whose snapshots are taken and
	// deleted here. While it is not known the error says why.
	Keeper(ctx context.Context) (string, error)
	// Content says whose a content is that lacks that label.
	Content(c *snapshotv1.VolumeSnapshotContent) Ownership
}

// Ownership says whose a VolumeSnapshotContent is.
type Ownership int

// A content is another's, or whoever's the snapshot or volume is, or taken at once.
const (
	Theirs Ownership = iota
	Whoever
	Ours
)

// VCenterAttribute of a PersistentVolume is the instance UUID of the vCenter that
// has the volume. No node cares for such a volume: the supervisor does.
const VCenterAttribute = "vcenter"

// OfVCenter tells whether a volume is vSphere's.
func OfVCenter(pv *corev1.PersistentVolume) bool {
	return pv.Spec.CSI != nil && pv.Spec.CSI.VolumeAttributes[VCenterAttribute] != ""
}

// A nodeScope is the datastores that a node reaches.
type nodeScope struct {
	name string
	// segments are the topology of the node.
	segments map[string]string
}

// Claim: a claim is of the node that the scheduler has selected, unless a policy
// of vCenter is to make its volume.
func (n nodeScope) Claim(claim *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) bool {
	return claim.Annotations[storagehelpers.AnnSelectedNode] == n.name && (class == nil || class.Parameters[v1alpha1.PolicyIDParameter] == "")
}

func (n nodeScope) Where(_ context.Context, _ *corev1.PersistentVolumeClaim, class *storagev1.StorageClass) (*csi.TopologyRequirement, error) {
	if class.Parameters[v1alpha1.PolicyIDParameter] != "" {
		return nil, &controller.IgnoredError{Reason: "a policy of vCenter makes the volume, in the supervisor"}
	}
	here := []*csi.Topology{{Segments: n.segments}}
	return &csi.TopologyRequirement{Requisite: here, Preferred: here}, nil
}

func (nodeScope) Made(context.Context, *corev1.PersistentVolume, *corev1.PersistentVolumeClaim, *storagev1.StorageClass) error {
	return nil
}

// Volume: a volume is deleted where it can be reached.
func (n nodeScope) Volume(pv *corev1.PersistentVolume) bool {
	if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != atollcsi.Name || OfVCenter(pv) {
		return false
	}
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return true
	}
	return slices.ContainsFunc(pv.Spec.NodeAffinity.Required.NodeSelectorTerms, n.meets)
}

func (n nodeScope) Reach(_ context.Context, pv *corev1.PersistentVolume) error {
	if !n.Volume(pv) {
		return fmt.Errorf("volume %s cannot be reached from node %s", pv.Name, n.name)
	}
	return nil
}

// Keeper is the node's name.
func (n nodeScope) Keeper(context.Context) (string, error) { return n.name, nil }

// Content: a node takes what no other cares for, if it has it.
func (n nodeScope) Content(c *snapshotv1.VolumeSnapshotContent) Ownership {
	if c.Labels[ContentKeeper] == "" {
		return Whoever
	}
	return Theirs
}

// meets tells whether the node meets a term that topologies were turned into.
func (n nodeScope) meets(term corev1.NodeSelectorTerm) bool {
	if len(term.MatchExpressions) == 0 || len(term.MatchFields) > 0 {
		return false
	}
	for _, e := range term.MatchExpressions {
		have, ok := n.segments[e.Key]
		if !ok || e.Operator != corev1.NodeSelectorOpIn || !slices.Contains(e.Values, have) {
			return false
		}
	}
	return true
}
