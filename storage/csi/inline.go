package csi

import (
	"context"
	"fmt"
	"regexp"
	"slices"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/containerd/errdefs"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/openatoll/atoll/storage"
)

// What the kubelet adds to the context of a volume that a pod's spec has inline.
const (
	contextEphemeral    = "csi.storage.k8s.io/ephemeral"
	contextPodName      = "csi.storage.k8s.io/pod.name"
	contextPodNamespace = "csi.storage.k8s.io/pod.namespace"
	// attributeSize is the attribute of an inline volume that says how large it
	// is, as a quantity.
	attributeSize = "size"
)

// inlineHandle is what the kubelet calls an inline volume: csi- and a SHA-256.
var inlineHandle = regexp.MustCompile(`^csi-[0-9a-f]{64}$`)

// inlineName is the name of its disk: the handle is one character too long.
func inlineName(handle string) string { return "inline-" + handle[len("csi-"):len("csi-")+40] }

// createInline makes the disk of an inline volume, which goes with its pod.
func (d *Driver) createInline(ctx context.Context, req *csi.NodePublishVolumeRequest) (storage.Volume, error) {
	attributes := req.GetVolumeContext()
	if !inlineHandle.MatchString(req.VolumeId) {
		return storage.Volume{}, invalid("volume_id %q is no inline volume's", req.VolumeId)
	}
	parameters := map[string]string{}
	for k, v := range attributes {
		if k != attributeSize {
			parameters[k] = v
		}
	}
	policy, err := d.policyOf(ctx, parameters)
	if errdefs.IsNotFound(err) {
		return storage.Volume{}, invalid("%v", err)
	}
	if err != nil {
		return storage.Volume{}, err
	}
	size, err := resource.ParseQuantity(attributes[attributeSize])
	if err != nil || size.Sign() <= 0 {
		return storage.Volume{}, invalid("volumeAttributes.%s is %q: an inline volume of %s needs a size, such as 1Gi", attributeSize, attributes[attributeSize], Name)
	}
	v, err := d.disks.Create(ctx, storage.Claim{
		Name: inlineName(req.VolumeId), Bytes: size.Value(), Policy: policy, At: []storage.Topology{{Host: d.config.NodeName}},
		Labels: map[string]string{storage.LabelNamespace: attributes[contextPodNamespace], "pod-name": attributes[contextPodName]},
	})
	if err != nil {
		return v, fmt.Errorf("inline volume: %w", createError(err, storage.Claim{}))
	}
	return v, nil
}

// inline finds a volume by its handle, be it an inline one's.
func (d *Driver) inline(ctx context.Context, handle string) (storage.Volume, error) {
	if !inlineHandle.MatchString(handle) {
		return d.get(ctx, handle)
	}
	all, err := d.disks.List(ctx)
	if i := slices.IndexFunc(all, func(v storage.Volume) bool { return v.Name == inlineName(handle) }); i >= 0 {
		return all[i], nil
	}
	if err == nil {
		err = fmt.Errorf("inline volume %s: %w", handle, errdefs.ErrNotFound)
	}
	return storage.Volume{}, err
}

// deleteInline erases the disk of an inline volume; of others nothing.
func (d *Driver) deleteInline(ctx context.Context, handle string) error {
	if !inlineHandle.MatchString(handle) {
		return nil
	}
	v, err := d.inline(ctx, handle)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	return d.disks.Delete(ctx, v.ID)
}
