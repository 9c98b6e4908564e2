package controllers

import (
	"context"
	"fmt"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const (
	// snapshotGroup is the API group of VolumeSnapshots.
	snapshotGroup = snapshotv1.GroupName
	// annVolumeMode on a content, "true", is an admin's word that a device may be
	// restored as a file system, or the other way round (KEP-3141).
	annVolumeMode = "snapshot.storage.kubernetes.io/allow-volume-mode-change"
)

// restored finds the snapshot that a VolumeSnapshot is bound to.
func (p *provisioner) restored(ctx context.Context, o controller.ProvisionOptions, name string) (*csi.VolumeContentSource, error) {
	s, err := p.snapshots.VolumeSnapshots(o.PVC.Namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("spec.dataSource: VolumeSnapshot %s is not there", name)
	}
	if err != nil {
		return nil, err
	}
	if s.DeletionTimestamp != nil {
		return nil, fmt.Errorf("spec.dataSource: VolumeSnapshot %s is being deleted", name)
	}
	if s.Status == nil || s.Status.ReadyToUse == nil || !*s.Status.ReadyToUse || s.Status.BoundVolumeSnapshotContentName == nil {
		return nil, fmt.Errorf("spec.dataSource: VolumeSnapshot %s is not ready", name)
	}
	content, err := p.snapshots.VolumeSnapshotContents().Get(ctx, *s.Status.BoundVolumeSnapshotContentName, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	if err := p.fits(ctx, o.PVC, s, content); err != nil {
		return nil, err
	}
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Snapshot{Snapshot: &csi.VolumeContentSource_SnapshotSource{SnapshotId: *content.Status.SnapshotHandle}}}, nil
}

// fits says why a claim cannot begin as the snapshot of a content.
func (p *provisioner) fits(ctx context.Context, claim *corev1.PersistentVolumeClaim, s *snapshotv1.VolumeSnapshot, content *snapshotv1.VolumeSnapshotContent) error {
	ref := content.Spec.VolumeSnapshotRef
	switch {
	case ref.UID != s.UID || ref.Name != s.Name || ref.Namespace != s.Namespace:
		return fmt.Errorf("spec.dataSource: content %s is bound to another VolumeSnapshot than %s", content.Name, s.Name)
	case content.Spec.Driver != p.Driver:
		return fmt.Errorf("spec.dataSource: VolumeSnapshot %s is of driver %s", s.Name, content.Spec.Driver)
	case content.Status == nil || content.Status.SnapshotHandle == nil:
		return fmt.Errorf("spec.dataSource: VolumeSnapshot %s is not ready", s.Name)
	}
	if was := content.Spec.SourceVolumeMode; was != nil && (*was == corev1.PersistentVolumeBlock) != isBlock(claim) && content.Annotations[annVolumeMode] != "true" {
		return fmt.Errorf("spec.volumeMode: VolumeSnapshot %s is of a volume with mode %s: ask for that, or have an admin annotate VolumeSnapshotContent %s with %s=true", s.Name, *was, content.Name, annVolumeMode)
	}
	if size := content.Status.RestoreSize; size != nil {
		if err := largeEnough(claim, *resource.NewQuantity(*size, resource.BinarySI), "VolumeSnapshot "+s.Name); err != nil {
			return err
		}
	}
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if found, err := p.find(callCtx, *content.Status.SnapshotHandle); found == nil {
		why := ""
		if err != nil {
			why = ": " + told(err).Error()
		}
		return p.away(s.Name, content.Labels[ContentKeeper], why)
	}
	return nil
}

// away says where a snapshot is that is not here, or not known to be; why is the
// driver's error, after a colon.
func (p *provisioner) away(name, keeper, why string) error {
	ofVCenter := strings.HasPrefix(keeper, v1alpha1.ContentOfVCenter)
	switch {
	case p.NodeName == "" && why != "":
		return fmt.Errorf("spec.dataSource: whether vCenter has VolumeSnapshot %s is not known, which is asked again%s", name, why)
	case p.NodeName == "" && ofVCenter:
		return fmt.Errorf("spec.dataSource: VolumeSnapshot %s is not found in vCenter: if it was deleted there, delete it here; if the Supervisor names another vCenter, undo that", name)
	case p.NodeName == "":
		return fmt.Errorf("spec.dataSource: VolumeSnapshot %s is on node %q, not in vCenter: name the StorageClass of its volume", name, keeper)
	case ofVCenter:
		return fmt.Errorf("spec.dataSource: VolumeSnapshot %s is of a disk in vCenter, which node %s does not reach: name a StorageClass of one of vCenter's policies, as that of its volume", name, p.NodeName)
	}
	return fmt.Errorf("spec.dataSource: VolumeSnapshot %s cannot be reached from node %s, node %q cares for it: let the pod run there%s", name, p.NodeName, keeper, why)
}

// largeEnough says what is missing in a claim that begins as something larger.
func largeEnough(claim *corev1.PersistentVolumeClaim, size resource.Quantity, what string) error {
	if asked := claim.Spec.Resources.Requests[corev1.ResourceStorage]; asked.Cmp(size) < 0 {
		return fmt.Errorf("spec.resources.requests.storage: %s is less than the %s of %s: ask for as much at least", asked.String(), size.String(), what)
	}
	return nil
}
