package cri

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// claim publishes a volume as the CSI driver does, and returns its directory.
func claim(t *testing.T, dir string, rec vmpod.VolumeRecord) string {
	t.Helper()
	vol := filepath.Join(dir, "kubelet/pods", podUID, "volumes/kubernetes.io~csi/pvc-1/mount")
	if err := os.MkdirAll(vol, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := vmpod.WriteVolumeRecord(vol, rec); err != nil {
		t.Fatal(err)
	}
	return vol
}

func withMounts(name string, mounts ...*runtimeapi.Mount) *runtimeapi.ContainerConfig {
	c := ctrConfig(name)
	c.Mounts = mounts
	return c
}

// TestDiskOfAPod follows a blank disk through two pods.
func TestDiskOfAPod(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	group := int64(2000)
	s := serve(t, h, dir)
	vol := claim(t, dir, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, FSGroup: &group, Disk: &vmpod.DiskRecord{
		VolumeID: "ds.v1", Options: []string{"noatime"}, FSGroupChangePolicy: vmpod.FSGroupOnRootMismatch,
	}})
	sb := s.run(t)
	ctr := s.create(t, sb, withMounts("main", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol}, &runtimeapi.Mount{ContainerPath: "/logs", HostPath: vol + "/logs/a", Readonly: true}))
	if did := h.volumes.did(); did != "attach, plug, blank, format, mount" {
		t.Fatalf("first pod: %s", did)
	}
	g := h.guest(podUID)
	id := "disk-" + storage.DiskID("ds.v1")
	m := g.containers[ctr].req.Mounts
	if m[0].Volume != id || m[0].SubPath != "" || m[1].Volume != id || m[1].SubPath != "logs/a" || !m[1].ReadOnly {
		t.Errorf("mounts %v", m)
	}
	if v := g.volumes[id]; v.Disk.FsType != "ext4" || v.Disk.Options[0] != "noatime" || !v.HasFsGroup || v.FsGroup != 2000 || !v.Disk.FsGroupOnRootMismatch || v.Disk.Serial != storage.DiskID("ds.v1") {
		t.Errorf("volume %v", v)
	}
	s.start(t, ctr)
	s.create(t, sb, withMounts("other", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol}))
	if did := h.volumes.did(); did != "" {
		t.Errorf("a second container of the pod: %s", did)
	}
	if err := s.ExpandVolume(t.Context(), podUID, vol, 2<<30); err != nil {
		t.Fatal(err)
	}
	if did := h.volumes.did(); did != "resize to 2147483648, expand to 2147483648" {
		t.Errorf("expand: %s", did)
	}
	if err := s.ExpandVolume(t.Context(), podUID, vol+"2", 2<<30); !errdefs.IsNotFound(err) {
		t.Errorf("expand of what is not there: %v", err)
	}

	// The runtime is killed and comes back.
	s.stop()
	s = serve(t, h, dir)
	s.create(t, sb, withMounts("late", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol}))
	s.remove(t, sb)
	if did := h.volumes.did(); did != "unmount, stop machine, detach, stop machine, remove machine" {
		t.Errorf("the end: %s", did)
	}
	sb = s.run(t)
	s.create(t, sb, withMounts("main", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol}))
	if did := h.volumes.did(); did != "attach, plug, mount" {
		t.Errorf("the next pod: %s", did)
	}
	s.remove(t, sb)
	if h.volumes.held() != 0 {
		t.Error("a disk is still held")
	}
}

