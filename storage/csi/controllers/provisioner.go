package controllers

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

const (
	// defaultFSType of a class that names none.
	defaultFSType = "ext4"
	// Parameters with this prefix are for the provisioner, not for the driver.
	parameterPrefix = "csi.storage.k8s.io/"
	parameterFSType = parameterPrefix + "fstype"

	provisionThreads = 8
	retryFirst       = 500 * time.Millisecond
	retryAtMost      = time.Minute
)

// provisioner is upstream's interface on the driver.
type provisioner struct{ *group }

var (
	_ controller.BlockProvisioner = (*provisioner)(nil)
	_ controller.Qualifier        = (*provisioner)(nil)
	_ controller.DeletionGuard    = (*provisioner)(nil)
)

func newProvisionController(ctx context.Context, g *group) *controller.ProvisionController {
	return controller.NewProvisionController(ctx, g.client, g.Driver, &provisioner{g},
		controller.LeaderElection(false),
		controller.FailedProvisionThreshold(0),
		controller.FailedDeleteThreshold(0),
		controller.RateLimiter(workqueue.NewTypedItemExponentialFailureRateLimiter[string](retryFirst, retryAtMost)),
		controller.CreateProvisionedPVLimiter(workqueue.DefaultTypedControllerRateLimiter[string]()),
		controller.Threadiness(provisionThreads),
		controller.AddFinalizer(true),
		controller.ClaimsInformer(g.factory.Core().V1().PersistentVolumeClaims().Informer()),
		controller.VolumesInformer(ownVolumes{g.factory.Core().V1().PersistentVolumes().Informer(), g}),
		controller.ClassesInformer(g.factory.Storage().V1().StorageClasses().Informer()),
	)
}

// ownVolumes tells the library of this scope's volumes alone: it would put its
// finalizer onto every volume of the driver, also onto another node's, which
// admission refuses. Its store has all of them.
type ownVolumes struct {
	cache.SharedIndexInformer
	of *group
}

// AddEventHandlerWithResyncPeriod implements cache.SharedInformer.
func (o ownVolumes) AddEventHandlerWithResyncPeriod(h cache.ResourceEventHandler, period time.Duration) (cache.ResourceEventHandlerRegistration, error) {
	return o.SharedIndexInformer.AddEventHandlerWithResyncPeriod(cache.FilteringResourceEventHandler{
		FilterFunc: func(obj any) bool {
			pv, ok := obj.(*corev1.PersistentVolume)
			return !ok || o.of.mine(pv) // what has gone comes as another type, and is forgotten
		},
		Handler: h,
	}, period)
}

// SupportsBlock implements controller.BlockProvisioner.
func (p *provisioner) SupportsBlock(context.Context) bool { return true }

// ShouldProvision: a claim of this scope. What the cache has not seen of its
// class yet, the library waits for.
func (p *provisioner) ShouldProvision(_ context.Context, claim *corev1.PersistentVolumeClaim) bool {
	if !p.scope.Claim(claim, p.classOf(claim)) {
		p.refusals.forget(claim.UID)
		return false
	}
	return true
}

// classOf is a claim's StorageClass; nil: none is known.
func (p *provisioner) classOf(claim *corev1.PersistentVolumeClaim) *storagev1.StorageClass {
	if claim.Spec.StorageClassName == nil {
		return nil
	}
	class, err := p.factory.Storage().V1().StorageClasses().Lister().Get(*claim.Spec.StorageClassName)
	if err != nil {
		return nil
	}
	return class
}

// ShouldDelete: a volume of this scope.
func (p *provisioner) ShouldDelete(_ context.Context, pv *corev1.PersistentVolume) bool {
	return p.mine(pv)
}

// Provision makes a volume and the PersistentVolume of it.
func (p *provisioner) Provision(ctx context.Context, o controller.ProvisionOptions) (*corev1.PersistentVolume, controller.ProvisioningState, error) {
	if p.refusals.stands(o.PVC) {
		return nil, controller.ProvisioningFinished, &controller.IgnoredError{Reason: "another node is to be selected"}
	}
	req, err := p.request(ctx, o)
	if err != nil {
		return nil, controller.ProvisioningNoChange, err
	}
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := p.controller.CreateVolume(callCtx, req)
	if err != nil {
		if status.Code(err) == codes.ResourceExhausted {
			p.capacity.changed() // whoever chose this node is to see that it was wrong
		}
		if p.refusals.consider(callCtx, o.PVC, o.StorageClass, err) {
			return nil, controller.ProvisioningFinished, told(err)
		}
		return nil, stateAfter(err), told(err)
	}
	p.refusals.forget(o.PVC.UID)
	p.capacity.changed()
	pv := volumeOf(p.Driver, o, req, resp.GetVolume())
	if err := p.scope.Made(ctx, pv, o.PVC, o.StorageClass); err != nil {
		return nil, controller.ProvisioningInBackground, err
	}
	return pv, controller.ProvisioningFinished, nil
}

