package volumes

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/volume"

	"github.com/openatoll/atoll/api/v1alpha1"
	"github.com/openatoll/atoll/vmpod"
)

func pvSpec(source v1.PersistentVolumeSource) *volume.Spec {
	return volume.NewSpecFromPersistentVolume(&v1.PersistentVolume{Spec: v1.PersistentVolumeSpec{PersistentVolumeSource: source}}, false)
}

// What would be mounted on the host is refused with the reason, not waited for.
func TestRefusedPersistentVolumes(t *testing.T) {
	csi := func(driver string) v1.PersistentVolumeSource {
		return v1.PersistentVolumeSource{CSI: &v1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: "h"}}
	}
	refused := refusedPlugin{}
	for name, source := range map[string]v1.PersistentVolumeSource{
		"hostPath": {HostPath: &v1.HostPathVolumeSource{Path: "/"}},
		"nfs":      {NFS: &v1.NFSVolumeSource{}},
		"local":    {Local: &v1.LocalVolumeSource{}},
	} {
		if !refused.CanSupport(pvSpec(source)) {
			t.Errorf("%s: nobody tells why", name)
		}
		if _, err := refused.NewMounter(pvSpec(source), nil); err == nil || !strings.Contains(err.Error(), v1alpha1.CSIDriverName) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if refused.CanSupport(pvSpec(csi(v1alpha1.CSIDriverName))) || (refusedPlugin{hostPaths: true}).CanSupport(pvSpec(v1.PersistentVolumeSource{HostPath: &v1.HostPathVolumeSource{}})) {
		t.Error("two plug-ins answer for one volume")
	}
	if refused.CanSupport(spec("v", "", "")) {
		t.Error("an emptyDir is refused")
	}
	if _, err := NewCSI().NewMounter(pvSpec(csi("other.example.com")), nil); err == nil || !strings.Contains(err.Error(), "volumeMode: Block") {
		t.Errorf("a file system of another driver: %v", err)
	}
}

type setUp struct {
	volume.Mounter
	dir string
}

func (s setUp) GetPath() string                { return s.dir }
func (s setUp) SetUp(volume.MounterArgs) error { return nil }

func TestGroupPolicyIsRecorded(t *testing.T) {
	dir := t.TempDir()
	if err := vmpod.WriteVolumeRecord(dir, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v"}}); err != nil {
		t.Fatal(err)
	}
	policy := v1.FSGroupChangeOnRootMismatch
	for range 2 {
		if err := (csiMounter{setUp{dir: dir}}).SetUp(volume.MounterArgs{FSGroupChangePolicy: &policy}); err != nil {
			t.Fatal(err)
		}
	}
	r, ok, err := vmpod.ReadVolumeRecord(dir)
	if err != nil || !ok || r.Disk.FSGroupChangePolicy != vmpod.FSGroupOnRootMismatch || r.Disk.VolumeID != "v" {
		t.Errorf("record %+v, %v, %v", r.Disk, ok, err)
	}
}

func TestReleaseRecord(t *testing.T) {
	file := filepath.Join(t.TempDir(), "record")
	if err := releaseRecord(file); err != nil {
		t.Errorf("what is gone: %v", err)
	}
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := releaseRecord(file); err != nil {
		t.Errorf("without a mount: %v", err)
	}
	if err := releaseRecord("/dev/null"); err != nil {
		t.Errorf("a device: %v", err)
	}
}

// toldHost notes what the kubelet is told.
type toldHost struct {
	volume.KubeletVolumeHost
	told []error
}

func (h *toldHost) SetKubeletError(err error) { h.told = append(h.told, err) }

// A kubelet that is replaced does not make its node NotReady; one that cannot
// write its CSINode does.
func TestCalmHost(t *testing.T) {
	told := &toldHost{}
	var h volume.KubeletVolumeHost = &calmHost{KubeletVolumeHost: told}
	failed := errors.New("failed to initialize CSINode")
	for _, err := range []error{errors.New("CSINode is not yet initialized"), failed, nil} {
		h.SetKubeletError(err)
	}
	if len(told.told) != 2 || !errors.Is(told.told[0], failed) || told.told[1] != nil {
		t.Errorf("the kubelet was told %v", told.told)
	}
}
