package cri

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/storage/local"
	"github.com/openatoll/atoll/storage/mkfs"
	"github.com/openatoll/atoll/vmpod"
)

// A volumeRoom is a host with a datastore.
type volumeRoom struct {
	h     *realHost
	disks *local.Disks
	s     *testServer
	// command is what pods run.
	command []string
}

func newVolumeRoom(t *testing.T) *volumeRoom {
	r := &volumeRoom{h: newRealHost(t), command: []string{"sleep", "10000"}}
	key := filepath.Join(r.h.dir, "key")
	store := filepath.Join(r.h.dir, "datastore")
	for _, err := range []error{os.WriteFile(key, []byte("0123456789abcdef0123456789abcdef"), 0o600), os.MkdirAll(store, 0o700)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	r.disks, err = local.OpenDisks(t.Context(), local.DisksConfig{Host: "node-1", StateDir: filepath.Join(r.h.dir, "volumes"), Live: liveCopier{r.h.driver}, Datastores: []local.Datastore{{
		Name: "ds", Path: store, Policies: []local.DatastorePolicy{{Policy: storage.Policy{Name: "plain"}}, {Policy: storage.Policy{Name: "sealed", Encrypted: true}, KeyFile: key},
			{Policy: storage.Policy{Name: "slow", BytesPerSecond: 2 << 20}},
		},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	r.serve(t)
	if _, err := r.s.img.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: r.h.busybox}}); err != nil {
		t.Fatal(err)
	}
	return r
}

// liveCopier finds the VM that is to copy a volume, as spherelet does.
type liveCopier struct{ driver vmpod.Driver }

func (l liveCopier) CopyDisk(ctx context.Context, vm, diskID string, to *os.File, progress func(done, total int64)) error {
	id, err := vmpod.ParseID(vm)
	if err != nil {
		return err
	}
	m, err := l.driver.Open(ctx, id)
	if err != nil {
		return err
	}
	return m.(vmpod.DiskCopier).CopyDisk(ctx, diskID, to, progress)
}

func (r *volumeRoom) serve(t *testing.T) {
	maker, err := mkfs.New(filepath.Join(r.h.dir, "mkfs"))
	if err != nil {
		t.Fatal(err)
	}
	r.s = serve(t, newFakeHost(), r.h.dir, func(c *Config) {
		c.Driver, c.Network, c.Images, c.Ephemeral = r.h.driver, r.h.network, r.h.images, r.h.disks
		c.Disks, c.Formatter = r.disks, maker
	})
}

// claim makes a volume and publishes it for the pod.
func (r *volumeRoom) claim(t *testing.T, name, policy string, bytes int64, rec vmpod.DiskRecord) (id, dir string) {
	t.Helper()
	v, err := r.disks.Create(t.Context(), storage.Claim{Name: name, Bytes: bytes, Policy: policy})
	if err != nil {
		t.Fatal(err)
	}
	return v.ID, r.publish(t, name, v.ID, rec)
}

// publish gives the pod a volume that is there.
func (r *volumeRoom) publish(t *testing.T, name, id string, rec vmpod.DiskRecord) (dir string) {
	t.Helper()
	rec.VolumeID = id
	record := vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &rec}
	if rec.Block {
		dir = filepath.Join(r.h.dir, "kubelet/pods", podUID, "volumeDevices/kubernetes.io~csi", name)
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(r.h.dir, name)
		if err := vmpod.WriteBlockRecord(file, record); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(file, dir); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	dir = filepath.Join(r.h.dir, "kubelet/pods", podUID, "volumes/kubernetes.io~csi", name, "mount")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := vmpod.WriteVolumeRecord(dir, record); err != nil {
		t.Fatal(err)
	}
	return dir
}

// pod runs a pod, the attempt-th, with the volumes.
func (r *volumeRoom) pod(t *testing.T, attempt uint32, raw string, dirs ...string) (sandbox, ctr string) {
	t.Helper()
	config := podConfig(r.h.dir)
	config.Metadata.Attempt = attempt
	resp, err := r.s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	c := ctrConfig("main")
	c.Image.Image = r.h.busybox
	c.Command, c.LogPath = r.command, fmt.Sprintf("main/%d.log", attempt)
	for _, d := range dirs {
		c.Mounts = append(c.Mounts, &runtimeapi.Mount{ContainerPath: "/" + filepath.Base(filepath.Dir(d)), HostPath: d})
	}
	if raw != "" {
		c.Devices = []*runtimeapi.Device{{HostPath: raw, ContainerPath: "/dev/raw", Permissions: "mrw"}}
	}
	ctr = r.s.create(t, resp.PodSandboxId, c)
	r.s.start(t, ctr)
	return resp.PodSandboxId, ctr
}

func (r *volumeRoom) holders(t *testing.T, id string) int {
	t.Helper()
	hs, err := r.disks.Holders(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return len(hs)
}

// TestRealDisks keeps what pods write over a restart of the runtime, the end of
// a pod, and the death of a VM.
func TestRealDisks(t *testing.T) {
	r := newVolumeRoom(t)
	plain, dir := r.claim(t, "plain", "plain", 64<<20, vmpod.DiskRecord{})
	_, sealed := r.claim(t, "sealed", "sealed", 320<<20, vmpod.DiskRecord{FSType: "xfs"})
	_, raw := r.claim(t, "raw", "plain", 16<<20, vmpod.DiskRecord{Block: true})

	sb, ctr := r.pod(t, 0, raw, dir, sealed)
	r.s.exec(t, ctr, "sh", "-c", "echo not synced > /plain/note; echo secret > /sealed/note; echo raw > /dev/raw")
	r.s.stop()
	r.serve(t)
	grown, err := r.disks.Expand(t.Context(), plain, 512<<20)
	if err == nil {
		err = r.s.ExpandVolume(t.Context(), podUID, dir, grown.Bytes)
	}
	if err != nil {
		t.Fatal(err)
	}
	u, err := r.s.VolumeUsage(t.Context(), podUID, dir)
	if err != nil || u.CapacityBytes < 400<<20 || u.Bytes == 0 || u.InodesCapacity == 0 {
		t.Errorf("after it has grown: %+v, %v", u, err)
	}
	if _, err := r.disks.Attach(t.Context(), plain, storage.Holder{VM: "other", Host: "node-1"}, storage.AttachOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("another VM got the disk: %v", err)
	}
	r.s.remove(t, sb)
	if r.holders(t, plain) != 0 {
		t.Error("the disk is held after the pod is gone")
	}

	// The next VM dies; what it synced is there.
	sb, ctr = r.pod(t, 1, raw, dir, sealed)
	out := r.s.exec(t, ctr, "sh", "-c", "cat /plain/note /sealed/note; head -n 1 /dev/raw; echo synced > /plain/synced; echo synced > /sealed/synced; busybox sync")
	if out != "not synced\nsecret\nraw\n" {
		t.Errorf("the second pod reads %q", out)
	}
	m, err := r.h.driver.Open(t.Context(), vmpod.ID{PodUID: podUID, Attempt: 1})
	if err != nil {
		t.Fatal(err)
	}
	st, err := m.Status(t.Context())
	if err != nil || syscall.Kill(st.PID, syscall.SIGKILL) != nil {
		t.Fatal(err)
	}
	if _, err := m.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r.holders(t, plain) != 1 {
		t.Error("the disk was given up before the sandbox was stopped")
	}
	r.s.remove(t, sb)
	sb, ctr = r.pod(t, 2, raw, dir, sealed)
	if out := r.s.exec(t, ctr, "sh", "-c", "cat /plain/note /plain/synced /sealed/note /sealed/synced"); out != "not synced\nsynced\nsecret\nsynced\n" {
		t.Errorf("the third pod reads %q", out)
	}
	r.s.remove(t, sb)
	if left := r.h.left(t); len(left) > 0 || r.holders(t, plain) != 0 {
		t.Errorf("left: %v", strings.Join(left, ", "))
	}
}
