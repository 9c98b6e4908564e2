package disks

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage/csi"
)

// What nodes say, as Prometheus' text has it.
const said = `# HELP other_metric none of ours
# TYPE other_metric counter
other_metric{a="b"} 7
# TYPE atoll_disks_age_seconds gauge
atoll_disks_age_seconds 0.5
# TYPE atoll_disk gauge
atoll_disk{id="aaaaaaaaaaaa.v-111111111111111111111111",kind="volume",name="pvc-u1",policy="gold",datastore="fast",datastore_id="aaaaaaaaaaaa",format="luks",encrypted="true",vm="pod-1_0",host="n1",damage="",unfinished="",compliance="NonCompliant",reason="thin",namespace="shop",claim="data",created="2026-01-01T00:00:00Z"} 1
atoll_disk{id="aaaaaaaaaaaa.v-222222222222222222222222",kind="volume",name="pvc-u2",policy="gold",datastore="fast",datastore_id="aaaaaaaaaaaa",format="raw",encrypted="false",vm="",host="",damage="",unfinished="",compliance="Compliant",reason="",namespace="shop",claim="old",created="2026-01-01T00:00:00Z"} 1
atoll_disk{id="aaaaaaaaaaaa.v-333333333333333333333333",kind="volume",name="",policy="",datastore="fast",datastore_id="aaaaaaaaaaaa",format="",encrypted="false",vm="",host="",damage="its record is \"not\"\nJSON",unfinished="",compliance="NonCompliant",reason="",namespace="",claim="",created=""} 1
atoll_disk{id="fast:disks/x.raw",kind="file",name="",policy="",datastore="fast",datastore_id="aaaaaaaaaaaa",format="",encrypted="false",vm="",host="",damage="",unfinished="",compliance="Unknown",reason="",namespace="",claim="",created="2026-01-01T00:00:00Z"} 1
# TYPE atoll_disk_size_bytes gauge
atoll_disk_size_bytes{id="aaaaaaaaaaaa.v-111111111111111111111111"} 1.073741824e+09
# TYPE atoll_disk_used_bytes gauge
atoll_disk_used_bytes{id="aaaaaaaaaaaa.v-111111111111111111111111"} 1.5e+06
# TYPE atoll_datastore gauge
atoll_datastore{id="aaaaaaaaaaaa",name="fast",problem=""} 1
atoll_datastore{id="bbbbbbbbbbbb",name="nfs",problem="nothing is mounted there"} 0
`

func volume(name, handle, host, claim string) corev1.PersistentVolume {
	pv := corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
		Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse("2Gi")},
		PersistentVolumeSource: corev1.PersistentVolumeSource{CSI: &corev1.CSIPersistentVolumeSource{
			Driver: v1alpha1.CSIDriverName, VolumeHandle: handle, VolumeAttributes: map[string]string{"policy": "silver", "datastore": "its"},
		}},
	}}
	if host != "" {
		pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: csi.TopologyHost, Values: []string{host}}},
		}}}}
	}
	if claim != "" {
		pv.Spec.ClaimRef = &corev1.ObjectReference{Namespace: "shop", Name: claim}
	}
	return pv
}

func pod(name, uid, claim string) corev1.Pod {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(uid), Annotations: map[string]string{v1alpha1.PodVMUUIDAnnotation: "vm-of-" + name}}}
	p.Spec.NodeName = "n9"
	p.Spec.Volumes = []corev1.Volume{{VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}}}
	return p
}

