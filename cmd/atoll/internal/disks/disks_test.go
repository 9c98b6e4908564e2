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

// What the API server says among much else of a vCenter.
const saidOfVCenter = `# TYPE apiserver_request_total counter
apiserver_request_total{code="200"} 5
# TYPE atoll_disks_age_seconds gauge
atoll_disks_age_seconds 200
# TYPE atoll_disk gauge
atoll_disk{id="d2f1c0de-0000-4000-8000-000000000001",kind="volume",name="pvc-u1",policy="gold",datastore="vsan",datastore_id="datastore-1",format="vmdk",encrypted="false",vm="pod-1_0",host="esx",damage="",unfinished="",compliance="",reason="",namespace="shop",claim="data",created="2026-01-01T00:00:00Z"} 1
atoll_disk{id="d2f1c0de-0000-4000-8000-000000000002",kind="volume",name="pvc-u2",policy="gold",datastore="vsan",datastore_id="datastore-1",format="vmdk",encrypted="false",vm="",host="",damage="",unfinished="",compliance="",reason="",namespace="shop",claim="free",created="2026-01-01T00:00:00Z"} 1
atoll_disk{id="d2f1c0de-0000-4000-8000-000000000003",kind="volume",name="pvc-u3",policy="gold",datastore="vsan",datastore_id="datastore-1",format="vmdk",encrypted="false",vm="",host="",damage="",unfinished="it is deleted, and its disk stays until its last snapshot goes",compliance="",reason="",namespace="shop",claim="old",created="2026-01-01T00:00:00Z"} 1
atoll_disk{id="d2f1c0de-0000-4000-8000-000000000004",kind="volume",name="pvc-u4",policy="gold",datastore="vsan",datastore_id="datastore-1",format="vmdk",encrypted="false",vm="",host="",damage="",unfinished="",compliance="",reason="",namespace="shop",claim="old",created="2026-01-01T00:00:00Z"} 1
# TYPE atoll_disk_size_bytes gauge
atoll_disk_size_bytes{id="d2f1c0de-0000-4000-8000-000000000001"} 1.073741824e+09
# TYPE atoll_disk_used_bytes gauge
atoll_disk_used_bytes{id="d2f1c0de-0000-4000-8000-000000000001"} 3.145728e+06
# TYPE atoll_datastore gauge
atoll_datastore{id="uuid-1",name="vc.example.com",problem=""} 1
`

// TestVCenter: disks of vSphere as the supervisor has seen them, beside what
// Kubernetes says; what it has not seen is not known.
func TestVCenter(t *testing.T) {
	const id = "d2f1c0de-0000-4000-8000-00000000000"
	of := func(pv corev1.PersistentVolume, uuid string) corev1.PersistentVolume {
		pv.Spec.CSI.VolumeAttributes["vcenter"] = uuid
		return pv
	}
	complies := corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "data", Annotations: map[string]string{
		v1alpha1.AnnotationPolicyCompliance: "NonCompliant", v1alpha1.AnnotationPolicyComplianceReason: "moved",
	}}}
	fresh := of(volume("pv7", id+"7", "", "new"), "uuid-1")
	fresh.CreationTimestamp = metav1.NewTime(time.Date(2026, 1, 1, 23, 59, 50, 0, time.UTC))
	c := Cluster{
		Now: time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC), VCenter: ReadVCenter(strings.NewReader(saidOfVCenter)), Claims: []corev1.PersistentVolumeClaim{complies},
		Pods: []corev1.Pod{pod("web", "pod-1", "data")},
		Volumes: []corev1.PersistentVolume{
			of(volume("pv1", id+"1", "", "data"), "uuid-1"), of(volume("pv2", id+"2", "", "free"), "uuid-1"),
			of(volume("pv5", id+"5", "", "lost"), "uuid-1"), of(volume("pv6", id+"6", "", "far"), "uuid-2"), fresh,
		},
	}
	list := func() map[string]Disk {
		got := map[string]Disk{}
		for _, d := range c.List() {
			got[strings.TrimPrefix(d.ID, id)] = d
		}
		return got
	}
	got := list()
	for n, want := range map[string]struct{ pvc, pod, state, reason string }{
		"1": {"data", "web", InUse, ""}, "2": {"free", "", Free, ""}, "3": {"old", "", Unknown, "until its last snapshot goes"}, "4": {"old", "", Orphan, "no PersistentVolume has it"},
		"5": {"lost", "", Unknown, "vCenter vc.example.com shows no such volume"}, "6": {"far", "", Unknown, "instance UUID uuid-2"}, "7": {"new", "", Free, ""},
	} {
		if d, ok := got[n]; !ok || d.PVC != want.pvc || d.Pod != want.pod || d.State != want.state || !strings.Contains(d.Reason, want.reason) || d.Format != "vmdk" && n != "5" {
			t.Errorf("%s: %+v, want %+v", n, d, want)
		}
	}
	if d := got["1"]; d.Policy != "gold" || d.Datastore != "vsan" || d.VM != "pod-1_0" || d.Node != "esx" || *d.Size != 1<<30 || *d.Used != 3<<20 || d.ComplianceReason != "moved" || len(got) != 7 {
		t.Errorf("%d disks, %+v", len(got), d)
	}
	silent := strings.Replace(saidOfVCenter, `problem=""} 1`, `problem="no answer"} 0`, 1)
	c.VCenter = ReadVCenter(strings.NewReader(silent))
	for n, d := range list() {
		if n != "3" && n != "7" && (d.State != Unknown && d.State != InUse || !strings.Contains(d.Reason, "vCenter vc.example.com: no answer")) {
			t.Errorf("a vCenter that is silent: %s is %+v", n, d)
		}
	}
	if n := ReadVCenter(strings.NewReader("# TYPE up gauge\nup 1\n")); n != nil {
		t.Errorf("where none is served: %+v", n)
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
