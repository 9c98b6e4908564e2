package vmdk

import (
	"strconv"
	"strings"
	"time"

	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/openatoll/atoll/storage"
)

// What a volume is, as CNS keeps it: the claim's labels and these on the entity
// of the persistent volume. A claim's label never begins with "atoll.dev/".
const (
	labelPrefix   = "atoll.dev/"
	labelPolicy   = labelPrefix + "policy"          // its name in Kubernetes
	labelMiB      = labelPrefix + "mib"             // the size that makes it whole
	labelSnapshot = labelPrefix + "source-snapshot" // Source.SnapshotID
	labelVolume   = labelPrefix + "source-volume"   // Source.VolumeID
	labelCreated  = labelPrefix + "created"
	labelDeleted  = labelPrefix + "deleted" // it stays for its snapshots alone
	// labelUsed is "false" from the volume's making until anything else is
	// written of it, which precedes every use. Only that says that it is blank.
	labelUsed = labelPrefix + "used"
	// On the entity of the pod that has it.
	labelVM   = labelPrefix + "vm"
	labelHost = labelPrefix + "host"
)

// distribution is what the vSphere client shows as the cluster's kind.
const distribution = "Atoll"

// A volume is one of ours as CNS knows it.
type volume struct {
	id, name   string
	mib, whole int64 // has, and has when it is whole
	policy     string
	policyID   string
	url        string // of the datastore
	source     *storage.Source
	labels     map[string]string
	created    time.Time // as who made it said
	made       time.Time // as vCenter says, where it was asked
	deleted    bool
	unused     bool // it was made blank, and has never been a VM's
	compliance string
	from       origin          // of one that is being made
	holder     *storage.Holder // that said so last; the VM's devices decide
	pods       []pod           // CNS's entities of pods
}

type pod struct{ name, namespace string }

func (v *volume) isWhole() bool { return !v.deleted && v.mib >= v.whole }

// entity is a claim's volume for CNS.
func entity(kind cnstypes.CnsKubernetesEntityType, name, namespace, cluster string, labels map[string]string) *cnstypes.CnsKubernetesEntityMetadata {
	e := &cnstypes.CnsKubernetesEntityMetadata{EntityType: string(kind), Namespace: namespace}
	e.EntityName, e.ClusterID = name, cluster
	for _, k := range sorted(labels) {
		e.Labels = append(e.Labels, types.KeyValue{Key: k, Value: labels[k]})
	}
	return e
}

// pvName is what CNS calls the persistent volume.
func pvName(name string, labels map[string]string) string {
	if pv := labels[storage.LabelPV]; pv != "" {
		return pv
	}
	return name
}

// metadata is what CNS is told of a volume.
func (d *Disks) metadata(v *volume) cnstypes.CnsVolumeMetadata {
	labels := map[string]string{
		labelPolicy: v.policy, labelMiB: strconv.FormatInt(v.whole, 10), labelCreated: v.created.UTC().Format(time.RFC3339Nano),
	}
	for k, value := range v.labels {
		labels[k] = value
	}
	if v.source != nil && v.source.SnapshotID != "" {
		labels[labelSnapshot] = v.source.SnapshotID
	} else if v.source != nil {
		labels[labelVolume] = v.source.VolumeID
	}
	if v.deleted {
		labels[labelDeleted] = "true"
	}
	labels[labelUsed] = strconv.FormatBool(!v.unused)
	pv := pvName(v.name, v.labels)
	entities := []cnstypes.BaseCnsEntityMetadata{entity(cnstypes.CnsKubernetesEntityTypePV, pv, "", d.options.Cluster, labels)}
	if claim := v.labels[storage.LabelPVC]; claim != "" {
		e := entity(cnstypes.CnsKubernetesEntityTypePVC, claim, v.labels[storage.LabelNamespace], d.options.Cluster, shownLabels(v.labels))
		e.ReferredEntity = []cnstypes.CnsKubernetesEntityReference{{EntityType: string(cnstypes.CnsKubernetesEntityTypePV), EntityName: pv, ClusterID: d.options.Cluster}}
		entities = append(entities, e)
	}
	return cnstypes.CnsVolumeMetadata{ContainerCluster: d.cluster(), EntityMetadata: entities, ContainerClusterArray: []cnstypes.CnsContainerCluster{d.cluster()}}
}

