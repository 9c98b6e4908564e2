package controlplane

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/storage/csi"
)

// smallStore is a file system of 64 MiB for a node's datastore.
func smallStore(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "small")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("atoll-test", path, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return path
}

// scheduledAgain: n1 is full when it is to make the volume, of which the scheduler
// knew nothing.
func (k *snapshotTest) scheduledAgain(t *testing.T) {
	name, mode := "small", storagev1.VolumeBindingWaitForFirstConsumer
	class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: csi.Name, Parameters: map[string]string{csi.ParameterPolicy: name}, VolumeBindingMode: &mode}
	if _, err := k.admin.StorageV1().StorageClasses().Create(t.Context(), class, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "room of both nodes", func() error {
		all, err := k.admin.StorageV1().CSIStorageCapacities(metav1.NamespaceSystem).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		n := 0
		for _, c := range all.Items {
			if c.StorageClassName == name && c.MaximumVolumeSize != nil && c.MaximumVolumeSize.Value() >= 32<<20 {
				n++
			}
		}
		if n != 2 {
			return fmt.Errorf("of %d nodes", n)
		}
		return nil
	})
	if err := os.WriteFile(filepath.Join(k.small["n1"], "full"), make([]byte, 60<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	k.claim(t, "squeezed", func(c *corev1.PersistentVolumeClaim) {
		c.Spec.StorageClassName, c.Annotations = &name, map[string]string{selectedNode: "n1"} // as the scheduler did
	})
	pod := plainPod("", "")
	pod.Name, pod.GenerateName = "squeezed", ""
	pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "squeezed"}}}}
	if _, err := k.admin.CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	k.bound(t, "squeezed", "n2")
	k.event(t, "squeezed", "node n1 makes no volume, the scheduler selects again: node n1: ")
	eventually(t, "pod on n2", func() error {
		pod, err := k.admin.CoreV1().Pods("default").Get(t.Context(), "squeezed", metav1.GetOptions{})
		if err == nil && pod.Spec.NodeName != "n2" {
			err = fmt.Errorf("on %q: %+v", pod.Spec.NodeName, pod.Status.Conditions)
		}
		return err
	})
	eventually(t, "the node's word gone", func() error {
		claim, err := k.admin.CoreV1().PersistentVolumeClaims("default").Get(t.Context(), "squeezed", metav1.GetOptions{})
		if err == nil && slices.ContainsFunc(claim.Status.Conditions, func(c corev1.PersistentVolumeClaimCondition) bool { return c.Type == v1alpha1.ClaimRefused }) {
			err = errors.New("it is there")
		}
		return err
	})
	if left, err := filepath.Glob(filepath.Join(k.small["n1"], "*", "*v-*")); err != nil || len(left) != 0 {
		t.Errorf("n1 has left %q, %v", left, err)
	}
}