// stateAfter says whether a volume may be in the making all the same.
func stateAfter(err error) controller.ProvisioningState {
	switch status.Code(err) {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.Aborted, codes.Unknown:
		return controller.ProvisioningInBackground
	}
	return controller.ProvisioningFinished
}

// told is the error as users shall read it in events: a status' message alone.
// The code stays where the library looks for it.
func told(err error) error {
	if status.Code(err) == codes.InvalidArgument {
		return err
	}
	return errors.New(status.Convert(err).Message())
}

func (p *provisioner) request(ctx context.Context, o controller.ProvisionOptions) (*csi.CreateVolumeRequest, error) {
	if o.PVC.Spec.Selector != nil {
		return nil, errors.New("spec.selector: a volume that is to be made has no labels to select: remove it")
	}
	size := o.PVC.Spec.Resources.Requests[corev1.ResourceStorage]
	limit := o.PVC.Spec.Resources.Limits[corev1.ResourceStorage]
	where, err := p.scope.Where(ctx, o.PVC, o.StorageClass)
	if err != nil {
		return nil, err
	}
	req := &csi.CreateVolumeRequest{
		Name:          o.PVName,
		CapacityRange: &csi.CapacityRange{RequiredBytes: size.Value(), LimitBytes: limit.Value()},
		Parameters: map[string]string{
			parameterPrefix + "pvc/name": o.PVC.Name, parameterPrefix + "pvc/namespace": o.PVC.Namespace, parameterPrefix + "pv/name": o.PVName,
		},
		AccessibilityRequirements: where,
	}
	fsType := defaultFSType
	for k, v := range o.StorageClass.Parameters {
		if k == parameterFSType {
			fsType = v
			continue
		}
		req.Parameters[k] = v
	}
	for _, mode := range o.PVC.Spec.AccessModes {
		c := &csi.VolumeCapability{AccessMode: &csi.VolumeCapability_AccessMode{Mode: accessMode(mode)}}
		if isBlock(o.PVC) {
			c.AccessType = &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}}
		} else {
			c.AccessType = &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType, MountFlags: o.StorageClass.MountOptions}}
		}
		req.VolumeCapabilities = append(req.VolumeCapabilities, c)
	}
	req.VolumeContentSource, err = p.source(ctx, o)
	return req, err
}

func isBlock(claim *corev1.PersistentVolumeClaim) bool {
	return claim.Spec.VolumeMode != nil && *claim.Spec.VolumeMode == corev1.PersistentVolumeBlock
}

func accessMode(m corev1.PersistentVolumeAccessMode) csi.VolumeCapability_AccessMode_Mode {
	switch m {
	case corev1.ReadWriteOnce:
		return csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	case corev1.ReadWriteOncePod:
		return csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER
	case corev1.ReadOnlyMany:
		return csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
	case corev1.ReadWriteMany:
		return csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	}
	return csi.VolumeCapability_AccessMode_UNKNOWN
}

// source is what the claim says that the volume begins as.
func (p *provisioner) source(ctx context.Context, o controller.ProvisionOptions) (*csi.VolumeContentSource, error) {
	from := o.PVC.Spec.DataSource
	if ref := o.PVC.Spec.DataSourceRef; ref != nil {
		if ref.Namespace != nil && *ref.Namespace != o.PVC.Namespace {
			return nil, fmt.Errorf("spec.dataSourceRef.namespace is %q: a volume cannot begin as one of another namespace", *ref.Namespace)
		}
		from = &corev1.TypedLocalObjectReference{APIGroup: ref.APIGroup, Kind: ref.Kind, Name: ref.Name}
	}
	switch {
	case from == nil:
		return nil, nil
	case from.Kind == "PersistentVolumeClaim" && (from.APIGroup == nil || *from.APIGroup == ""):
		return p.cloned(o, from.Name)
	case from.Kind == "VolumeSnapshot" && from.APIGroup != nil && *from.APIGroup == snapshotGroup:
		return p.restored(ctx, o, from.Name)
	}
	// Somebody else fills such a volume, and makes it first.
	return nil, &controller.IgnoredError{Reason: fmt.Sprintf("data source %s is not one of the driver's", from.Kind)}
}