// shownLabels are those of the claim's owner.
func shownLabels(all map[string]string) map[string]string {
	out := map[string]string{}
	for k, v := range all {
		switch k {
		case storage.LabelNamespace, storage.LabelPVC, storage.LabelPV:
		default:
			out[k] = v
		}
	}
	return out
}

func (d *Disks) cluster() cnstypes.CnsContainerCluster {
	return cnstypes.CnsContainerCluster{
		ClusterType: string(cnstypes.CnsClusterTypeKubernetes), ClusterId: d.options.Cluster, VSphereUser: d.services.user(),
		ClusterFlavor: string(cnstypes.CnsClusterFlavorVanilla), ClusterDistribution: distribution,
	}
}

// ours reads a volume of CNS's; false if it does not bear our mark.
func (d *Disks) ours(c cnstypes.CnsVolume) (*volume, bool) {
	v := &volume{id: c.VolumeId.Id, name: c.Name, policyID: c.StoragePolicyId, url: c.DatastoreUrl, compliance: c.ComplianceStatus, labels: map[string]string{}}
	if c.Metadata.ContainerCluster.ClusterId != d.options.Cluster || c.VolumeType != string(cnstypes.CnsVolumeTypeBlock) {
		return nil, false
	}
	if b := c.BackingObjectDetails; b != nil {
		v.mib = b.GetCnsBackingObjectDetails().CapacityInMb
	}
	marked := false
	for _, base := range c.Metadata.EntityMetadata {
		e, ok := base.(*cnstypes.CnsKubernetesEntityMetadata)
		if !ok {
			continue
		}
		switch cnstypes.CnsKubernetesEntityType(e.EntityType) {
		case cnstypes.CnsKubernetesEntityTypePV:
			marked = v.read(e.Labels) || marked
		case cnstypes.CnsKubernetesEntityTypePOD:
			v.pods = append(v.pods, pod{e.EntityName, e.Namespace})
			h := &storage.Holder{}
			for _, l := range e.Labels {
				switch l.Key {
				case labelVM:
					h.VM = l.Value
				case labelHost:
					h.Host = l.Value
				}
			}
			v.holder = h
		}
	}
	return v, marked
}

// read takes a persistent volume's labels; false if ours are not among them.
func (v *volume) read(labels []types.KeyValue) (marked bool) {
	for _, l := range labels {
		switch l.Key {
		case labelPolicy:
			v.policy = l.Value
		case labelMiB:
			n, err := strconv.ParseInt(l.Value, 10, 64)
			v.whole, marked = n, err == nil
		case labelCreated:
			v.created, _ = time.Parse(time.RFC3339Nano, l.Value) // unreadable: unknown
		case labelSnapshot:
			v.source = &storage.Source{SnapshotID: l.Value}
		case labelVolume:
			v.source = &storage.Source{VolumeID: l.Value}
		case labelDeleted:
			v.deleted = true
		case labelUsed:
			v.unused = l.Value == "false"
		default:
			if !strings.HasPrefix(l.Key, labelPrefix) {
				v.labels[l.Key] = l.Value
			}
		}
	}
	return marked
}

// shown is a volume as callers see it.
func (v *volume) shown(at storage.Topology, datastore string) storage.Volume {
	out := storage.Volume{
		ID: v.id, Name: v.name, Bytes: v.mib * mib, Policy: v.policy, At: at, Datastore: datastore,
		Format: storage.FormatVMDK, Source: v.source, CreatedAt: v.created,
	}
	if len(v.labels) > 0 {
		out.Labels = v.labels
	}
	return out
}
