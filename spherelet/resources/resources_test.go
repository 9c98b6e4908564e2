package resources

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

const (
	guest = DefaultGuestFixed
	gib   = 1 << 30
)

// list reads pairs: cpu, memory, disk; "" leaves one out.
func list(cpu, memory, disk string) v1.ResourceList {
	l := v1.ResourceList{}
	for name, s := range map[v1.ResourceName]string{v1.ResourceCPU: cpu, v1.ResourceMemory: memory, v1.ResourceEphemeralStorage: disk} {
		if s != "" {
			l[name] = resource.MustParse(s)
		}
	}
	return l
}

func container(requests, limits v1.ResourceList) v1.Container {
	return v1.Container{Name: "c", Resources: v1.ResourceRequirements{Requests: requests, Limits: limits}}
}

func sidecar(requests, limits v1.ResourceList) v1.Container {
	c, always := container(requests, limits), v1.ContainerRestartPolicyAlways
	c.RestartPolicy = &always
	return c
}

func pod(cs ...v1.Container) *v1.Pod { return &v1.Pod{Spec: v1.PodSpec{Containers: cs}} }

func with(p *v1.Pod, f func(*v1.PodSpec)) *v1.Pod { f(&p.Spec); return p }

func emptyDir(medium v1.StorageMedium, limit string) v1.Volume {
	q := resource.MustParse(limit)
	return v1.Volume{Name: "v", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: medium, SizeLimit: &q}}}
}

// ram is the VM's memory for a workload, by the documented arithmetic.
func ram(workload int64) int64 {
	return roundUp(workload+guest+workload/DefaultGuestPerByte, mib)
}

func TestForPod(t *testing.T) {
	none := v1.ResourceList(nil)
	tests := []struct {
		name     string
		pod      *v1.Pod
		cpus     int
		workload int64
		disk     int64
	}{
		{"one container without anything", pod(container(none, none)), 1, 512 * mib, 10 * gib},
		{"three containers without anything", pod(container(none, none), container(none, none), container(none, none)), 2, 3 * 512 * mib, 10 * gib},
		{"largest of request and limit", pod(container(list("100m", "64Mi", ""), list("1500m", "256Mi", ""))), 2, 256 * mib, 10 * gib},
		{"request alone", pod(container(list("3", "1Gi", ""), none)), 3, 1 * gib, 10 * gib},
		{"memory named, CPU by default", pod(container(none, list("", "300Mi", ""))), 1, 300 * mib, 10 * gib},
		{"one named, one by default", pod(container(none, list("2", "1Gi", "")), container(none, none)), 3, 1*gib + 512*mib, 10 * gib},
		{"tiny limits still boot", pod(container(none, list("10m", "8Mi", ""))), 1, MinWorkload, 10 * gib},
		{"init container larger than the rest",
			with(pod(container(none, list("1", "256Mi", ""))), func(s *v1.PodSpec) {
				s.InitContainers = []v1.Container{container(none, list("4", "2Gi", ""))}
			}), 4, 2 * gib, 10 * gib},
		{"init container smaller than the rest",
			with(pod(container(none, list("2", "1Gi", ""))), func(s *v1.PodSpec) {
				s.InitContainers = []v1.Container{container(none, none)}
			}), 2, 1 * gib, 10 * gib},
		{"sidecar adds to the containers",
			with(pod(container(none, list("1", "256Mi", ""))), func(s *v1.PodSpec) {
				s.InitContainers = []v1.Container{sidecar(none, list("500m", "128Mi", ""))}
			}), 2, 384 * mib, 10 * gib},
		{"init container beside an earlier sidecar",
			with(pod(container(none, list("1", "256Mi", ""))), func(s *v1.PodSpec) {
				s.InitContainers = []v1.Container{sidecar(none, list("1", "128Mi", "")), container(none, list("3", "1Gi", ""))}
			}), 4, 1*gib + 128*mib, 10 * gib},
		{"pod-level limit replaces the sum",
			with(pod(container(none, none), container(none, none)), func(s *v1.PodSpec) {
				s.Resources = &v1.ResourceRequirements{Limits: list("3", "700Mi", "")}
			}), 3, 700 * mib, 10 * gib},
		{"pod-level request raises the sum",
			with(pod(container(none, none)), func(s *v1.PodSpec) {
				s.Resources = &v1.ResourceRequirements{Requests: list("2", "2Gi", "")}
			}), 2, 2 * gib, 10 * gib},
		{"pod-level request below the sum",
			with(pod(container(none, none)), func(s *v1.PodSpec) {
				s.Resources = &v1.ResourceRequirements{Requests: list("100m", "64Mi", "")}
			}), 1, 512 * mib, 10 * gib},
		{"memory volume inside a limit",
			with(pod(container(none, list("1", "1Gi", ""))), func(s *v1.PodSpec) {
				s.Volumes = []v1.Volume{emptyDir(v1.StorageMediumMemory, "512Mi")}
			}), 1, 1 * gib, 10 * gib},
		{"memory volume without a limit",
			with(pod(container(none, none)), func(s *v1.PodSpec) {
				s.Volumes = []v1.Volume{emptyDir(v1.StorageMediumMemory, "512Mi")}
			}), 1, 1 * gib, 10 * gib},
		{"disk follows the limit", pod(container(none, list("", "", "2Gi"))), 1, 512 * mib, roundUp(2*gib+2*gib/10, mib)},
		{"small disk", pod(container(none, list("", "", "16Mi"))), 1, 512 * mib, 80 * mib},
		{"disk of one limited container of two", pod(container(none, list("", "", "1Gi")), container(none, none)), 2 - 1, 2 * 512 * mib, 10 * gib},
		{"disk request above the default", pod(container(list("", "", "20Gi"), none)), 1, 512 * mib, 22 * gib},
		{"emptyDir larger than the default disk",
			with(pod(container(none, none)), func(s *v1.PodSpec) {
				s.Volumes = []v1.Volume{emptyDir("", "30Gi")}
			}), 1, 512 * mib, 33 * gib},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := ForPod(tt.pod, Policy{})
			if s.CPUs != tt.cpus || s.Workload != tt.workload || s.EphemeralBytes != tt.disk {
				t.Errorf("ForPod = %d CPUs, workload %d MiB, disk %d MiB; want %d, %d, %d",
					s.CPUs, s.Workload/mib, s.EphemeralBytes/mib, tt.cpus, tt.workload/mib, tt.disk/mib)
			}
			if want := ram(tt.workload); s.Memory != want {
				t.Errorf("Memory = %d MiB, want %d MiB", s.Memory/mib, want/mib)
			}
			if s.CPUCapped || s.MemoryCapped {
				t.Error("capped without a host")
			}
		})
	}
}

