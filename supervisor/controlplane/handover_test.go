package controlplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/csi"
)

// writer is the one VM of a node that can copy its disk.
const writer = "vm-writer"

// vmsOf are a node's VMs, which sign what they copy.
type vmsOf string

func (v vmsOf) signature() []byte { return []byte("copied by " + string(v)) }

func (v vmsOf) CopyDisk(_ context.Context, vm, _ string, to *os.File, _ func(done, total int64)) error {
	if vm != writer {
		return fmt.Errorf("there is no VM %s: %w", vm, errdefs.ErrNotFound)
	}
	_, err := to.WriteAt(v.signature(), 0)
	return errors.Join(err, to.Truncate(16<<20))
}

func (k *snapshotTest) label(t *testing.T, node, key string) {
	t.Helper()
	patch := fmt.Sprintf(`{"metadata":{"labels":{%q:%q}}}`, key, csi.Reachable)
	if _, err := k.admin.CoreV1().Nodes().Patch(t.Context(), node, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

// signedBy looks who has made the disk of a volume or snapshot.
func (k *snapshotTest) signedBy(t *testing.T, handle, node string) {
	t.Helper()
	_, id, _ := strings.Cut(handle, ".")
	found, err := filepath.Glob(filepath.Join(k.shared, "disks", id+"*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("disks of %s: %q, %v", handle, found, err)
	}
	b, err := os.ReadFile(found[0])
	if err != nil || !bytes.HasPrefix(b, vmsOf(node).signature()) {
		t.Errorf("%s begins with %q (err %v), want it copied by %s", handle, b[:min(len(b), 16)], err, node)
	}
}

// inUseElsewhere: n1 is to make snapshot and clone of a volume that n2 alone can copy.
func (k *snapshotTest) inUseElsewhere(t *testing.T) {
	name := "shared"
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: csi.Name, Parameters: map[string]string{csi.ParameterPolicy: name}}
	if _, err := k.admin.StorageV1().StorageClasses().Create(t.Context(), class, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	on := func(node string, and func(*corev1.PersistentVolumeClaim)) func(*corev1.PersistentVolumeClaim) {
		return func(c *corev1.PersistentVolumeClaim) {
			and(c)
			c.Spec.StorageClassName, c.Annotations = &name, map[string]string{selectedNode: node}
		}
	}
	policies, err := k.disks["n1"].Policies(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	key := csi.DatastoreKey(policies[slices.IndexFunc(policies, func(p storage.Policy) bool { return p.Name == name })].Datastores[0])
	k.label(t, "n1", key) // so that upstream gives the content to it
	k.claim(t, "common", on("n2", func(*corev1.PersistentVolumeClaim) {}))
	handle, holder := k.bound(t, "common", csi.Reachable), storage.Holder{VM: writer, Host: "n2"}
	if _, err := k.disks["n2"].Attach(t.Context(), handle, holder, storage.AttachOptions{}); err != nil {
		t.Fatal(err)
	}
	k.nodeReady(t, "n2")
	k.take(t, "elsewhere", "common", "")
	content := k.ready(t, "elsewhere")
	if by := content.Labels[managedBy]; by != "n2" || len(content.Annotations) != 0 || content.Status.Error != nil {
		t.Errorf("kept by %q, annotations %v, status %+v", by, content.Annotations, content.Status)
	}
	k.signedBy(t, *content.Status.SnapshotHandle, "n2")
	k.event(t, "elsewhere", "node n2 takes this snapshot")

	k.label(t, "n2", key)
	k.nodeReady(t, "n2")
	k.claim(t, "clone-of-common", on("n1", from("PersistentVolumeClaim", "common")))
	k.signedBy(t, k.bound(t, "clone-of-common", csi.Reachable), "n2")
	k.event(t, "clone-of-common", "the volume is made on node n2, whose pod writes to PersistentVolumeClaim common")
	eventually(t, "the node's word gone", func() error {
		claim, err := k.admin.CoreV1().PersistentVolumeClaims("default").Get(t.Context(), "clone-of-common", metav1.GetOptions{})
		if err == nil && slices.ContainsFunc(claim.Status.Conditions, func(c corev1.PersistentVolumeClaimCondition) bool { return c.Type == v1alpha1.ClaimRefused }) {
			err = errors.New("it is there")
		}
		return err
	})
	k.claim(t, "of-elsewhere", on("n1", from("VolumeSnapshot", "elsewhere")))
	k.signedBy(t, k.bound(t, "of-elsewhere", csi.Reachable), "n2")
	k.drop(t, "elsewhere")
	k.gone(t, "elsewhere")
	if err := k.disks["n2"].Detach(t.Context(), handle, holder); err != nil {
		t.Fatal(err)
	}
}

// nodeReady says that a node is ready, as its kubelet would again and again.
func (k *snapshotTest) nodeReady(t *testing.T, name string) {
	t.Helper()
	status := []byte(`{"status":{"conditions":[{"type":"Ready","status":"True","reason":"Test","message":""}]}}`)
	if _, err := k.admin.CoreV1().Nodes().PatchStatus(t.Context(), name, status); err != nil {
		t.Fatal(err)
	}
}

// handOverRights: a node gives what is not taken yet to a node, and what is its own.
func (k *snapshotTest) handOverRights(t *testing.T) {
	// A node of which nothing runs; of one that is not there it would be taken.
	if _, err := k.admin.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n3"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	handle, class := "nfs.v-1", "atoll"
	c := &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: "untaken", Labels: map[string]string{managedBy: "n3"}}, Spec: snapshotv1.VolumeSnapshotContentSpec{
		Driver: csi.Name, DeletionPolicy: snapshotv1.VolumeSnapshotContentRetain, VolumeSnapshotClassName: &class,
		Source:            snapshotv1.VolumeSnapshotContentSource{VolumeHandle: &handle},
		VolumeSnapshotRef: corev1.ObjectReference{Namespace: "default", Name: "untaken"},
	}}
	contents := k.kinds.SnapshotV1().VolumeSnapshotContents()
	if _, err := contents.Create(t.Context(), c, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	give := func(node, to string) error {
		contents := kindsFrom(t, k.as("system:node:"+node, "system:nodes", "system:authenticated")).SnapshotV1().VolumeSnapshotContents()
		_, err := contents.Patch(t.Context(), c.Name, types.MergePatchType, []byte(`{"metadata":{"labels":{"`+managedBy+`":"`+to+`"}}}`), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	allowed(t, "to hand over", give("n3", "n1"))
	refused(t, "to take what is another's", give("n1", "n1"), `cared for by node "n3"`, "system:node:n1")
	refused(t, "to give what is another's", give("n1", "n2"), `cared for by node "n3"`)
	refused(t, "to give it to nobody", give("n3", ""), "hands over to another node")
	refused(t, "to give it to a vCenter", give("n3", v1alpha1.ContentOfVCenter+"uuid"), "hands over to another node")
	if err := contents.Delete(t.Context(), c.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}
