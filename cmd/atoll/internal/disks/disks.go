package disks

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/storage/csi/controllers"
)

// States of a disk.
const (
	InUse   = "in use"  // a VM has it open
	Free    = "free"    // nobody has
	Orphan  = "orphan"  // no PersistentVolume has it; nothing deletes it by itself
	Damaged = "damaged" // not what it was; it is refused, and nothing touches it
	Unknown = "unknown" // nobody who could say answers
)

// A Disk is one line of the view.
type Disk struct {
	// ID is the volume handle, or of an orphaned file its datastore and name.
	ID        string `json:"id"`
	Policy    string `json:"policy,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	PVC       string `json:"pvc,omitempty"`
	PV        string `json:"pv,omitempty"`
	Pod       string `json:"pod,omitempty"`
	VM        string `json:"vm,omitempty"`
	Datastore string `json:"datastore,omitempty"`
	// Size and Used are bytes, nil if they are not known.
	Size      *int64 `json:"size"`
	Used      *int64 `json:"used"`
	Format    string `json:"format,omitempty"`
	Encrypted bool   `json:"encrypted"`
	// Node has it open, or alone reaches it; empty: several do.
	Node  string `json:"node,omitempty"`
	State string `json:"state"`
	// Reason says why it is in that state, where there is more to say.
	Reason string `json:"reason,omitempty"`
	// Compliance is Compliant, NonCompliant or Unknown, and why.
	Compliance       string `json:"compliance,omitempty"`
	ComplianceReason string `json:"complianceReason,omitempty"`
}

// A Cluster is what the view is made of.
type Cluster struct {
	Volumes []corev1.PersistentVolume
	Claims  []corev1.PersistentVolumeClaim
	Pods    []corev1.Pod
	Nodes   []Node
	// VCenter is what the supervisor has seen in the one that it serves, as that of
	// a node; nil if it serves none, or was not asked.
	VCenter *Node
	// Now is when all of it was read.
	Now time.Time
}

// List returns all disks, sorted by namespace, claim and ID.
func (c Cluster) List() []Disk {
	v := c.index()
	out := []Disk{} // an empty list in JSON, too
	claimed := map[string]bool{}
	for i := range c.Volumes {
		pv := &c.Volumes[i]
		if pv.Spec.CSI == nil || pv.Spec.CSI.Driver != v1alpha1.CSIDriverName {
			continue
		}
		claimed[pv.Spec.CSI.VolumeHandle] = true
		out = append(out, v.ofVolume(pv))
	}
	for id, found := range v.items {
		if !claimed[id] {
			out = append(out, v.unclaimed(found))
		}
	}
	slices.SortFunc(out, func(a, b Disk) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.PVC, b.PVC), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// all who have volumes.
func (c Cluster) all() []Node {
	if c.VCenter == nil {
		return c.Nodes
	}
	return append(slices.Clone(c.Nodes), *c.VCenter)
}

// A found is an item, and a node that has it in a datastore.
type found struct {
	Item
	node   string
	shared bool // several have
}

// An index finds what belongs together.
type index struct {
	Cluster
	items map[string]found
	pods  map[string]*corev1.Pod // by UID
	users map[string]*corev1.Pod // by namespace/claim
}

func (c Cluster) index() index {
	v := index{c, map[string]found{}, map[string]*corev1.Pod{}, map[string]*corev1.Pod{}}
	for _, n := range c.all() {
		for _, i := range n.Items {
			before, there := v.items[i.ID]
			// Of several who see it, one who knows most has the word.
			if !there || before.Damage != "" && i.Damage == "" {
				before = found{Item: i, node: n.Name, shared: there}
			}
			before.shared = there
			v.items[i.ID] = before
		}
	}
	for i := range c.Pods {
		p := &c.Pods[i]
		v.pods[string(p.UID)] = p
		if p.Spec.NodeName == "" || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		for _, volume := range p.Spec.Volumes {
			switch {
			case volume.PersistentVolumeClaim != nil:
				v.users[p.Namespace+"/"+volume.PersistentVolumeClaim.ClaimName] = p
			case volume.Ephemeral != nil:
				v.users[p.Namespace+"/"+p.Name+"-"+volume.Name] = p
			}
		}
	}
	return v
}

// ofVolume is the disk of a PersistentVolume.
func (v index) ofVolume(pv *corev1.PersistentVolume) Disk {
	id := pv.Spec.CSI.VolumeHandle
	attributes := pv.Spec.CSI.VolumeAttributes
	d := Disk{
		ID: id, PV: pv.Name, Policy: attributes[v1alpha1.PolicyParameter], Datastore: attributes["datastore"], Node: hostOf(pv),
		Compliance: pv.Annotations[v1alpha1.AnnotationPolicyCompliance], ComplianceReason: pv.Annotations[v1alpha1.AnnotationPolicyComplianceReason],
	}
	if q, ok := pv.Spec.Capacity[corev1.ResourceStorage]; ok {
		size := q.Value()
		d.Size = &size
	}
	if r := pv.Spec.ClaimRef; r != nil {
		d.Namespace, d.PVC = r.Namespace, r.Name
	}
	v.complies(&d, pv)
	i, there := v.items[id]
	switch {
	case there:
		v.fill(&d, i)
		if d.State == Free && !localID.MatchString(id) {
			v.used(&d, pv)
		}
	case !localID.MatchString(id):
		v.elsewhere(&d, pv)
	default:
		d.State, d.Reason = v.missing(id, d.Node)
	}
	if d.State == Free && pv.Status.Phase == corev1.VolumeReleased {
		d.Reason = "its claim is gone, and its reclaim policy keeps it"
	}
	return d
}

// localID is a volume handle of a node's datastore; others are vSphere's.
var localID = regexp.MustCompile(`^[0-9a-f]{12}\.v-[0-9a-f]{24}$`)

// fill adds what a node knows.
func (v index) fill(d *Disk, i found) {
	if i.Bytes >= 0 {
		d.Size = &i.Bytes
	}
	if i.Used >= 0 {
		d.Used = &i.Used
	}
	d.Policy, d.Datastore = cmp.Or(i.Policy, d.Policy), cmp.Or(i.Datastore, d.Datastore)
	d.Format, d.Encrypted = i.Format, i.Encrypted
	if !i.shared {
		d.Node = i.node
	}
	if i.Compliance != "" {
		d.Compliance, d.ComplianceReason = i.Compliance, i.Reason
	}
	switch {
	case i.Damage != "":
		d.State, d.Reason = Damaged, i.Damage
	case i.Unfinished != "" || i.Silent != "":
		d.State, d.Reason = Unknown, cmp.Or(i.Unfinished, i.Silent)
	case i.VM != "":
		d.State = InUse
	default:
		d.State = Free
	}
	if i.VM == "" {
		return
	}
	d.VM, d.Node = i.VM, i.Host
	if p := v.pods[podUID(i.VM)]; p != nil {
		d.Pod = p.Name
		if d.Namespace == "" {
			d.Namespace = p.Namespace
		}
		return
	}
	if d.State == InUse {
		d.Reason = "its pod is gone: the VM is being ended, or its node is lost"
	}
}

// complies: of a volume of vSphere the claim says whether its policy is kept.
func (v index) complies(d *Disk, pv *corev1.PersistentVolume) {
	if d.Compliance != "" || pv.Spec.ClaimRef == nil {
		return
	}
	for _, c := range v.Claims {
		if c.Namespace == d.Namespace && c.Name == d.PVC && c.UID == pv.Spec.ClaimRef.UID {
			d.Compliance, d.ComplianceReason = c.Annotations[v1alpha1.AnnotationPolicyCompliance], c.Annotations[v1alpha1.AnnotationPolicyComplianceReason]
		}
	}
}

// elsewhere is a volume of vSphere that vCenter has not told of: Kubernetes alone
// says what there is.
func (v index) elsewhere(d *Disk, pv *corev1.PersistentVolume) {
	d.Format, d.State = "vmdk", Free
	v.used(d, pv)
	if v.VCenter == nil || v.Now.Sub(pv.CreationTimestamp.Time) < young {
		return
	}
	if v.VCenter.Err != nil {
		d.State, d.Reason = Unknown, v.VCenter.Err.Error()
		return
	}
	of := pv.Spec.CSI.VolumeAttributes[controllers.VCenterAttribute]
	for _, s := range v.VCenter.Datastores {
		switch {
		case s.Problem != "":
			d.State, d.Reason = Unknown, "vCenter "+s.Name+": "+s.Problem
		case s.ID != of:
			d.State, d.Reason = Unknown, "the vCenter that has it (instance UUID "+of+") is not the one that the Supervisor names, "+s.Name
		default:
			d.State, d.Reason = Unknown, "vCenter "+s.Name+" shows no such volume: it was deleted there, or Atoll may not see it"
		}
	}
}

// used: a pod uses a volume of vSphere, as Kubernetes says.
func (v index) used(d *Disk, pv *corev1.PersistentVolume) {
	if pv.Spec.ClaimRef == nil {
		return
	}
	if p := v.users[d.Namespace+"/"+d.PVC]; p != nil {
		d.State, d.Pod, d.Node = InUse, p.Name, p.Spec.NodeName
		d.VM = p.Annotations[v1alpha1.PodVMUUIDAnnotation]
	}
}

// missing says why no node has told of a volume of a datastore.
func (v index) missing(id, host string) (state, reason string) {
	datastore, _, _ := strings.Cut(id, ".")
	var silent []string
	for _, n := range v.Nodes {
		if host != "" && n.Name != host {
			continue
		}
		if n.Err != nil {
			silent = append(silent, n.Err.Error())
			continue
		}
		for _, s := range n.Datastores {
			if s.ID == datastore && s.Problem != "" {
				return Unknown, s.Problem
			}
			if s.ID == datastore {
				return Damaged, fmt.Sprintf("datastore %s has no such volume", s.Name)
			}
		}
	}
	if len(silent) > 0 {
		return Unknown, silent[0]
	}
	if host != "" {
		return Unknown, "node " + host + " has no such datastore, or is gone"
	}
	return Unknown, "no node has its datastore"
}

// young is for how long a volume may be before its PersistentVolume, or the
// hold of the VM that it is made for.
const young = time.Minute

// unclaimed is what no PersistentVolume has.
func (v index) unclaimed(i found) Disk {
	d := Disk{ID: i.ID, Namespace: i.Namespace, PVC: i.Claim}
	v.fill(&d, i)
	if d.State != Free {
		return d
	}
	uid, ofClaim := strings.CutPrefix(i.Name, "pvc-")
	waits := ofClaim && slices.ContainsFunc(v.Claims, func(c corev1.PersistentVolumeClaim) bool { return string(c.UID) == uid && c.Spec.VolumeName == "" })
	switch {
	case i.File:
		d.State, d.Reason = Orphan, "no record stands for this file"
	case waits || v.Now.Sub(i.Created) < young:
		d.Reason = "its PersistentVolume, or its VM, is about to be there"
	default:
		d.State, d.Reason = Orphan, "no PersistentVolume has it"
	}
	return d
}

// hostOf is the node that alone reaches a volume, empty if several may.
func hostOf(pv *corev1.PersistentVolume) string {
	if pv.Spec.NodeAffinity == nil || pv.Spec.NodeAffinity.Required == nil {
		return ""
	}
	for _, term := range pv.Spec.NodeAffinity.Required.NodeSelectorTerms {
		for _, e := range term.MatchExpressions {
			if e.Key == csi.TopologyHost && len(e.Values) == 1 {
				return e.Values[0]
			}
		}
	}
	return ""
}
