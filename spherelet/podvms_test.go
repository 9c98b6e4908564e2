package spherelet

import (
	"errors"
	"log/slog"
	"maps"
	"net"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod"
)

const vmPodUID = "6e8ecb0c-1f0a-4c5b-9d0a-0a1b2c3d4e5f"

func webVM() vmpod.PodVM {
	return vmpod.PodVM{
		ID: vmpod.ID{PodUID: vmPodUID}, Owner: vmpod.Owner{PodUID: vmPodUID, Namespace: "ns", Name: "web"},
		CPUs: 2, Memory: 768 << 20, MAC: net.HardwareAddr{2, 0, 0, 0xaa, 0xbb, 1},
	}
}

func webPod() *v1.Pod {
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: vmPodUID, Annotations: map[string]string{"a": "kept"}},
		Spec:       v1.PodSpec{InitContainers: []v1.Container{{Name: "init", Image: "b:1"}}, Containers: []v1.Container{{Name: "web", Image: "w:2"}}},
	}
}

// wroteOnto runs a teller until it has nothing left to write and returns the
// Pod's annotations and how often it was patched.
func wroteOnto(t *testing.T, client *fake.Clientset, known *v1.Pod, vm vmpod.PodVM) (map[string]string, int) {
	t.Helper()
	teller := newPodVMTeller(client, func(string, string) *v1.Pod { return known }, slog.New(slog.DiscardHandler))
	teller.tell(vm)
	for len(teller.known) > 0 {
		uid, _ := teller.queue.Get()
		teller.one(t.Context(), uid)
		teller.queue.Done(uid)
	}
	patches := 0
	for _, a := range client.Actions() {
		if a.GetVerb() == "patch" {
			patches++
			if a.GetSubresource() != "status" {
				t.Errorf("%v, want a patch of the status", a)
			}
		}
	}
	pod, err := client.CoreV1().Pods("ns").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod.Annotations, patches
}

func TestPodVMIsWrittenOntoThePod(t *testing.T) {
	want := map[string]string{
		"a":                                   "kept",
		v1alpha1.PodVMUUIDAnnotation:          vmPodUID,
		v1alpha1.PodEphemeralDiskAnnotation:   vmpod.ID{PodUID: vmPodUID}.DiskUUID().String(),
		v1alpha1.PodImageReferencesAnnotation: `{"init":"b:1","web":"w:2"}`,
		v1alpha1.PodMACAnnotation:             "02:00:00:aa:bb:01",
		v1alpha1.PodVMSizeAnnotation:          `{"cpus":2,"memory":805306368}`,
	}
	client := fake.NewClientset(webPod())
	got, patches := wroteOnto(t, client, webPod(), webVM())
	if !maps.Equal(got, want) || patches != 1 {
		t.Errorf("annotations %v after %d patches, want %v", got, patches, want)
	}
	told := webPod()
	told.Annotations = got
	if _, patches := wroteOnto(t, client, told, webVM()); patches != 1 {
		t.Errorf("%d patches, want none of what the Pod has already", patches-1)
	}
	grown := webVM()
	grown.CPUs = 3
	if got, _ := wroteOnto(t, client, told, grown); got[v1alpha1.PodVMSizeAnnotation] != `{"cpus":3,"memory":805306368}` {
		t.Errorf("after growth %v", got)
	}
}

func TestPodVMIsWrittenInTheEnd(t *testing.T) {
	client := fake.NewClientset(webPod())
	failures := 2
	client.PrependReactor("patch", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
		failures--
		return failures >= 0, nil, errors.New("connection refused")
	})
	got, patches := wroteOnto(t, client, nil, webVM()) // nil: the kubelet has just started
	if got[v1alpha1.PodVMUUIDAnnotation] != vmPodUID || patches != 3 {
		t.Errorf("annotations %v after %d patches, want them after 3", got, patches)
	}
}

func TestPodVMOfAnotherPodIsNotWritten(t *testing.T) {
	later := webPod()
	later.UID = "another"
	client := fake.NewClientset(later)
	if got, patches := wroteOnto(t, client, nil, webVM()); patches != 0 || len(got) != 1 {
		t.Errorf("annotations %v after %d patches, want those of a pod that is another's left alone", got, patches)
	}
}

func TestStaticPodsMirrorTellsTheVM(t *testing.T) {
	const hash = "0123456789abcdef0123456789abcdef"
	mirror := webPod()
	mirror.UID, mirror.Annotations = "of-the-mirror", map[string]string{kubetypes.ConfigMirrorAnnotationKey: hash, kubetypes.ConfigSourceAnnotationKey: kubetypes.ApiserverSource}
	static := webPod()
	static.UID, static.Annotations = hash, map[string]string{kubetypes.ConfigSourceAnnotationKey: kubetypes.FileSource}
	vm := webVM()
	vm.ID.PodUID = hash
	client := fake.NewClientset(mirror)
	if got, _ := wroteOnto(t, client, static, vm); got[v1alpha1.PodVMUUIDAnnotation] != vm.ID.UUID().String() {
		t.Errorf("the mirror's annotations are %v", got)
	}
}
