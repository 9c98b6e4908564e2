package vmdk

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/containerd/errdefs"
	cnstypes "github.com/vmware/govmomi/cns/types"

	"github.com/openatoll/atoll/storage"
)

// Relabel makes a volume's labels those given, where vSphere shows them: claim
// and PersistentVolume by the storage.Label… keys, the rest on both. It is for
// volumes that somebody has been given: it ends any proof that one is blank.
func (d *Disks) Relabel(ctx context.Context, id string, labels map[string]string) error {
	for k := range labels {
		if strings.HasPrefix(k, labelPrefix) {
			return fmt.Errorf("volume %s: the label %s is Atoll's own: %w", id, k, errdefs.ErrInvalidArgument)
		}
	}
	release, err := d.hold(ctx, id)
	if err != nil {
		return err
	}
	defer release()
	v, err := d.whole(ctx, id)
	if err != nil || maps.Equal(v.labels, labels) {
		return err
	}
	before := *v
	v.labels, v.unused = labels, false
	var entities []cnstypes.BaseCnsEntityMetadata
	gone := func(kind cnstypes.CnsKubernetesEntityType, name, namespace string) {
		e := entity(kind, name, namespace, d.options.Cluster, nil)
		e.Delete = true
		entities = append(entities, e)
	}
	if claim, ns := before.labels[storage.LabelPVC], before.labels[storage.LabelNamespace]; claim != "" && (claim != labels[storage.LabelPVC] || ns != labels[storage.LabelNamespace]) {
		gone(cnstypes.CnsKubernetesEntityTypePVC, claim, ns)
	}
	if pv := pvName(before.name, before.labels); pv != pvName(v.name, labels) {
		gone(cnstypes.CnsKubernetesEntityTypePV, pv, "")
	}
	return d.update(ctx, v, append(entities, d.metadata(v).EntityMetadata...))
}

// VCenter is the instance UUID of the vCenter, by which its volumes are told
// from those of another.
func (d *Disks) VCenter(ctx context.Context) (string, error) {
	if err := d.session.Login(ctx); err != nil {
		return "", wrap("sign in at vCenter "+d.session.Address(), err)
	}
	return d.session.About().InstanceUuid, nil
}
