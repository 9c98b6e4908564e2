package rest

import (
	"encoding/json"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"github.com/openatoll/atoll/api/v1alpha1"
)

const classes = management + "/virtual-machine-classes"

func TestClassApply(t *testing.T) {
	from := v1alpha1.VirtualMachineClassSpec{Description: "d", CPUs: 2, Memory: *quantity("1G"), CPUReservationPercent: 10, MemoryReservationPercent: 20}
	for _, c := range []struct {
		body  string
		whole bool
		want  func(*v1alpha1.VirtualMachineClassSpec)
	}{
		{body: `{}`, want: func(*v1alpha1.VirtualMachineClassSpec) {}},
		{body: `{"id": "x", "cpu_count": 0, "memory_MB": 0, "devices": {}}`, want: func(*v1alpha1.VirtualMachineClassSpec) {}}, // govc's silence
		{body: `{"cpu_count": 2, "memory_MB": 954, "cpu_reservation": 10}`, want: func(*v1alpha1.VirtualMachineClassSpec) {}},  // 1G stays 1G
		{body: `{"cpu_count": 4}`, want: func(s *v1alpha1.VirtualMachineClassSpec) { s.CPUs = 4 }},
		{body: `{"memory_MB": 1024}`, want: func(s *v1alpha1.VirtualMachineClassSpec) { s.Memory = *quantity("1Gi") }},
		{body: `{"memory_reservation": 0, "description": ""}`, want: func(s *v1alpha1.VirtualMachineClassSpec) {
			s.MemoryReservationPercent, s.Description = 0, ""
		}},
		{body: `{"config_spec": {"_typeName": "VirtualMachineConfigSpec", "numCPUs": 8, "memoryMB": 8192, "name": null}}`, want: func(s *v1alpha1.VirtualMachineClassSpec) {
			s.CPUs, s.Memory = 8, *quantity("8Gi")
		}},
		{body: `{"cpu_count": 8, "memory_MB": 8192, "config_spec": {"numCPUs": 8, "memoryMB": 8192}}`, whole: true, want: func(s *v1alpha1.VirtualMachineClassSpec) {
			s.CPUs, s.Memory = 8, *quantity("8Gi")
		}},
	} {
		var spec classSpec
		if err := json.Unmarshal([]byte(c.body), &spec); err != nil {
			t.Fatalf("%s: %v", c.body, err)
		}
		got, want := *from.DeepCopy(), *from.DeepCopy()
		c.want(&want)
		if err := spec.apply(&got, c.whole); err != nil || marshal(t, got) != marshal(t, want) {
			t.Errorf("%s: %s, %v; want %s", c.body, marshal(t, got), err, marshal(t, want))
		}
	}
}

func TestClasses(t *testing.T) {
	b := newBench(t, interceptor.Funcs{}, testSupervisor())
	b.want("POST", classes, `{"id": "small", "cpu_count": 2, "memory_MB": 4096, "cpu_reservation": 50, "description": "two", "devices": {}}`, 204, "", "")
	b.want("POST", classes, `{"id": "small", "cpu_count": 2, "memory_MB": 4096}`, 400, "ALREADY_EXISTS", "small")
	for _, c := range [][3]string{
		{`{"id": "Bad", "cpu_count": 1, "memory_MB": 4}`, "INVALID_ARGUMENT", "Bad"},
		{`{"id": "a", "memory_MB": 4}`, "INVALID_ARGUMENT", "cpu_count is missing"},
		{`{"id": "a", "cpu_count": 1}`, "INVALID_ARGUMENT", "memory_MB is missing"},
		{`{"id": "a", "cpu_count": 0, "memory_MB": 4}`, "INVALID_ARGUMENT", "cpu_count is 0"},
		{`{"id": "a", "cpu_count": 4294967297, "memory_MB": 4}`, "INVALID_ARGUMENT", "cpu_count"},
		{`{"id": "a", "cpu_count": 1, "memory_MB": 4, "memory_reservation": 101}`, "INVALID_ARGUMENT", "101"},
		{`{"id": "a", "cpu_count": 1, "memory_MB": 4, "config_spec": {"numCPUs": 2}}`, "INVALID_ARGUMENT", "config_spec says 2"},
		{`{"id": "a", "cpu_count": 1, "memory_MB": 4, "config_spec": {"firmware": "efi"}}`, "UNSUPPORTED", "config_spec.firmware"},
		{`{"id": "a", "cpu_count": 1, "memory_MB": 4, "devices": {"vgpu_devices": [{"profile_name": "x"}]}}`, "UNSUPPORTED", "devices"},
		{`{"id": "a", "cpu_count": 1, "memory_MB": 4, "instance_storage": {"policy": "x"}}`, "UNSUPPORTED", "instance_storage"},
		{`{"id": "a", "cpus": 1}`, "UNEXPECTED_INPUT", `"cpus"`},
	} {
		b.want("POST", classes, c[0], 400, c[1], c[2])
	}
	const want = `{"id":"small","cpu_count":2,"memory_MB":4096,"cpu_reservation":50,"description":"two","config_status":"READY","messages":[],"namespaces":[],"vms":[],"devices":{}}`
	if out := b.want("GET", classes+"/small", "", 200, "", ""); out != want {
		t.Errorf("got  %s\nwant %s", out, want)
	}
	if out := b.want("GET", classes, "", 200, "", ""); out != "["+want+"]" {
		t.Errorf("list: %s", out)
	}
	b.want("PATCH", classes+"/small", `{"id": "small", "cpu_count": 4, "memory_MB": 0, "devices": {}}`, 204, "", "")
	b.want("PATCH", classes+"/small", `{"id": "other"}`, 400, "INVALID_ARGUMENT", "not renamed")
	b.want("PATCH", classes+"/none", `{}`, 404, "NOT_FOUND", "none")
	if out := b.want("GET", classes+"/small", "", 200, "", ""); !strings.Contains(out, `"cpu_count":4,"memory_MB":4096`) {
		t.Error(out)
	}
	b.want("GET", classes+"/none", "", 404, "NOT_FOUND", "none")
	b.want("DELETE", classes+"/none", "", 404, "NOT_FOUND", "none")
	b.want("DELETE", classes+"/small", "", 204, "", "")
	b.want("DELETE", classes+"/small", "", 404, "NOT_FOUND", "small")
}

func TestClassInUse(t *testing.T) {
	objects := []client.Object{testSupervisor(), class("small")}
	for _, name := range []string{"b", "a"} {
		ns := namespace(name, "resgroup-"+name)
		ns.Spec.VMClasses = []string{"small"}
		objects = append(objects, ns)
	}
	for name, moid := range map[string]string{"p1": "vm-7:uuid", "p2": "vm-5:uuid", "p3": ""} {
		objects = append(objects, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "a", Labels: map[string]string{v1alpha1.LabelVMClass: "small"}, Annotations: map[string]string{v1alpha1.PodVMMoIDAnnotation: moid},
		}})
	}
	b := newBench(t, interceptor.Funcs{}, objects...)
	if out := b.want("GET", classes+"/small", "", 200, "", ""); !strings.Contains(out, `"namespaces":["a","b"],"vms":["vm-5","vm-7"]`) {
		t.Error(out)
	}
	b.want("DELETE", classes+"/small", "", 400, "RESOURCE_IN_USE", "a, b")
}