// TestDiskHalfMade fails every step of a disk's way once, with and without a
// restart before it is tried again or taken back.
func TestDiskHalfMade(t *testing.T) {
	for _, failing := range []string{"attach disk", "plug", "add volume", "make file system", "create"} {
		for _, restart := range []bool{false, true} {
			for _, again := range []bool{false, true} {
				h := newFakeHost()
				dir := t.TempDir()
				s := serve(t, h, dir)
				vol := claim(t, dir, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v1"}})
				c := withMounts("main", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol})
				sb := s.run(t)
				if failing == "plug" { // the image's disk is there by then
					s.create(t, sb, ctrConfig("first"))
				}
				h.set(failing, errors.New("injected"))
				if _, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sb, Config: c}); err == nil || !strings.Contains(err.Error(), "injected") {
					t.Fatalf("%s: %v", failing, err)
				}
				h.set(failing, nil)
				if restart {
					s.stop()
					s = serve(t, h, dir)
				}
				if again {
					s.create(t, sb, c)
					if n := h.volumes.formats[storage.DiskID("v1")]; n != 1 {
						t.Errorf("after %s: formatted %d times", failing, n)
					}
				}
				s.remove(t, sb)
				if h.volumes.held() != 0 {
					t.Errorf("after %s (restart %t, again %t): the disk is still held: %s", failing, restart, again, h.volumes.did())
				}
			}
		}
	}
}

// TestDiskIsHeldUntilTheMachineIsOff fails the end at every step.
func TestDiskIsHeldUntilTheMachineIsOff(t *testing.T) {
	for _, failing := range []string{"remove volume", "stop", "detach disk"} {
		for _, restart := range []bool{false, true} {
			h := newFakeHost()
			dir := t.TempDir()
			s := serve(t, h, dir)
			vol := claim(t, dir, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v1"}})
			sb := s.run(t)
			s.create(t, sb, withMounts("main", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol}))
			h.set(failing, errors.New("injected"))
			if _, err := s.rt.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: sb}); err == nil || !strings.Contains(err.Error(), "injected") {
				t.Fatalf("%s: %v", failing, err)
			}
			if h.volumes.held() != 1 {
				t.Errorf("%s failed, and the disk was given up", failing)
			}
			h.set(failing, nil)
			if restart {
				s.stop()
				s = serve(t, h, dir)
			}
			s.remove(t, sb)
			if h.volumes.held() != 0 {
				t.Errorf("after %s (restart %t): the disk is still held", failing, restart)
			}
		}
	}
}

// TestDiskOfALostSandbox loses the records: the machine is all that tells who
// has the disk.
func TestDiskOfALostSandbox(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	vol := claim(t, dir, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v1"}})
	sb := s.run(t)
	s.create(t, sb, withMounts("main", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol}))
	s.stop()
	if err := os.Remove(filepath.Join(dir, "cri/cri.db")); err != nil {
		t.Fatal(err)
	}
	s = serve(t, h, dir)
	h.volumes.did()
	if err := s.reclaim(t.Context(), vmpod.ID{PodUID: podUID}); err != nil {
		t.Fatal(err)
	}
	if did := h.volumes.did(); did != "stop machine, detach, remove machine" || h.volumes.held() != 0 {
		t.Errorf("taken back: %s", did)
	}
}

