package controlplane

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	_ "github.com/vmware/govmomi/cli/disk"
	_ "github.com/vmware/govmomi/cli/volume"
	"github.com/vmware/govmomi/cns"
	cnstypes "github.com/vmware/govmomi/cns/types"
	"github.com/vmware/govmomi/pbm"
	pbmtypes "github.com/vmware/govmomi/pbm/types"
	"github.com/vmware/govmomi/vim25/types"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod/vsphere/vcsim"
)

// TestVolumes makes volumes in vSphere as `atoll up` does: a whole control plane,
// the embedded vCenter over TLS, and stock govc as a process.
func TestVolumes(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane; about 30 s")
	}
	cfg := testConfig(t)
	t.Setenv(noVolumesEnv, "1")
	startServer(t, cfg)
	n := newNamespacesTest(t, cfg)
	v := &volumesTest{namespacesTest: n, home: t.TempDir()}
	v.start(t)
	t.Cleanup(func() { v.kill(t) })
	n.join(t)
	ns := svns("data")
	ns.Spec.StoragePolicies = []v1alpha1.StoragePolicyLimit{{Name: "gold-fast", Limit: quantity("2Gi")}, {Name: "silver"}}
	n.apply(t, ns)
	n.synced(t, "data")
	t.Run("bound", v.binds)
	t.Run("on no KVM node", v.pending)
	t.Run("expanded", v.expands)
	t.Run("clone", v.clones)
	t.Run("snapshots", v.snapshots)
	t.Run("compliance", v.compliance)
	t.Run("bad days", v.badDays)
	t.Run("killed", v.killed)
	t.Run("orphans", v.orphaned)
	t.Run("withdrawn", v.withdrawn)
	t.Run("deleted", v.deleted)
	t.Run("another vCenter", v.another)
}

type volumesTest struct {
	*namespacesTest
	home string
	cmd  *exec.Cmd
}

func newClaim(name, class, size string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "data", Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{"storage": *quantity(size)}},
		},
	}
}

func (v *volumesTest) claim(t *testing.T, name string) *corev1.PersistentVolumeClaim {
	t.Helper()
	c := &corev1.PersistentVolumeClaim{}
	if err := v.admin.Get(t.Context(), client.ObjectKey{Namespace: "data", Name: name}, c); err != nil {
		t.Fatal(err)
	}
	return c
}

// isBound returns a claim's volume once it has one.
func (v *volumesTest) isBound(t *testing.T, name string) *corev1.PersistentVolume {
	t.Helper()
	pv := &corev1.PersistentVolume{}
	eventually(t, "claim "+name+" is bound", func() error {
		c := v.claim(t, name)
		if c.Status.Phase != corev1.ClaimBound {
			return fmt.Errorf("it is %s", c.Status.Phase)
		}
		return v.admin.Get(t.Context(), client.ObjectKey{Name: c.Spec.VolumeName}, pv)
	})
	return pv
}

// tells waits for an event of a claim.
func (v *volumesTest) tells(t *testing.T, name, reason, text string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s has an event %s with %q", name, reason, text), func() error {
		if v.events(t, name, reason, text) == 0 {
			return fmt.Errorf("there is none")
		}
		return nil
	})
}

// govc is govmomi's own command line.
func (v *volumesTest) govc(t *testing.T, args ...string) string {
	t.Helper()
	ca := filepath.Join(v.home, "ca.pem")
	if err := os.WriteFile(ca, v.vc.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = []string{roleEnv + "=" + roleGovc, "HOME=" + v.home, "GOVC_URL=" + v.vc.URL().String(), "GOVC_USERNAME=" + nsUser, "GOVC_PASSWORD=" + nsPassword, "GOVC_TLS_CA_CERTS=" + ca}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("govc %v: %v: %s", args, err, stderr.String())
	}
	return string(out)
}

