package podmirror

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func TestVMOf(t *testing.T) {
	at := place{"resgroup-1", "group-2"}
	condition := func(s corev1.ConditionStatus) []corev1.PodCondition {
		return []corev1.PodCondition{{Type: corev1.PodReadyToStartContainers, Status: s}}
	}
	for name, tc := range map[string]struct {
		change func(*corev1.Pod)
		ok, on bool
	}{
		"running":            {func(*corev1.Pod) {}, true, true},
		"starting":           {func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }, true, true},
		"has a sandbox":      {func(p *corev1.Pod) { p.Status.Conditions = condition(corev1.ConditionTrue) }, true, true},
		"has none":           {func(p *corev1.Pod) { p.Status.Conditions = condition(corev1.ConditionFalse) }, true, false},
		"has done its work":  {func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }, true, false},
		"has failed":         {func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }, true, false},
		"not yet named":      {func(p *corev1.Pod) { delete(p.Annotations, v1alpha1.PodVMUUIDAnnotation) }, false, false},
		"named badly":        {func(p *corev1.Pod) { p.Annotations[v1alpha1.PodVMUUIDAnnotation] = "x" }, false, false},
		"of no known size":   {func(p *corev1.Pod) { delete(p.Annotations, v1alpha1.PodVMSizeAnnotation) }, false, false},
		"of no size":         {func(p *corev1.Pod) { p.Annotations[v1alpha1.PodVMSizeAnnotation] = "{}" }, false, false},
		"on no node":         {func(p *corev1.Pod) { p.Spec.NodeName = "" }, false, false},
		"without an address": {func(p *corev1.Pod) { p.Status.PodIPs = nil }, true, true},
	} {
		pod := vmPod("shop", "web", uidA)
		tc.change(pod)
		vm, ok := vmOf(pod, at)
		if ok != tc.ok || ok && vm.On != tc.on {
			t.Errorf("%s: %+v, %v; want %v, on %v", name, vm, ok, tc.ok, tc.on)
		}
	}
	pod := vmPod("shop", "web", uidA)
	pod.Annotations[v1alpha1.PodVMMoIDAnnotation] = "vm-1:x"
	vm, _ := vmOf(pod, at)
	if vm.UUID != uidA || vm.Name != "web" || vm.CPUs != 2 || vm.MemoryMiB != 1024 || !slices.Equal(vm.Addresses, []string{"198.19.0.5"}) || vm.HostName != "web" || vm.MAC != "02:00:00:00:00:01" || vm.DiskUUID != uidB || vm.Host != "n1" || vm.Pool != "resgroup-1" || vm.Folder != "group-2" {
		t.Errorf("%+v", vm)
	}
	for k, want := range map[string]string{
		v1alpha1.PodVMUUIDAnnotation: uidA, v1alpha1.PodMACAnnotation: "02:00:00:00:00:01",
		AnnotationPod: "shop/web", AnnotationPodUID: uidA, AnnotationPodPhase: "Running", v1alpha1.PodVMMoIDAnnotation: "",
	} {
		if vm.Annotations[k] != want {
			t.Errorf("%s is %q, want %q", k, vm.Annotations[k], want)
		}
	}
}

func TestVMNameFitsAndDiffers(t *testing.T) {
	long := strings.Repeat("a", 79) + "."
	if got := vmName(long[:80]); got != long[:80] {
		t.Errorf("%q became %q", long[:80], got)
	}
	a, b := vmName(long+"x"), vmName(long+"y")
	if a == b || len(a) > maxVMName || len(b) > maxVMName || !strings.HasPrefix(a, "aaaa") {
		t.Errorf("%q and %q", a, b)
	}
}

func TestPlaceOf(t *testing.T) {
	pool := func(zone, id string) v1alpha1.PoolStatus { return v1alpha1.PoolStatus{Zone: zone, ID: id} }
	folder := &v1alpha1.FolderStatus{ID: "group-1"}
	for name, tc := range map[string]struct {
		status v1alpha1.SupervisorNamespaceStatus
		zone   string
		want   string // pool; empty: none
	}{
		"nothing yet":            {v1alpha1.SupervisorNamespaceStatus{}, "zone-a", ""},
		"no folder yet":          {v1alpha1.SupervisorNamespaceStatus{Pools: []v1alpha1.PoolStatus{pool("zone-a", "p1")}}, "zone-a", ""},
		"one pool for all":       {v1alpha1.SupervisorNamespaceStatus{Pools: []v1alpha1.PoolStatus{pool("zone-a", "p1")}, Folder: folder}, "", "p1"},
		"of its zone":            {v1alpha1.SupervisorNamespaceStatus{Pools: []v1alpha1.PoolStatus{pool("zone-a", "p1"), pool("zone-b", "p2")}, Folder: folder}, "zone-b", "p2"},
		"of a zone without pool": {v1alpha1.SupervisorNamespaceStatus{Pools: []v1alpha1.PoolStatus{pool("zone-a", "p1"), pool("zone-b", "p2")}, Folder: folder}, "zone-c", ""},
		"not made yet":           {v1alpha1.SupervisorNamespaceStatus{Pools: []v1alpha1.PoolStatus{pool("zone-a", "")}, Folder: folder}, "zone-a", ""},
	} {
		if got, ok := placeOf(tc.status, tc.zone); got.pool != tc.want || ok != (tc.want != "") {
			t.Errorf("%s: %+v, %v; want %q", name, got, ok, tc.want)
		}
	}
}