// TestDiskRefused wants volumes that no pod VM can have.
func TestDiskRefused(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	sb := s.run(t)
	try := func(rec vmpod.VolumeRecord) error {
		vol := claim(t, dir, rec)
		_, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sb, Config: withMounts("main", &runtimeapi.Mount{ContainerPath: "/data", HostPath: vol})})
		return err
	}
	for want, rec := range map[string]vmpod.VolumeRecord{
		"names no disk":     {Kind: vmpod.VolumeDisk},
		"CSI driver":        {Kind: "other"},
		"nobarrier":         {Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v", Options: []string{"nobarrier"}}},
		"raw block volume":  {Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v", Block: true}},
		"has no xfs":        {Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v", FSType: "xfs"}},
		"is in use by pod ": {Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "taken"}},
	} {
		if _, err := (fakeDisks{h}).Attach(t.Context(), "taken", storage.Holder{VM: "x", Host: "y"}, storage.AttachOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := try(rec); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	// A guest of an older version would take the disk for an empty directory.
	err := s.store.updateSandbox(sb, noEvent, func(sb *sandbox) { sb.Features = nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := try(vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v"}}); err == nil || !strings.Contains(err.Error(), "older version") {
		t.Errorf("an old guest: %v", err)
	}
}

// TestBlockDevices gives a container a raw volume, as the kubelet links to it.
func TestBlockDevices(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	published := filepath.Join(dir, "kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pvc-1", podUID)
	links := filepath.Join(dir, "kubelet/pods", podUID, "volumeDevices/kubernetes.io~csi")
	for _, d := range []string{filepath.Dir(published), links} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	link := filepath.Join(links, "pvc-1")
	if err := errors.Join(os.Symlink(published, link), os.Symlink("/dev/null", filepath.Join(links, "char")),
		vmpod.WriteBlockRecord(published, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v1", Block: true}})); err != nil {
		t.Fatal(err)
	}
	sb := s.run(t)
	c := ctrConfig("main")
	c.Devices = []*runtimeapi.Device{{HostPath: link, ContainerPath: "/dev/data", Permissions: "mrw"}}
	ctr := s.create(t, sb, c)
	if did := h.volumes.did(); did != "attach, plug, mount" {
		t.Errorf("%s", did)
	}
	g := h.guest(podUID)
	id := "disk-" + storage.DiskID("v1")
	if d := g.containers[ctr].req.Devices; len(d) != 1 || d[0].Volume != id || d[0].Path != "/dev/data" || d[0].Permissions != "mrw" {
		t.Errorf("devices %v", d)
	}
	if v := g.volumes[id]; v.Kind != agentapi.AddVolumeRequest_DISK || !v.Disk.Block || v.Disk.FsType != "" {
		t.Errorf("volume %v", v)
	}
	for path, why := range map[string]string{
		"/dev/fuse":                        "device of the node",
		filepath.Join(links, "char"):       "no block device",
		filepath.Join(links, "gone"):       "no such file",
		filepath.Join(links, "../../.."):   "device of the node",
		filepath.Join(dir, "kubelet/pods"): "device of the node",
	} {
		c := ctrConfig("bad")
		c.Devices = []*runtimeapi.Device{{HostPath: path, ContainerPath: "/dev/x", Permissions: "r"}}
		_, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sb, Config: c})
		if err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v, want %q", path, err, why)
		}
	}
	s.remove(t, sb)
	if did := h.volumes.did(); did != "unmount, stop machine, detach, stop machine, remove machine" {
		t.Errorf("the end: %s", did)
	}
}

// TestForeignBlockDevice gives a container a device that another driver has
// published: the VM gets it as it is.
func TestForeignBlockDevice(t *testing.T) {
	var device string
	for _, d := range []string{"/dev/vda", "/dev/sda", "/dev/nvme0n1", "/dev/loop0", "/dev/ram0"} {
		if fi, err := os.Stat(d); err == nil && fi.Mode()&(os.ModeDevice|os.ModeCharDevice) == os.ModeDevice {
			device = d // the fakes only name it
		}
	}
	if device == "" {
		t.Skip("no block device to name")
	}
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	link := filepath.Join(dir, "kubelet/pods", podUID, "volumeDevices/kubernetes.io~csi/pv")
	if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(device, link)); err != nil {
		t.Fatal(err)
	}
	sb := s.run(t)
	c := ctrConfig("main")
	c.Devices = []*runtimeapi.Device{{HostPath: link, ContainerPath: "/dev/data", Permissions: "r"}}
	s.create(t, sb, c)
	m, err := fakeDriver{h}.Open(t.Context(), vmpod.ID{PodUID: podUID})
	if err != nil {
		t.Fatal(err)
	}
	want := vmpod.Disk{ID: storage.DiskID(link), Path: device, ReadOnly: true}
	if !slices.ContainsFunc(m.Spec().Disks, want.Equal) {
		t.Errorf("the VM has %+v, want %+v", m.Spec().Disks, want)
	}
	s.remove(t, sb)
	if did := h.volumes.did(); did != "mount, unmount, stop machine, remove machine" {
		t.Errorf("what was done: %s", did)
	}
}