// volumeListed is what govc volume.ls says of one.
type volumeListed struct {
	VolumeID struct {
		ID string `json:"id"`
	} `json:"volumeId"`
	Name            string `json:"name"`
	StoragePolicyID string `json:"storagePolicyId"`
	Metadata        struct {
		ContainerCluster struct {
			ClusterID string `json:"clusterId"`
		} `json:"containerCluster"`
		EntityMetadata []struct {
			EntityType string `json:"entityType"`
			EntityName string `json:"entityName"`
			Namespace  string `json:"namespace"`
			Labels     []struct {
				Key   string `json:"key"`
				Value string `json:"value"`
			} `json:"labels"`
		} `json:"entityMetadata"`
	} `json:"metadata"`
	BackingObjectDetails struct {
		CapacityInMb int64 `json:"capacityInMb"`
	} `json:"backingObjectDetails"`
}

// listed are all volumes of vCenter, by name: an administrator's own question, by
// a method that Atoll does not use, so that no fault of a test is about it.
func (v *volumesTest) listed(t *testing.T) map[string][]volumeListed {
	t.Helper()
	c, err := cns.NewClient(t.Context(), v.vim.Client)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.QueryAllVolume(t.Context(), cnstypes.CnsQueryFilter{}, cnstypes.CnsQuerySelection{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(res.Volumes)
	if err != nil {
		t.Fatal(err)
	}
	return byName(t, text)
}

// listedByGovc is what govc volume.ls has.
func (v *volumesTest) listedByGovc(t *testing.T) map[string][]volumeListed {
	t.Helper()
	var out struct {
		Volume json.RawMessage `json:"volume"`
	}
	text := v.govc(t, "volume.ls", "-json")
	if err := json.Unmarshal([]byte(text), &out); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return byName(t, out.Volume)
}

func byName(t *testing.T, text []byte) map[string][]volumeListed {
	t.Helper()
	var volumes []volumeListed
	if err := json.Unmarshal(text, &volumes); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	all := map[string][]volumeListed{}
	for _, l := range volumes {
		all[l.Name] = append(all[l.Name], l)
	}
	return all
}

// shows is what the entity of a claim is called, and its labels.
func (l volumeListed) shows(kind string) string {
	for _, e := range l.Metadata.EntityMetadata {
		if e.EntityType == kind {
			var labels []string
			for _, x := range e.Labels {
				labels = append(labels, x.Key+"="+x.Value)
			}
			return fmt.Sprint(e.Namespace, "/", e.EntityName, " ", labels)
		}
	}
	return ""
}

// binds: a claim has a disk with its policy, which govc shows as the claim's.
func (v *volumesTest) binds(t *testing.T) {
	v.apply(t, newClaim("db", "gold-fast", "64Mi"))
	pv := v.isBound(t, "db")
	uuid := v.vim.ServiceContent.About.InstanceUuid
	if a := pv.Spec.CSI.VolumeAttributes; a["vcenter"] != uuid {
		t.Errorf("attributes %v", a)
	}
	terms := pv.Spec.NodeAffinity.Required.NodeSelectorTerms
	if len(terms) == 0 || slices.ContainsFunc(terms, func(term corev1.NodeSelectorTerm) bool {
		return !slices.ContainsFunc(term.MatchExpressions, func(e corev1.NodeSelectorRequirement) bool {
			return e.Key == "topology.atoll.dev/vcenter" && e.Values[0] == uuid
		})
	}) {
		t.Errorf("affinity %v", terms)
	}
	policy := &v1alpha1.StoragePolicy{}
	if err := v.admin.Get(t.Context(), client.ObjectKey{Name: "gold-fast"}, policy); err != nil {
		t.Fatal(err)
	}
	one := v.listedByGovc(t)[pv.Name]
	if len(one) != 1 || one[0].VolumeID.ID != pv.Spec.CSI.VolumeHandle || one[0].StoragePolicyID != policy.Spec.ID ||
		one[0].BackingObjectDetails.CapacityInMb != 64 || one[0].Metadata.ContainerCluster.ClusterID == "" {
		t.Errorf("volume.ls has %+v", one)
	}
	if disks := v.govc(t, "disk.ls", "-l"); !strings.Contains(disks, pv.Spec.CSI.VolumeHandle) || !strings.Contains(disks, pv.Name) {
		t.Errorf("disk.ls has no disk of the claim:\n%s", disks)
	}
	v.shown(t, pv.Name, "PERSISTENT_VOLUME_CLAIM", "data/db [app=db]")
	edit(t, v.namespacesTest, v.claim(t, "db"), func(c *corev1.PersistentVolumeClaim) { c.Labels["tier"] = "one" })
	v.shown(t, pv.Name, "PERSISTENT_VOLUME_CLAIM", "data/db [app=db tier=one]")
	if l := v.listedByGovc(t)[pv.Name]; len(l) != 1 || l[0].shows("PERSISTENT_VOLUME_CLAIM") != "data/db [app=db tier=one]" {
		t.Errorf("volume.ls has %+v", l)
	}
	v.complies(t, "db", "Compliant")

	// Kubernetes' own quota counts.
	quota := &corev1.ResourceQuota{}
	eventually(t, "the quota counts it", func() error {
		if err := v.admin.Get(t.Context(), client.ObjectKey{Namespace: "data", Name: "data-storagequota"}, quota); err != nil {
			return err
		}
		if used := quota.Status.Used["gold-fast.storageclass.storage.k8s.io/requests.storage"]; used.Cmp(*quantity("64Mi")) != 0 {
			return fmt.Errorf("used %v", quota.Status.Used)
		}
		return nil
	})
	if err := v.admin.Create(t.Context(), newClaim("large", "gold-fast", "2Gi")); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "exceeded quota") {
		t.Errorf("a claim above the quota: %v", err)
	}
}

// shown waits for what vSphere says of an entity.
func (v *volumesTest) shown(t *testing.T, volume, kind, want string) {
	t.Helper()
	eventually(t, "vSphere shows "+want, func() error {
		l := v.listed(t)[volume]
		if len(l) != 1 || l[0].shows(kind) != want {
			return fmt.Errorf("volume.ls has %+v", l)
		}
		return nil
	})
}

func (v *volumesTest) complies(t *testing.T, name, want string) {
	t.Helper()
	eventually(t, "claim "+name+" is "+want, func() error {
		if got := v.claim(t, name).Annotations[v1alpha1.AnnotationPolicyCompliance]; got != want {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// pending: a KVM node does not take a pod with such a volume, not even one that
// is called as a host of vCenter is.
func (v *volumesTest) pending(t *testing.T) {
	v.tells(t, "db", "NoNodeReachesVolume", "no node of the cluster is an ESXi host")
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "east-1", Labels: map[string]string{"topology.atoll.dev/host": "east-1", "topology.kubernetes.io/zone": "zone-a"}}}
	v.apply(t, node)
	t.Cleanup(func() { _ = v.admin.Delete(t.Context(), node) })
	applied := node.DeepCopy() // the controllers write it, too
	node.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	node.Status.Allocatable = corev1.ResourceList{"cpu": *quantity("4"), "memory": *quantity("8Gi"), "pods": *quantity("10")}
	if err := v.admin.Status().Patch(t.Context(), node, client.MergeFrom(applied)); err != nil {
		t.Fatal(err)
	}
	pod := plainPod("", "")
	pod.Namespace, pod.Name = "data", "db"
	pod.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}}
	pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "db"}}}}
	v.apply(t, pod)
	eventually(t, "the scheduler says why", func() error {
		if err := v.admin.Get(t.Context(), client.ObjectKeyFromObject(pod), pod); err != nil {
			return err
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodScheduled && strings.Contains(c.Message, "PersistentVolume's node affinity") {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v", pod.Status.Conditions)
	})
	if err := v.admin.Delete(t.Context(), pod); err != nil {
		t.Fatal(err)
	}
}

func (v *volumesTest) expands(t *testing.T) {
	edit(t, v.namespacesTest, v.claim(t, "db"), func(c *corev1.PersistentVolumeClaim) { c.Spec.Resources.Requests["storage"] = *quantity("128Mi") })
	v.hasSize(t, "db", 128)
	edit(t, v.namespacesTest, v.claim(t, "db"), func(c *corev1.PersistentVolumeClaim) { c.Spec.Resources.Requests["storage"] = *quantity("1Gi") })
	v.hasSize(t, "db", 1024)
}

func (v *volumesTest) hasSize(t *testing.T, name string, mib int64) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s has %d MiB on both sides", name, mib), func() error {
		pv := v.isBound(t, name)
		l := v.listed(t)[pv.Name]
		if size := pv.Spec.Capacity["storage"]; size.Value() != mib<<20 || len(l) != 1 || l[0].BackingObjectDetails.CapacityInMb != mib {
			return fmt.Errorf("%s, %+v", size.String(), l)
		}
		return nil
	})
}