func TestList(t *testing.T) {
	n1 := ReadNode("n1", strings.NewReader(said))
	if n1.Err != nil || len(n1.Items) != 4 || len(n1.Datastores) != 2 {
		t.Fatalf("%+v", n1)
	}
	const a, b = "aaaaaaaaaaaa.v-", "bbbbbbbbbbbb.v-"
	released := volume("kept", b+"444444444444444444444444", "n1", "gone")
	c := Cluster{
		Now: time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC), Nodes: []Node{n1, {Name: "n2", Err: errors.New("n2 is silent")}},
		Pods: []corev1.Pod{pod("web", "pod-1", "data"), pod("db", "pod-2", "fcd")},
		Volumes: []corev1.PersistentVolume{
			volume("pv1", a+"111111111111111111111111", "n1", "data"), released,
			volume("pv5", a+"555555555555555555555555", "n1", "lost"), volume("pv6", a+"666666666666666666666666", "n2", "far"),
			volume("pv7", "d2f1c0de-0000-4000-8000-000000000000", "", "fcd"), volume("pv8", "d2f1c0de-0000-4000-8000-000000000001", "", "fcd-free"),
			{ObjectMeta: metav1.ObjectMeta{Name: "others"}},
		},
	}
	got := map[string]Disk{}
	for _, d := range c.List() {
		got[d.ID] = d
	}
	for id, want := range map[string]struct{ pvc, policy, pod, vm, node, state, reason string }{
		a + "111111111111111111111111":         {"data", "gold", "web", "pod-1_0", "n1", InUse, ""},
		a + "222222222222222222222222":         {"old", "gold", "", "", "n1", Orphan, "no PersistentVolume has it"},
		a + "333333333333333333333333":         {"", "", "", "", "n1", Damaged, "its record is \"not\"\nJSON"},
		"fast:disks/x.raw":                     {"", "", "", "", "n1", Orphan, "no record stands for this file"},
		b + "444444444444444444444444":         {"gone", "silver", "", "", "n1", Unknown, "nothing is mounted there"},
		a + "555555555555555555555555":         {"lost", "silver", "", "", "n1", Damaged, "datastore fast has no such volume"},
		a + "666666666666666666666666":         {"far", "silver", "", "", "n2", Unknown, "n2 is silent"},
		"d2f1c0de-0000-4000-8000-000000000000": {"fcd", "silver", "db", "vm-of-db", "n9", InUse, ""},
		"d2f1c0de-0000-4000-8000-000000000001": {"fcd-free", "silver", "", "", "", Free, ""},
	} {
		d, ok := got[id]
		have := struct{ pvc, policy, pod, vm, node, state, reason string }{d.PVC, d.Policy, d.Pod, d.VM, d.Node, d.State, d.Reason}
		if !ok || have != want {
			t.Errorf("%s: %+v, want %+v", id, have, want)
		}
	}
	if len(got) != 9 {
		t.Errorf("%d disks", len(got))
	}
	if d := got[a+"111111111111111111111111"]; *d.Size != 1<<30 || *d.Used != 1500000 || !d.Encrypted || d.Compliance != "NonCompliant" || d.ComplianceReason != "thin" || d.PV != "pv1" {
		t.Errorf("%+v", d)
	}
	var out bytes.Buffer
	if err := Table(&out, []Disk{got[a+"111111111111111111111111"], got[a+"333333333333333333333333"]}, Style{Namespaces: true, Wide: true}); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 3 || strings.Join(strings.Fields(lines[1]), " ") != "shop data gold web pod-1_0 fast 1Gi 1.4Mi luks,encrypted n1 NonCompliant: thin pv1 "+a+"111111111111111111111111 in use" ||
		!strings.HasSuffix(lines[2], `damaged: its record is "not" JSON`) {
		t.Errorf("\n%s", out.String())
	}
}

// What is being made is no orphan, and is none of two nodes that share it.
func TestNoOrphans(t *testing.T) {
	now := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	one := Item{ID: "x", Name: "pvc-u1", Created: now.Add(-time.Hour), Bytes: 1, Used: 1}
	waits := corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{UID: "u1"}}
	fresh := Item{ID: "y", Name: "inline-1", Created: now.Add(-time.Second)}
	half := Item{ID: "z", Unfinished: "making by host n1"}
	held := Item{ID: "h", Name: "inline-2", VM: "p_0", Host: "n2"}
	for _, d := range (Cluster{Now: now, Claims: []corev1.PersistentVolumeClaim{waits}, Nodes: []Node{{Name: "n1", Items: []Item{one, fresh, half, held}}, {Name: "n2", Items: []Item{held}}}}).List() {
		want := map[string]string{"x": Free, "y": Free, "z": Unknown, "h": InUse}[d.ID]
		if d.State != want || d.ID == "h" && d.Node != "n2" {
			t.Errorf("%+v, want %s", d, want)
		}
	}
}

func TestReadNodeThatHangs(t *testing.T) {
	n := ReadNode("n1", strings.NewReader("# TYPE atoll_disks_age_seconds gauge\natoll_disks_age_seconds 90\n"))
	if n.Err == nil || !strings.Contains(n.Err.Error(), "does not answer for 90 s") {
		t.Errorf("%+v", n)
	}
	if n := ReadNode("n1", strings.NewReader("{")); n.Err == nil {
		t.Error("what is no metrics was read")
	}
}