func TestOverhead(t *testing.T) {
	p := pod(container(nil, list("1", "256Mi", "")))
	p.Spec.Overhead = list("250m", "300Mi", "")
	if s := ForPod(p, Policy{}); s.Memory != 556*mib || s.CPUs != 1 {
		t.Errorf("with overhead: %v, want 1 CPU and 556 MiB", s)
	}
	p.Spec.Overhead = list("", "1Mi", "")
	if s := ForPod(p, Policy{}); s.Memory != ram(256*mib) {
		t.Errorf("an overhead too small to boot must not shrink the guest: %v", s)
	}
}

func TestHostCaps(t *testing.T) {
	p := pod(container(nil, list("64", "1Ti", "")))
	s := ForPod(p, Policy{HostCPUs: 2, HostMemory: 4 * gib})
	if s.CPUs != 2 || !s.CPUCapped || s.Memory != 4*gib || !s.MemoryCapped {
		t.Errorf("ForPod on a host of 2 CPUs and 4 GiB = %+v", s)
	}
	if s.Workload >= s.Memory || s.Workload < 3*gib {
		t.Errorf("workload %d MiB does not leave room for the guest in %d MiB", s.Workload/mib, s.Memory/mib)
	}
}

func TestRequests(t *testing.T) {
	p := pod(container(list("1500m", "1Gi", "1Gi"), list("8", "8Gi", "8Gi")), container(nil, nil))
	p.Spec.Overhead = list("250m", "128Mi", "")
	cpu, mem, disk := Requests(p)
	if cpu != 1750 || mem != 1*gib+128*mib || disk != 1*gib {
		t.Errorf("Requests = %d m, %d MiB, %d MiB", cpu, mem/mib, disk/mib)
	}
}

func TestNoOverflow(t *testing.T) {
	huge := list("", "8Ei", "")
	s := ForPod(pod(container(nil, huge), container(nil, huge)), Policy{HostCPUs: 2, HostMemory: gib})
	if s.Memory != gib || !s.MemoryCapped {
		t.Errorf("two containers of 8 EiB: %+v", s)
	}
}
