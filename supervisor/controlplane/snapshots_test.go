package controlplane

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	snapshotclient "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/storage/csi/controllers"
	"github.com/openatoll/atoll/storage/local"
)

const (
	managedBy    = "snapshot.storage.kubernetes.io/managed-by"
	selectedNode = "volume.kubernetes.io/selected-node"
)

// TestSnapshots has a real control plane and the storage of two nodes, each with
// the rights of its own; only VMs there are none.
func TestSnapshots(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a control plane; about 15 s")
	}
	cfg := testConfig(t)
	s := startServer(t, cfg)
	config := restFrom(t, cfg.Kubeconfig())
	k := &snapshotTest{admin: clientFrom(t, config), config: config, kinds: kindsFrom(t, config), stores: map[string]string{}, small: map[string]string{}, disks: map[string]storage.Disks{}, shared: smallStore(t, t.TempDir())}
	for _, name := range []string{"n1", "n2"} {
		k.node(t, name)
	}
	k.claim(t, "data", func(c *corev1.PersistentVolumeClaim) { c.Annotations = map[string]string{selectedNode: "n1"} })
	k.bound(t, "data", "n1")
	t.Run("restored where the snapshot is", k.restored)
	t.Run("scheduled where the snapshot is", k.scheduled)
	t.Run("bound at once", k.boundAtOnce)
	t.Run("scheduled again", k.scheduledAgain)
	t.Run("in use", k.inUse)
	t.Run("in use on another node", k.inUseElsewhere)
	t.Run("bad input", k.badInput)
	t.Run("kept and brought back", k.preProvisioned)
	t.Run("what a node may", k.nodesRights)
	t.Run("what a node may hand over", k.handOverRights)
	t.Run("what users may", k.usersRights)
	s.stop(t)
}

type snapshotTest struct {
	admin  *kubernetes.Clientset
	config *rest.Config
	kinds  *snapshotclient.Clientset
	stores map[string]string // directories of the nodes' datastores
	small  map[string]string // those of a few MiB
	disks  map[string]storage.Disks
	shared string // the directory of the datastore that both nodes have
}

func kindsFrom(t *testing.T, c *rest.Config) *snapshotclient.Clientset {
	t.Helper()
	kinds, err := snapshotclient.NewForConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	return kinds
}

func (k *snapshotTest) as(user string, groups ...string) *rest.Config {
	c := rest.CopyConfig(k.config)
	c.Impersonate = rest.ImpersonationConfig{UserName: user, Groups: groups}
	return c
}

// noGuest stands in for pods' VMs.
type noGuest struct{}

func (noGuest) VolumeUsage(context.Context, string, string) (storage.Usage, error) {
	return storage.Usage{}, errors.New("there are no VMs")
}

func (noGuest) ExpandVolume(context.Context, string, string, int64) error {
	return errors.New("there are no VMs")
}