func (p *provisioner) cloned(o controller.ProvisionOptions, name string) (*csi.VolumeContentSource, error) {
	claim, err := p.factory.Core().V1().PersistentVolumeClaims().Lister().PersistentVolumeClaims(o.PVC.Namespace).Get(name)
	if err != nil {
		return nil, fmt.Errorf("spec.dataSource: %w", err)
	}
	if claim.DeletionTimestamp != nil {
		return nil, fmt.Errorf("spec.dataSource: claim %s is being deleted", name)
	}
	if claim.Status.Phase != corev1.ClaimBound {
		return nil, fmt.Errorf("spec.dataSource: claim %s is not bound yet", name)
	}
	pv, err := p.factory.Core().V1().PersistentVolumes().Lister().Get(claim.Spec.VolumeName)
	switch {
	case err != nil:
		return nil, fmt.Errorf("spec.dataSource: %w", err)
	case pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != claim.UID:
		return nil, fmt.Errorf("spec.dataSource: volume %s is not claim %s's", pv.Name, name)
	case !p.mine(pv) && p.NodeName == "":
		return nil, fmt.Errorf("spec.dataSource: volume %s of claim %s is a node's, not vSphere's: name its StorageClass", pv.Name, name)
	case !p.mine(pv):
		return nil, fmt.Errorf("spec.dataSource: volume %s of claim %s cannot be reached from node %s: let the pod run where the source is", pv.Name, name, p.NodeName)
	case isBlock(claim) != isBlock(o.PVC):
		return nil, fmt.Errorf("spec.volumeMode: claim %s has another one", name)
	}
	size := pv.Spec.Capacity[corev1.ResourceStorage]
	if err := largeEnough(o.PVC, size, "claim "+name); err != nil {
		return nil, err
	}
	return &csi.VolumeContentSource{Type: &csi.VolumeContentSource_Volume{Volume: &csi.VolumeContentSource_VolumeSource{VolumeId: pv.Spec.CSI.VolumeHandle}}}, nil
}

// volumeOf is the PersistentVolume of a volume that was made.
func volumeOf(driver string, o controller.ProvisionOptions, req *csi.CreateVolumeRequest, v *csi.Volume) *corev1.PersistentVolume {
	bytes := v.GetCapacityBytes()
	if bytes == 0 {
		bytes = req.CapacityRange.RequiredBytes
	}
	pv := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: o.PVName},
		Spec: corev1.PersistentVolumeSpec{
			AccessModes:  o.PVC.Spec.AccessModes,
			VolumeMode:   o.PVC.Spec.VolumeMode,
			MountOptions: o.StorageClass.MountOptions,
			Capacity:     corev1.ResourceList{corev1.ResourceStorage: *resource.NewQuantity(bytes, resource.BinarySI)},
			NodeAffinity: affinity(v.GetAccessibleTopology()),
			PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
				Driver: driver, VolumeHandle: v.VolumeId, VolumeAttributes: v.GetVolumeContext(),
			}},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
		},
	}
	if o.StorageClass.ReclaimPolicy != nil {
		pv.Spec.PersistentVolumeReclaimPolicy = *o.StorageClass.ReclaimPolicy
	}
	if m := req.VolumeCapabilities[0].GetMount(); m != nil {
		pv.Spec.CSI.FSType = m.FsType
	}
	return pv
}

// affinity are the nodes that reach a volume.
func affinity(topologies []*csi.Topology) *corev1.VolumeNodeAffinity {
	var terms []corev1.NodeSelectorTerm
	for _, t := range topologies {
		var term corev1.NodeSelectorTerm
		for _, k := range slices.Sorted(maps.Keys(t.GetSegments())) {
			term.MatchExpressions = append(term.MatchExpressions, corev1.NodeSelectorRequirement{
				Key: k, Operator: corev1.NodeSelectorOpIn, Values: []string{t.Segments[k]},
			})
		}
		if len(term.MatchExpressions) > 0 {
			terms = append(terms, term)
		}
	}
	if terms == nil {
		return nil
	}
	return &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: terms}}
}

// Delete erases the volume of a PersistentVolume.
func (p *provisioner) Delete(ctx context.Context, pv *corev1.PersistentVolume) error {
	if !p.mine(pv) {
		return &controller.IgnoredError{Reason: "the volume is another's"}
	}
	if err := p.scope.Reach(ctx, pv); err != nil {
		return err
	}
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if _, err := p.controller.DeleteVolume(callCtx, &csi.DeleteVolumeRequest{VolumeId: pv.Spec.CSI.VolumeHandle}); err != nil {
		return told(err)
	}
	p.capacity.changed()
	return nil
}
