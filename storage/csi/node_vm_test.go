package csi_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	spec "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/csi"
	"github.com/openatoll/atoll/vmpod"
)

func newDriver(t *testing.T, dir string) (*csi.Driver, storage.Disks) {
	t.Helper()
	disks := openLocal(t, dir, storage.FormatRaw)
	d, err := csi.New(csi.Config{Disks: disks, NodeName: "host-1", Guest: guest{}, DefaultPolicy: policy})
	if err != nil {
		t.Fatal(err)
	}
	return d, disks
}

func mounted(fsType, group string, flags ...string) *spec.VolumeCapability {
	return &spec.VolumeCapability{
		AccessMode: &spec.VolumeCapability_AccessMode{Mode: spec.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER},
		AccessType: &spec.VolumeCapability_Mount{Mount: &spec.VolumeCapability_MountVolume{FsType: fsType, MountFlags: flags, VolumeMountGroup: group}},
	}
}

// What the guest is told is in the record, and nothing is mounted.
func TestPublish(t *testing.T) {
	dir := t.TempDir()
	d, _ := newDriver(t, dir)
	made, err := d.CreateVolume(t.Context(), &spec.CreateVolumeRequest{Name: "pvc-1", CapacityRange: &spec.CapacityRange{RequiredBytes: 1 << 20}, VolumeCapabilities: []*spec.VolumeCapability{mounted("", "")}})
	if err != nil {
		t.Fatal(err)
	}
	id, target := made.Volume.VolumeId, filepath.Join(dir, "pods", "uid", "volumes", "mount")
	req := &spec.NodePublishVolumeRequest{VolumeId: id, TargetPath: target, VolumeCapability: mounted("xfs", "2000", "noatime"), Readonly: true}
	for range 2 {
		if _, err := d.NodePublishVolume(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	group := int64(2000)
	want := vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, FSGroup: &group, Disk: &vmpod.DiskRecord{
		VolumeID: id, FSType: "xfs", Options: []string{"noatime"}, ReadOnly: true,
	}}
	if got, ok, err := vmpod.ReadVolumeRecord(target); err != nil || !ok || !reflect.DeepEqual(got, want) {
		t.Errorf("record %+v (disk %+v), want %+v; %v", got, got.Disk, want.Disk, err)
	}
	req.Readonly = false
	if _, err := d.NodePublishVolume(t.Context(), req); status.Code(err) != codes.AlreadyExists {
		t.Errorf("published otherwise: %v", err)
	}
	stranger := filepath.Join(target, "precious")
	if err := os.WriteFile(stranger, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	unpublish := &spec.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target}
	if _, err := d.NodeUnpublishVolume(t.Context(), unpublish); err == nil {
		t.Error("a directory with a stranger in it was unpublished")
	}
	if err := os.Remove(stranger); err != nil {
		t.Fatalf("the stranger is gone: %v", err)
	}
	for range 2 {
		if _, err := d.NodeUnpublishVolume(t.Context(), unpublish); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(target); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// The disk of an inline volume is there while its pod is.
func TestInlineVolume(t *testing.T) {
	dir := t.TempDir()
	d, disks := newDriver(t, dir)
	handle, target := "csi-"+strings.Repeat("0a", 32), filepath.Join(dir, "mount")
	req := &spec.NodePublishVolumeRequest{VolumeId: handle, TargetPath: target, VolumeCapability: mounted("", ""),
		VolumeContext: map[string]string{"csi.storage.k8s.io/ephemeral": "true", "size": "2Mi", "policy": policy}}
	for range 2 {
		if _, err := d.NodePublishVolume(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if all, err := disks.List(t.Context()); err != nil || len(all) != 1 || all[0].Bytes != 2<<20 {
		t.Fatalf("%+v, %v", all, err)
	}
	if _, err := d.NodeUnpublishVolume(t.Context(), &spec.NodeUnpublishVolumeRequest{VolumeId: handle, TargetPath: target}); err != nil {
		t.Fatal(err)
	}
	if all, err := disks.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("%+v, %v", all, err)
	}
	req.VolumeContext = map[string]string{"csi.storage.k8s.io/ephemeral": "true", "policy": policy}
	if _, err := d.NodePublishVolume(t.Context(), req); status.Code(err) != codes.InvalidArgument {
		t.Errorf("without a size: %v", err)
	}
}

// What cannot be honoured is refused when the volume is made.
func TestRefused(t *testing.T) {
	d, _ := newDriver(t, t.TempDir())
	shared := mounted("", "")
	shared.AccessMode.Mode = spec.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER
	for name, req := range map[string]*spec.CreateVolumeRequest{
		"ReadWriteMany":        {VolumeCapabilities: []*spec.VolumeCapability{shared}},
		"btrfs":                {VolumeCapabilities: []*spec.VolumeCapability{mounted("btrfs", "")}},
		"nobarrier":            {VolumeCapabilities: []*spec.VolumeCapability{mounted("", "", "nobarrier")}},
		"an unknown policy":    {VolumeCapabilities: []*spec.VolumeCapability{mounted("", "")}, Parameters: map[string]string{"policy": "platinum"}},
		"an unknown policy id": {VolumeCapabilities: []*spec.VolumeCapability{mounted("", "")}, Parameters: map[string]string{"storagePolicyID": "x"}},
		"an unknown parameter": {VolumeCapabilities: []*spec.VolumeCapability{mounted("", "")}, Parameters: map[string]string{"typo": "x"}},
		"a secret":             {VolumeCapabilities: []*spec.VolumeCapability{mounted("", "")}, Secrets: map[string]string{"key": "k"}},
	} {
		req.Name = "v"
		_, err := d.CreateVolume(t.Context(), req)
		if code := status.Code(err); code != codes.InvalidArgument && !strings.Contains(err.Error(), "invalid argument") {
			t.Errorf("%s: %v", name, err)
		}
	}
	resp, err := d.GetCapacity(t.Context(), &spec.GetCapacityRequest{Parameters: map[string]string{"storagePolicyID": "x"}})
	if err != nil || resp.AvailableCapacity != 0 {
		t.Errorf("room for a policy that is not there: %v, %v", resp, err)
	}
}