// node runs a node's driver and its controllers.
func (k *snapshotTest) node(t *testing.T, name string) {
	t.Helper()
	(&policyTest{admin: k.admin}).node(t, name, map[string]string{csi.TopologyHost: name})
	dir, err := os.MkdirTemp("", "atoll-snap") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	store, socket := filepath.Join(dir, "store"), filepath.Join(dir, "csi.sock")
	if err := os.Mkdir(store, 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	small := smallStore(t, dir)
	disks, err := local.OpenDisks(ctx, local.DisksConfig{Host: name, StateDir: filepath.Join(dir, "state"), Live: vmsOf(name), Datastores: []local.Datastore{
		{Name: "store", Path: store, Policies: []local.DatastorePolicy{{Policy: storage.Policy{Name: "atoll-local"}}}},
		{Name: "small", Path: small, Policies: []local.DatastorePolicy{{Policy: storage.Policy{Name: "small"}}}},
		{Name: "shared", Path: k.shared, Shared: true, Policies: []local.DatastorePolicy{{Policy: storage.Policy{Name: "shared"}}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	driver, err := csi.New(csi.Config{Disks: disks, NodeName: name, Guest: noGuest{}, Version: "test"})
	if err != nil {
		t.Fatal(err)
	}
	l, err := csi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	served, controlled := make(chan error, 1), make(chan error, 1)
	go func() { served <- driver.Serve(ctx, l) }()
	go func() {
		controlled <- controllers.Run(ctx, controllers.Config{Client: k.as("system:node:"+name, "system:nodes", "system:authenticated"), Socket: socket, NodeName: name, Namespace: metav1.NamespaceSystem})
	}()
	t.Cleanup(func() {
		cancel()
		<-served
		if err := <-controlled; err != nil {
			t.Errorf("controllers of %s: %v", name, err)
		}
	})
	k.stores[name], k.small[name], k.disks[name] = store, small, disks
}

func (k *snapshotTest) claim(t *testing.T, name string, change func(*corev1.PersistentVolumeClaim)) {
	t.Helper()
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeClaimSpec{
		AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("16Mi")}},
	}}
	change(c)
	if _, err := k.admin.CoreV1().PersistentVolumeClaims("default").Create(t.Context(), c, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func from(kind, name string) func(*corev1.PersistentVolumeClaim) {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.DataSource = &corev1.TypedLocalObjectReference{Kind: kind, Name: name}
		if group := snapshotv1.GroupName; kind == "VolumeSnapshot" {
			c.Spec.DataSource.APIGroup = &group
		}
	}
}

// bound waits for a claim's volume, which has to be on a node, and returns its
// handle.
func (k *snapshotTest) bound(t *testing.T, name, node string) (handle string) {
	t.Helper()
	eventually(t, "claim "+name+" bound", func() error {
		c, err := k.admin.CoreV1().PersistentVolumeClaims("default").Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && c.Status.Phase != corev1.ClaimBound {
			err = fmt.Errorf("phase %s, annotations %v", c.Status.Phase, c.Annotations)
		}
		if err != nil {
			return err
		}
		pv, err := k.admin.CoreV1().PersistentVolumes().Get(t.Context(), c.Spec.VolumeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if at := pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0]; at != node {
			t.Fatalf("claim %s is on %s, want %s", name, at, node)
		}
		handle = pv.Spec.CSI.VolumeHandle
		return nil
	})
	return handle
}

func (k *snapshotTest) take(t *testing.T, name, claim, class string) {
	t.Helper()
	s := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{PersistentVolumeClaimName: &claim}}}
	if class != "" {
		s.Spec.VolumeSnapshotClassName = &class
	}
	if _, err := k.kinds.SnapshotV1().VolumeSnapshots("default").Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// ready waits for a snapshot and returns its content.
func (k *snapshotTest) ready(t *testing.T, name string) (content *snapshotv1.VolumeSnapshotContent) {
	t.Helper()
	eventually(t, "snapshot "+name, func() error {
		s, err := k.kinds.SnapshotV1().VolumeSnapshots("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s.Status == nil || s.Status.ReadyToUse == nil || !*s.Status.ReadyToUse {
			return fmt.Errorf("status %+v", s.Status)
		}
		content, err = k.kinds.SnapshotV1().VolumeSnapshotContents().Get(t.Context(), *s.Status.BoundVolumeSnapshotContentName, metav1.GetOptions{})
		return err
	})
	return content
}

// told waits for words in a snapshot's error.
func (k *snapshotTest) told(t *testing.T, name, words string) {
	t.Helper()
	eventually(t, "error of "+name, func() error {
		s, err := k.kinds.SnapshotV1().VolumeSnapshots("default").Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && (s.Status == nil || s.Status.Error == nil || !strings.Contains(*s.Status.Error.Message, words)) {
			err = fmt.Errorf("status %+v, want %q in it", s.Status, words)
		}
		return err
	})
}

// event waits for words in an event of a claim or snapshot.
func (k *snapshotTest) event(t *testing.T, name, words string) {
	t.Helper()
	eventually(t, "event of "+name, func() error {
		all, err := k.admin.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + name})
		if err != nil {
			return err
		}
		var said []string
		for _, e := range all.Items {
			if strings.Contains(e.Message, words) {
				return nil
			}
			said = append(said, e.Message)
		}
		return fmt.Errorf("events %q, want %q in one", said, words)
	})
}

func (k *snapshotTest) drop(t *testing.T, snapshot string) {
	t.Helper()
	if err := k.kinds.SnapshotV1().VolumeSnapshots("default").Delete(t.Context(), snapshot, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (k *snapshotTest) gone(t *testing.T, snapshot string) {
	t.Helper()
	eventually(t, snapshot+" gone", func() error {
		s, err := k.kinds.SnapshotV1().VolumeSnapshots("default").Get(t.Context(), snapshot, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("finalizers %v (err %v)", s.GetFinalizers(), err)
	})
}

// files of a handle in all datastores.
func (k *snapshotTest) files(t *testing.T, handle string) (n int) {
	t.Helper()
	_, id, _ := strings.Cut(handle, ".")
	for _, dir := range k.stores {
		found, err := filepath.Glob(filepath.Join(dir, "*", id+"*"))
		if err != nil {
			t.Fatal(err)
		}
		n += len(found)
	}
	return n
}

func (k *snapshotTest) restored(t *testing.T) {
	k.take(t, "snap", "data", "")
	content := k.ready(t, "snap")
	if content.Labels[managedBy] != "n1" || content.Spec.DeletionPolicy != snapshotv1.VolumeSnapshotContentDelete || k.files(t, *content.Status.SnapshotHandle) == 0 {
		t.Errorf("content %+v, %d files", content, k.files(t, *content.Status.SnapshotHandle))
	}
	k.claim(t, "restored", from("VolumeSnapshot", "snap"))
	k.bound(t, "restored", "n1")
	k.claim(t, "misled", func(c *corev1.PersistentVolumeClaim) {
		from("VolumeSnapshot", "snap")(c)
		c.Annotations = map[string]string{selectedNode: "n2"} // as the scheduler might
	})
	k.bound(t, "misled", "n1")
	k.claim(t, "clone", from("PersistentVolumeClaim", "data"))
	k.bound(t, "clone", "n1")

	k.claim(t, "small", func(c *corev1.PersistentVolumeClaim) {
		from("VolumeSnapshot", "snap")(c)
		c.Spec.Resources.Requests[corev1.ResourceStorage] = resource.MustParse("8Mi")
	})
	k.event(t, "small", "8Mi is less than the 16Mi of VolumeSnapshot snap")
	k.drop(t, "snap")
	k.event(t, "snap", "being used to restore a PVC")
	if k.files(t, *content.Status.SnapshotHandle) == 0 {
		t.Error("the snapshot went while a claim of it was to be made")
	}
	if err := k.admin.CoreV1().PersistentVolumeClaims("default").Delete(t.Context(), "small", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	k.gone(t, "snap")
	if n := k.files(t, *content.Status.SnapshotHandle); n != 0 {
		t.Errorf("%d files of the snapshot are left", n)
	}
}

// scheduled: pods go where the claims are that begin as something, although the
// scheduler may have had other plans for them. It would be right by chance in one
// case of 64.
func (k *snapshotTest) scheduled(t *testing.T) {
	k.take(t, "early", "data", "")
	for i := range 6 {
		name, source := fmt.Sprint("pod", i), from("VolumeSnapshot", "early") // which need not be ready yet
		if i%2 == 1 {
			source = from("PersistentVolumeClaim", "data")
		}
		pod := plainPod("", "")
		pod.Name, pod.GenerateName = name, ""
		pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}}}
		k.claim(t, name, source)
		if _, err := k.admin.CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 6 {
		name := fmt.Sprint("pod", i)
		k.bound(t, name, "n1")
		eventually(t, name+" scheduled", func() error {
			pod, err := k.admin.CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
			if err == nil && pod.Spec.NodeName != "n1" {
				err = fmt.Errorf("on %q, want n1: %+v", pod.Spec.NodeName, pod.Status.Conditions)
			}
			return err
		})
	}
	k.drop(t, "early")
	k.gone(t, "early")
}

// boundAtOnce: claims of a class that waits for no pod get a node that has room.
func (k *snapshotTest) boundAtOnce(t *testing.T) {
	const host = "n2"
	class := func(name, policy string) func(*corev1.PersistentVolumeClaim) {
		c := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: csi.Name, Parameters: map[string]string{csi.ParameterPolicy: policy},
			AllowedTopologies: []corev1.TopologySelectorTerm{{MatchLabelExpressions: []corev1.TopologySelectorLabelRequirement{{Key: csi.TopologyHost, Values: []string{host}}}}}}
		if _, err := k.admin.StorageV1().StorageClasses().Create(t.Context(), c, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		return func(c *corev1.PersistentVolumeClaim) { c.Spec.StorageClassName = &name }
	}
	now := class("now", "atoll-local")
	k.claim(t, "now", now)
	k.bound(t, "now", host)
	k.event(t, "now", "the volume is made on node n2")
	k.claim(t, "huge", func(c *corev1.PersistentVolumeClaim) {
		now(c)
		c.Spec.Resources.Requests[corev1.ResourceStorage] = resource.MustParse("1Pi")
	})
	k.event(t, "huge", "has room for 1Pi of policy atoll-local: the most is ")
	k.claim(t, "platinum", class("platinum", "platinum"))
	k.event(t, "platinum", "offers policy platinum")
}

// inUse: where blocks cannot be shared, a snapshot waits for the volume.
func (k *snapshotTest) inUse(t *testing.T) {
	handle, holder := k.bound(t, "data", "n1"), storage.Holder{VM: "vm-1", Host: "n1"}
	if _, err := k.disks["n1"].Attach(t.Context(), handle, holder, storage.AttachOptions{}); err != nil {
		t.Fatal(err)
	}
	// What the store itself says decides what is to be seen.
	_, shares := k.disks["n1"].Snapshot(t.Context(), handle, "probe", nil)
	k.take(t, "busy", "data", "atoll")
	if shares != nil {
		k.told(t, "busy", "detach the volume first")
	}
	if err := k.disks["n1"].Detach(t.Context(), handle, holder); err != nil {
		t.Fatal(err)
	}
	k.ready(t, "busy")
	k.drop(t, "busy")
	k.gone(t, "busy")
}

func (k *snapshotTest) badInput(t *testing.T) {
	k.take(t, "unknown", "data", "missing")
	k.told(t, "unknown", `"missing" not found`)
	k.take(t, "nothing", "missing", "")
	k.told(t, "nothing", "PVC missing")
	for _, name := range []string{"unknown", "nothing"} {
		k.drop(t, name)
		k.gone(t, name)
	}
	both := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Name: "both"}}
	_, err := k.kinds.SnapshotV1().VolumeSnapshots("default").Create(t.Context(), both, metav1.CreateOptions{})
	refused(t, "a snapshot of nothing", err, "spec.source")
}

// preProvisioned: what a Retain class leaves is found again by its handle, and
// the node that has it is too.
func (k *snapshotTest) preProvisioned(t *testing.T) {
	retain := &snapshotv1.VolumeSnapshotClass{ObjectMeta: metav1.ObjectMeta{Name: "retain"}, Driver: "csi.atoll.dev", DeletionPolicy: snapshotv1.VolumeSnapshotContentRetain}
	if _, err := k.kinds.SnapshotV1().VolumeSnapshotClasses().Create(t.Context(), retain, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	k.take(t, "kept", "data", "retain")
	content := k.ready(t, "kept")
	handle := *content.Status.SnapshotHandle
	k.drop(t, "kept")
	k.gone(t, "kept")
	if err := k.kinds.SnapshotV1().VolumeSnapshotContents().Delete(t.Context(), content.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "content gone", func() error {
		_, err := k.kinds.SnapshotV1().VolumeSnapshotContents().Get(t.Context(), content.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("it is there (err %v)", err)
	})
	if k.files(t, handle) == 0 {
		t.Fatal("a snapshot that was to be kept is gone")
	}

	back := &snapshotv1.VolumeSnapshotContent{ObjectMeta: metav1.ObjectMeta{Name: "back"}, Spec: snapshotv1.VolumeSnapshotContentSpec{
		Driver: "csi.atoll.dev", DeletionPolicy: snapshotv1.VolumeSnapshotContentDelete,
		Source:            snapshotv1.VolumeSnapshotContentSource{SnapshotHandle: &handle},
		VolumeSnapshotRef: corev1.ObjectReference{Namespace: "default", Name: "back"},
	}}
	if _, err := k.kinds.SnapshotV1().VolumeSnapshotContents().Create(t.Context(), back, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s := &snapshotv1.VolumeSnapshot{ObjectMeta: metav1.ObjectMeta{Name: "back"}, Spec: snapshotv1.VolumeSnapshotSpec{Source: snapshotv1.VolumeSnapshotSource{VolumeSnapshotContentName: &back.Name}}}
	if _, err := k.kinds.SnapshotV1().VolumeSnapshots("default").Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := k.ready(t, "back"); got.Labels[managedBy] != "n1" {
		t.Errorf("labels %v: want the node that has the snapshot", got.Labels)
	}
	k.claim(t, "of-back", from("VolumeSnapshot", "back"))
	k.bound(t, "of-back", "n1")
	k.drop(t, "back")
	k.gone(t, "back")
	if n := k.files(t, handle); n != 0 {
		t.Errorf("%d files of the snapshot are left", n)
	}
}

// nodesRights: a node changes the status of its own contents, and nothing else.
func (k *snapshotTest) nodesRights(t *testing.T) {
	k.take(t, "owned", "data", "")
	name := k.ready(t, "owned").Name
	patch := func(node, what string, sub ...string) error {
		contents := kindsFrom(t, k.as("system:node:"+node, "system:nodes", "system:authenticated")).SnapshotV1().VolumeSnapshotContents()
		_, err := contents.Patch(t.Context(), name, types.MergePatchType, []byte(what), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}}, sub...)
		return err
	}
	allowed(t, "its own status", patch("n1", `{"status":{"restoreSize":5}}`, "status"))
	refused(t, "another's status", patch("n2", `{"status":{"restoreSize":5}}`, "status"), `cared for by node "n1"`, "system:node:n2")
	refused(t, "to take what is another's", patch("n2", `{"metadata":{"labels":{"`+managedBy+`":"n2"}}}`), `cared for by node "n1"`)
	refused(t, "to give away what is taken", patch("n1", `{"metadata":{"labels":{"`+managedBy+`":"n2"}}}`), `node "n1" hands over to another node, not to "n2", what is not taken yet`)
	refused(t, "another policy", patch("n1", `{"spec":{"deletionPolicy":"Retain"}}`), "not which one it is")
	refused(t, "a group", patch("n1", `{"status":{"volumeGroupSnapshotHandle":"g"}}`, "status"), "no groups of snapshots")
}

func (k *snapshotTest) usersRights(t *testing.T) {
	for _, tt := range []struct {
		role string
		verb string
		want bool
	}{{"view", "list", true}, {"view", "create", false}, {"edit", "create", true}, {"edit", "delete", true}} {
		eventually(t, tt.role+" "+tt.verb, func() error {
			role, err := k.admin.RbacV1().ClusterRoles().Get(t.Context(), tt.role, metav1.GetOptions{})
			if err != nil {
				return err
			}
			may := false
			for _, r := range role.Rules {
				may = may || strings.Contains(fmt.Sprint(r.Resources), "volumesnapshots") && strings.Contains(fmt.Sprint(r.Verbs), tt.verb)
			}
			if may != tt.want {
				return fmt.Errorf("may: %v", may)
			}
			return nil
		})
	}
}
