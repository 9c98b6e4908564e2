package cri

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

func TestLiveUpdate(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	vol := filepath.Join(dir, "kubelet/pods", podUID, "volumes/kubernetes.io~configmap/cfg")
	publish := func(version, value string) {
		os.MkdirAll(filepath.Join(vol, "..v"+version), 0o755)
		os.WriteFile(filepath.Join(vol, "..v"+version, "key"), []byte(value), 0o644)
		os.Symlink("..v"+version, filepath.Join(vol, "..data_tmp"))
		os.Rename(filepath.Join(vol, "..data_tmp"), filepath.Join(vol, "..data"))
		os.Symlink("..data/key", filepath.Join(vol, "key"))
	}
	publish("1", "old")
	c := ctrConfig("main")
	c.Mounts = []*runtimeapi.Mount{
		{ContainerPath: "/etc/cfg", HostPath: vol, Readonly: true},
		{ContainerPath: "/etc/one", HostPath: vol + "/key", Readonly: true},
	}
	sb := s.run(t)
	ctr := s.create(t, sb, c)
	g := h.guest(podUID)
	if m := g.containers[ctr].req.Mounts; m[0].Volume != "configmap-cfg" || !m[0].ReadOnly || m[1].SubPath != "key" {
		t.Fatalf("mounts %v", m)
	}
	tree := func() map[string]string { g.mu.Lock(); defer g.mu.Unlock(); return g.trees["configmap-cfg"] }
	if tr := tree(); tr["..v1/key"] != "old" || tr["..data"] != "-> ..v1" || tr["key"] != "-> ..data/key" {
		t.Fatalf("tree %v", tr)
	}
	publish("2", "new")
	eventually(t, "update sent", func() bool { return tree()["..data"] == "-> ..v2" && tree()["..v2/key"] == "new" })

	// Changed while the daemon is away.
	s.stop()
	publish("3", "newest")
	s = serve(t, h, dir)
	eventually(t, "update sent after restart", func() bool { return tree()["..v3/key"] == "newest" })
	s.remove(t, sb)
	if n := len(s.watch.volumes); n != 0 {
		t.Fatalf("%d volumes still followed", n)
	}
}

func TestVolumeUsageAndEmptyDir(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	vol := filepath.Join(dir, "kubelet/pods", podUID, "volumes/kubernetes.io~empty-dir/scratch")
	os.MkdirAll(vol, 0o755)
	gid := int64(2000)
	if err := vmpod.WriteVolumeRecord(vol, vmpod.VolumeRecord{Kind: "emptyDir", Medium: "Memory", SizeLimit: 1 << 20, FSGroup: &gid}); err != nil {
		t.Fatal(err)
	}
	c := ctrConfig("main")
	c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/scratch", HostPath: vol + "/a/b"}}
	s.create(t, s.run(t), c)
	g := h.guest(podUID)
	if v := g.volumes["emptydir-scratch"]; v.GetKind() != agentapi.AddVolumeRequest_TMPFS || v.SizeLimit != 1<<20 || !v.HasFsGroup || v.FsGroup != 2000 {
		t.Fatalf("volume %v", v)
	}
	u, err := s.VolumeUsage(t.Context(), podUID, vol)
	if err != nil || u.Bytes != 77 {
		t.Fatalf("usage %v, %v", u, err)
	}
	if _, err := s.VolumeUsage(t.Context(), podUID, "/elsewhere"); !errdefs.IsNotFound(err) {
		t.Fatalf("usage of nothing: %v", err)
	}
}
