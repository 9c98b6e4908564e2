package podmirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/openatoll/atoll/api/v1alpha1"
)

// A fakeInventory refuses what vSphere refuses: two VMs of one name in a folder.
type fakeInventory struct {
	mu      sync.Mutex
	changed *sync.Cond
	vms     map[string]VM
	hosts   map[string]Host
	calls   int
	fail    map[string]error // by method
}

func newFakeInventory() *fakeInventory {
	f := &fakeInventory{vms: map[string]VM{}, hosts: map[string]Host{"n1": {Name: "n1"}}, fail: map[string]error{}}
	f.changed = sync.NewCond(&f.mu)
	return f
}

func (f *fakeInventory) Mirror(_ context.Context, vm VM) (Ref, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.changed.Broadcast()
	f.calls++
	if err := f.fail["Mirror"]; err != nil {
		return Ref{}, err
	}
	if _, there := f.hosts[vm.Host]; !there {
		return Ref{}, fmt.Errorf("host %s is not there", vm.Host)
	}
	for uuid, other := range f.vms {
		if uuid != vm.UUID && other.Name == vm.Name && other.Folder == vm.Folder {
			return Ref{}, fmt.Errorf("%s is there twice", vm.Name)
		}
	}
	f.vms[vm.UUID] = vm
	return Ref{MoID: "vm-" + vm.UUID[:4], VCenter: "vcenter"}, nil
}

func (f *fakeInventory) Unmirror(_ context.Context, uuid string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.changed.Broadcast()
	f.calls++
	if err := f.fail["Unmirror"]; err != nil {
		return err
	}
	delete(f.vms, uuid)
	return nil
}

func (f *fakeInventory) Mirrored(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.changed.Broadcast()
	f.calls++
	return slices.Collect(maps.Keys(f.vms)), f.fail["Mirrored"]
}

func (f *fakeInventory) ShowHost(_ context.Context, h Host) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.changed.Broadcast()
	f.hosts[h.Name] = h
	return f.fail["ShowHost"]
}

func (f *fakeInventory) RemoveHost(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.changed.Broadcast()
	for _, vm := range f.vms {
		if vm.Host == name {
			f.hosts[name] = Host{Name: name, State: HostNotResponding}
			return fmt.Errorf("host %s has VMs", name)
		}
	}
	if name != "n1" {
		delete(f.hosts, name)
	}
	return nil
}

// Hosts leaves n1 out, which is the configuration's.
func (f *fakeInventory) Hosts(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Collect(maps.Keys(f.hosts)), func(n string) bool { return n == "n1" }), nil
}

func (f *fakeInventory) set(method string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail[method] = err
}

// await returns what is shown as soon as ok says so of it.
func (f *fakeInventory) await(t *testing.T, what string, ok func(map[string]VM) bool) map[string]VM {
	t.Helper()
	stop := context.AfterFunc(t.Context(), f.changed.Broadcast)
	defer stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	for !ok(f.vms) {
		if t.Context().Err() != nil {
			t.Fatalf("%s: shown is %v", what, f.vms)
		}
		f.changed.Wait()
	}
	return maps.Clone(f.vms)
}

const (
	uidA = "11111111-1f0a-4c5b-9d0a-0a1b2c3d4e5f"
	uidB = "22222222-1f0a-4c5b-9d0a-0a1b2c3d4e5f"
	uidC = "33333333-1f0a-4c5b-9d0a-0a1b2c3d4e5f"
)

func vmPod(namespace, name, uid string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(uid), Annotations: map[string]string{
			v1alpha1.PodVMUUIDAnnotation: uid, v1alpha1.PodVMSizeAnnotation: `{"cpus":2,"memory":1073741824}`, v1alpha1.PodMACAnnotation: "02:00:00:00:00:01", v1alpha1.PodEphemeralDiskAnnotation: uidB,
		}},
		Spec:   corev1.PodSpec{NodeName: "n1"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "198.19.0.5"}}},
	}
}

func supervisorNamespace(t *testing.T, name string, pools ...v1alpha1.PoolStatus) *unstructured.Unstructured {
	t.Helper()
	ns := &v1alpha1.SupervisorNamespace{
		TypeMeta:   metav1.TypeMeta{APIVersion: "atoll.dev/v1alpha1", Kind: "SupervisorNamespace"},
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Status:     v1alpha1.SupervisorNamespaceStatus{Pools: pools, Folder: &v1alpha1.FolderStatus{ID: "group-" + name}},
	}
	o, err := runtime.DefaultUnstructuredConverter.ToUnstructured(ns)
	if err != nil {
		t.Fatal(err)
	}
	return &unstructured.Unstructured{Object: o}
}

// A cluster is a fake API with a controller that runs on it until stop.
type cluster struct {
	*Controller
	client  *fake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
	stop    func()
}

func newCluster(t *testing.T, inventory Inventory, client *fake.Clientset, namespaces ...runtime.Object) *cluster {
	t.Helper()
	dyn := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{namespacesResource: "SupervisorNamespaceList"}, namespaces...)
	c, err := New(Options{Client: client, Dynamic: dyn, Inventory: inventory, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return &cluster{Controller: c, client: client, dynamic: dyn, stop: stop}
}

var errDown = errors.New("down")
