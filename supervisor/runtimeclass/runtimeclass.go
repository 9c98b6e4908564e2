// Package runtimeclass keeps what a pod VM costs in the RuntimeClass that all
// pods of an Atoll cluster get: the API server copies it into each Pod, where
// the scheduler and quotas count it.
package runtimeclass

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	applynode "k8s.io/client-go/applyconfigurations/node/v1"
	"k8s.io/client-go/kubernetes"
)

// Name of the class, and of its handler.
const Name = "atoll"

// AnnotationMeasured holds, as JSON, the Measurement that the class's overhead
// comes from. Without it the overhead is an administrator's, or Default.
const AnnotationMeasured = "atoll.dev/overhead-measured"

// fieldManager owns the overhead, not the class: the control plane applies the
// class at each start, and must not undo what was measured.
const fieldManager = "atoll-overhead"

// An Overhead is what a pod VM costs its host beyond what containers use.
type Overhead struct {
	MilliCPU int64 `json:"milliCPU"`
	Memory   int64 `json:"memory"` // bytes
}

// Default stands until somebody measures: what a cold boot took on a host with
// KVM, and half a percent of a core.
var Default = Overhead{MilliCPU: 5, Memory: 96 << 20}

// List is the overhead as Kubernetes has it.
func (o Overhead) List() corev1.ResourceList {
	return corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewMilliQuantity(o.MilliCPU, resource.DecimalSI),
		corev1.ResourceMemory: *resource.NewQuantity(o.Memory, resource.BinarySI),
	}
}

// A Measurement is what `atoll check --overhead` found on one node, in bytes.
// GiB is what each GiB of RAM adds.
type Measurement struct {
	Overhead
	Time        metav1.Time `json:"time"`
	Accelerator string      `json:"accelerator"`
	Guest       string      `json:"guest"` // kernel
	Cloned      bool        `json:"cloned"`
	HostFixed   int64       `json:"hostFixed"`
	HostGiB     int64       `json:"hostGiB"`
	GuestFixed  int64       `json:"guestFixed"`
	GuestGiB    int64       `json:"guestGiB"`
}

// Ensure gives the class Default where it has no overhead. It is ErrNotFound if
// there is no class.
func Ensure(ctx context.Context, client kubernetes.Interface) error {
	class, err := get(ctx, client)
	if err != nil || class.Overhead != nil {
		return err
	}
	return apply(ctx, client, Default, "")
}

// Write gives the class what was measured. Pods that are there keep what they
// were made with. It is ErrNotFound if there is no class.
func Write(ctx context.Context, client kubernetes.Interface, m Measurement) error {
	if _, err := get(ctx, client); err != nil {
		return err
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return apply(ctx, client, m.Overhead, string(b))
}

func get(ctx context.Context, client kubernetes.Interface) (*nodev1.RuntimeClass, error) {
	class, err := client.NodeV1().RuntimeClasses().Get(ctx, Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("RuntimeClass %s is not in the cluster: `atoll up` makes it: %w", Name, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("RuntimeClass %s: %w", Name, err)
	}
	return class, nil
}

func apply(ctx context.Context, client kubernetes.Interface, o Overhead, measured string) error {
	class := applynode.RuntimeClass(Name).WithHandler(Name).WithOverhead(applynode.Overhead().WithPodFixed(o.List()))
	if measured != "" {
		class.WithAnnotations(map[string]string{AnnotationMeasured: measured})
	}
	_, err := client.NodeV1().RuntimeClasses().Apply(ctx, class, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("overhead of RuntimeClass %s: %w", Name, err)
	}
	return nil
}