// clones: a claim may begin as another one's volume.
func (v *volumesTest) clones(t *testing.T) {
	v.apply(t, newClaim("source", "silver", "16Mi"))
	v.isBound(t, "source")
	c := newClaim("clone", "silver", "32Mi")
	c.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: "PersistentVolumeClaim", Name: "source"}
	v.apply(t, c)
	v.hasSize(t, "clone", 32)
}

// compliance: a policy that moves away from a volume, and back.
func (v *volumesTest) compliance(t *testing.T) {
	edit(t, v.namespacesTest, &v1alpha1.Supervisor{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName}}, func(s *v1alpha1.Supervisor) { s.Spec.PolicyPollSeconds = 10 })
	v.complies(t, "db", "Compliant")
	c, err := pbm.NewClient(t.Context(), v.vim.Client)
	if err != nil {
		t.Fatal(err)
	}
	policy := &v1alpha1.StoragePolicy{}
	if err := v.admin.Get(t.Context(), client.ObjectKey{Name: "gold-fast"}, policy); err != nil {
		t.Fatal(err)
	}
	rules := func(capabilities ...pbmtypes.PbmCapabilityInstance) {
		t.Helper()
		if err := c.UpdateProfile(t.Context(), pbmtypes.PbmProfileId{UniqueId: policy.Spec.ID}, pbmtypes.PbmCapabilityProfileUpdateSpec{
			Constraints: &pbmtypes.PbmCapabilitySubProfileConstraints{SubProfiles: []pbmtypes.PbmCapabilitySubProfile{{Name: "sp", Capability: capabilities}}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	rules(pbmtypes.PbmCapabilityInstance{
		Id: pbmtypes.PbmCapabilityMetadataUniqueId{Namespace: "http://www.vmware.com/storage/tag", Id: "tier"},
		Constraint: []pbmtypes.PbmCapabilityConstraintInstance{{PropertyInstance: []pbmtypes.PbmCapabilityPropertyInstance{{
			Id: "com.vmware.storage.tag.tier.property", Value: pbmtypes.PbmCapabilityDiscreteSet{Values: []types.AnyType{"nvme"}},
		}}}},
	})
	v.complies(t, "db", "NonCompliant")
	v.tells(t, "db", "PolicyNotCompliant", "no longer offers what storage policy gold-fast asks for")
	rules()
	v.complies(t, "db", "Compliant")
	v.tells(t, "db", "PolicyCompliant", "kept again")
	if got := v.claim(t, "source").Annotations[v1alpha1.AnnotationPolicyCompliance]; got != "Compliant" {
		t.Errorf("a volume of another policy is %q", got)
	}
}

// withdrawn: new claims are refused, old ones stay.
func (v *volumesTest) withdrawn(t *testing.T) {
	edit(t, v.namespacesTest, svns("data"), func(ns *v1alpha1.SupervisorNamespace) { ns.Spec.StoragePolicies = ns.Spec.StoragePolicies[1:] })
	v.synced(t, "data")
	eventually(t, "a new claim is refused", func() error {
		err := v.admin.Create(t.Context(), newClaim("late", "gold-fast", "1Mi"), client.DryRunAll)
		if !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) {
			return fmt.Errorf("it is not: %v", err)
		}
		return nil
	})
	if err := v.admin.Get(t.Context(), client.ObjectKey{Name: "gold-fast"}, &storagev1.StorageClass{}); err != nil {
		t.Error(err)
	}
	edit(t, v.namespacesTest, v.claim(t, "db"), func(c *corev1.PersistentVolumeClaim) { c.Labels["tier"] = "two" })
	v.shown(t, v.isBound(t, "db").Name, "PERSISTENT_VOLUME_CLAIM", "data/db [app=db tier=two]")
}

// deleted: no volume is left in vCenter, nor a PersistentVolume.
func (v *volumesTest) deleted(t *testing.T) {
	if err := v.admin.DeleteAllOf(t.Context(), &corev1.PersistentVolumeClaim{}, client.InNamespace("data")); err != nil {
		t.Fatal(err)
	}
	v.empty(t)
	if disks := v.govc(t, "disk.ls") + v.govc(t, "volume.ls"); disks != "" {
		t.Errorf("disk.ls still has\n%s", disks)
	}
}

func (v *volumesTest) empty(t *testing.T) {
	t.Helper()
	eventually(t, "all volumes are gone", func() error {
		pvs := &corev1.PersistentVolumeList{}
		if err := v.admin.List(t.Context(), pvs); err != nil {
			return err
		}
		if l := v.listed(t); len(l) != 0 || len(pvs.Items) != 0 {
			return fmt.Errorf("%d PersistentVolumes, %d volumes in vCenter", len(pvs.Items), len(l))
		}
		return nil
	})
}

// another vCenter does not know the first one's volumes: nothing is taken for
// deleted because of that.
func (v *volumesTest) another(t *testing.T) {
	v.apply(t, newClaim("kept", "silver", "1Mi"))
	pv := v.isBound(t, "kept")
	v.take(t, "kept", "kept", "")
	snapshot, _ := v.isReady(t, "kept")
	first, vim := v.vc, v.vim
	dir := v.dir
	v.dir = t.TempDir()
	v.startVCenter(t, vcsim.Config{})
	second := v.vc
	t.Cleanup(func() {
		if err := second.Close(); err != nil {
			t.Error(err)
		}
	})
	point := func(at *vcsim.Server) {
		edit(t, v.namespacesTest, &v1alpha1.Supervisor{ObjectMeta: metav1.ObjectMeta{Name: v1alpha1.SupervisorName}}, func(s *v1alpha1.Supervisor) {
			s.Spec.VCenter = v1alpha1.VCenter{Server: at.URL().Host, Thumbprint: at.Thumbprint(), CredentialsSecret: s.Spec.VCenter.CredentialsSecret}
		})
	}
	point(second)
	if err := v.admin.Delete(t.Context(), v.claim(t, "kept")); err != nil {
		t.Fatal(err)
	}
	v.drop(t, snapshot)
	v.tells(t, pv.Name, "VolumeFailedDelete", "nothing is done about it")
	v.tells(t, "kept", "SnapshotElsewhere", "nothing is done about it")
	v.vc, v.vim, v.dir = first, vim, dir
	if l := v.listed(t); len(l) != 1 || len(v.inVCenter(t, pv.Spec.CSI.VolumeHandle)) != 1 {
		t.Errorf("the first vCenter has %v", l)
	}
	point(first)
	v.left(t, snapshot)
	v.empty(t)
}
