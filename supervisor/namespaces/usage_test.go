package namespaces

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
)

func limited(cpu, memory string) corev1.Container {
	return corev1.Container{Name: "c", Image: "i", Resources: corev1.ResourceRequirements{
		Limits: corev1.ResourceList{"cpu": *q(cpu), "memory": *q(memory)}, Requests: corev1.ResourceList{"cpu": *q("1m")},
	}}
}

// TestUsage: what is kept of pods is enough to count what a quota would.
func TestUsage(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	sidecar := limited("100m", "10Mi")
	sidecar.RestartPolicy = &always
	pod := func(phase corev1.PodPhase, init []corev1.Container, overhead corev1.ResourceList, containers ...corev1.Container) corev1.Pod {
		return *barePod(&corev1.Pod{Spec: corev1.PodSpec{InitContainers: init, Containers: containers, Overhead: overhead}, Status: corev1.PodStatus{Phase: phase}})
	}
	claim := func(class, size string) corev1.PersistentVolumeClaim {
		return *bareClaim(&corev1.PersistentVolumeClaim{Spec: corev1.PersistentVolumeClaimSpec{
			StorageClassName: &class, Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{"storage": *q(size)}},
		}})
	}
	spec := &v1alpha1.SupervisorNamespaceSpec{NamespaceSettings: v1alpha1.NamespaceSettings{StoragePolicies: []v1alpha1.StoragePolicyLimit{{Name: "gold"}, {Name: "silver"}}}}
	u := usageOf(spec, []corev1.Pod{
		pod(corev1.PodRunning, nil, corev1.ResourceList{"memory": *q("28Mi")}, limited("1", "100Mi"), limited("500m", "100Mi")),
		pod(corev1.PodPending, []corev1.Container{limited("2", "50Mi"), sidecar}, nil, limited("1", "90Mi")),
		pod(corev1.PodRunning, nil, nil, corev1.Container{}),
		pod(corev1.PodSucceeded, nil, nil, limited("64", "1Ti")),
	}, []corev1.PersistentVolumeClaim{claim("gold", "1Gi"), claim("gold", "2Gi"), claim("other", "9Gi")})
	if u.CPU.Cmp(*q("3500m")) != 0 || u.Memory.Cmp(*q("328Mi")) != 0 || *u.Pods != 3 {
		t.Errorf("CPU %s, memory %s, %d pods", u.CPU, u.Memory, *u.Pods)
	}
	if len(u.Storage) != 2 || u.Storage[0].Used.Cmp(*q("3Gi")) != 0 || !u.Storage[1].Used.IsZero() {
		t.Errorf("storage %+v", u.Storage)
	}
}
