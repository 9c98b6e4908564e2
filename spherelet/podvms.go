package spherelet

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientset "k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/workqueue"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod"
)

// Pauses before an annotation that could not be written is tried again.
const (
	firstPodVMPause = 200 * time.Millisecond
	lastPodVMPause  = time.Minute
)

// podVMTeller writes onto each Pod which VM it has, as vSphere Pods tell it.
// Storage drivers wait for that, so it is tried until it is there or the pod is
// not.
type podVMTeller struct {
	client clientset.Interface
	// pod is the kubelet's own, nil if it does not know it (yet).
	pod   func(namespace, name string) *v1.Pod
	log   *slog.Logger
	queue workqueue.TypedRateLimitingInterface[string] // pods' UIDs

	mu    sync.Mutex
	known map[string]vmpod.PodVM // what is still to be written, by pod UID
}

func newPodVMTeller(client clientset.Interface, pod func(namespace, name string) *v1.Pod, log *slog.Logger) *podVMTeller {
	return &podVMTeller{
		client: client, pod: pod, log: log, known: map[string]vmpod.PodVM{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](firstPodVMPause, lastPodVMPause)),
	}
}

// tell returns at once.
func (t *podVMTeller) tell(vm vmpod.PodVM) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.known[vm.ID.PodUID] = vm
	t.queue.Add(vm.ID.PodUID)
}

// run writes until ctx ends.
func (t *podVMTeller) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, t.queue.ShutDown)
	defer stop()
	for {
		uid, shutdown := t.queue.Get()
		if shutdown {
			return
		}
		t.one(ctx, uid)
		t.queue.Done(uid)
	}
}

func (t *podVMTeller) one(ctx context.Context, uid string) {
	t.mu.Lock()
	vm, ok := t.known[uid]
	t.mu.Unlock()
	if !ok {
		return
	}
	err := t.write(ctx, vm)
	switch {
	case err == nil, apierrors.IsNotFound(err), apierrors.IsConflict(err): // a conflict is another pod of the name
		t.forget(vm)
	case ctx.Err() == nil:
		t.log.Warn("which VM a pod has could not be written to it, trying again", "pod_uid", uid, "err", err)
		t.queue.AddRateLimited(uid)
	}
}

// forget drops what was written, unless there is news meanwhile.
func (t *podVMTeller) forget(vm vmpod.PodVM) {
	t.mu.Lock()
	defer t.mu.Unlock()
	uid := vm.ID.PodUID
	t.queue.Forget(uid)
	if now := t.known[uid]; now.ID == vm.ID && now.CPUs == vm.CPUs && now.Memory == vm.Memory {
		delete(t.known, uid)
	}
}

// write patches the Pod unless it says all of it already.
func (t *podVMTeller) write(ctx context.Context, vm vmpod.PodVM) error {
	pod := t.pod(vm.Owner.Namespace, vm.Owner.Name)
	if pod == nil || kubetypes.IsStaticPod(pod) || string(pod.UID) != vm.ID.PodUID {
		// A static pod is in the API by its mirror, which has a UID of its own.
		ctx, cancel := context.WithTimeout(ctx, patchTimeout)
		defer cancel()
		var err error
		if pod, err = t.client.CoreV1().Pods(vm.Owner.Namespace).Get(ctx, vm.Owner.Name, metav1.GetOptions{}); err != nil {
			return err
		}
		if string(pod.UID) != vm.ID.PodUID && pod.Annotations[kubetypes.ConfigMirrorAnnotationKey] != vm.ID.PodUID {
			return nil // a later pod of the name: this one is gone
		}
	}
	want, err := podVMAnnotations(vm, pod)
	if err != nil || has(pod.Annotations, want) {
		return err
	}
	return patchPod(ctx, t.client, pod.Namespace, pod.Name, string(pod.UID), want, nil)
}

func has(all, some map[string]string) bool {
	for k, v := range some {
		if all[k] != v {
			return false
		}
	}
	return true
}

// podVMAnnotations are what a node knows of v1alpha1.PodVMAnnotations.
func podVMAnnotations(vm vmpod.PodVM, pod *v1.Pod) (map[string]string, error) {
	images := map[string]string{}
	for _, list := range [][]v1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			images[list[i].Name] = list[i].Image
		}
	}
	references, err := json.Marshal(images)
	if err != nil {
		return nil, err
	}
	size, err := json.Marshal(v1alpha1.PodVMSize{CPUs: vm.CPUs, Memory: vm.Memory})
	if err != nil {
		return nil, err
	}
	return map[string]string{
		v1alpha1.PodVMUUIDAnnotation:          vm.ID.UUID().String(),
		v1alpha1.PodEphemeralDiskAnnotation:   vm.ID.DiskUUID().String(),
		v1alpha1.PodImageReferencesAnnotation: string(references),
		v1alpha1.PodMACAnnotation:             vm.MAC.String(),
		v1alpha1.PodVMSizeAnnotation:          string(size),
	}, nil
}
