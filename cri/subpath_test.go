package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// TestPrepareSubPath gives a pod its disk for a sub-path, before any container,
// and once: CreateContainer finds it there.
func TestPrepareSubPath(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	vol := claim(t, dir, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v1"}})
	sb := s.run(t)
	for range 2 {
		if err := s.PrepareSubPath(t.Context(), podUID, vol+"/logs/a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PrepareSubPath(t.Context(), podUID, vol); err != nil {
		t.Errorf("the volume itself: %v", err)
	}
	id := "disk-" + storage.DiskID("v1") + "/logs/a"
	if did, got := h.volumes.did(), h.guest(podUID).subPaths; did != "attach, plug, blank, format, mount" || !slices.Equal(got, []string{id, id}) {
		t.Fatalf("did %s; sub-paths %q", did, got)
	}
	s.create(t, sb, withMounts("main", &runtimeapi.Mount{ContainerPath: "/logs", HostPath: vol + "/logs/a"}))
	if did := h.volumes.did(); did != "" {
		t.Errorf("the container after it: %s", did)
	}
	s.remove(t, sb)
	if did := h.volumes.did(); did != "unmount, stop machine, detach, stop machine, remove machine" || h.volumes.held() != 0 {
		t.Errorf("the end: %s", did)
	}
}

// TestPrepareSubPathKinds goes through what the kubelet can ask of.
func TestPrepareSubPathKinds(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	pod := filepath.Join(dir, "kubelet/pods", podUID)
	volumes := pod + "/volumes/"
	for _, d := range []string{"kubernetes.io~empty-dir/scratch", "kubernetes.io~configmap/conf", "kubernetes.io~secret/keys", "kubernetes.io~projected/all", "kubernetes.io~csi/other/mount"} {
		if err := os.MkdirAll(volumes+d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s.run(t)
	for path, want := range map[string]string{ // what the guest is asked; "" nothing, "!" what it is refused for
		volumes + "kubernetes.io~empty-dir/scratch/a/b": "emptydir-scratch/a/b",
		volumes + "kubernetes.io~configmap/conf/key":    "configmap-conf/key",
		volumes + "kubernetes.io~secret/keys/key":       "secret-keys/key",
		volumes + "kubernetes.io~projected/all/key":     "projected-all/key",
		volumes + "kubernetes.io~csi/other/mount/a":     "", // CreateContainer says what is wrong with the volume
		volumes + "kubernetes.io~nfs/nfs/a":             "",
		"/srv/data/a":                                   "!hostPath.path",
		pod + "/containers/main/1":                      "!hostPath.path",
		pod + "/volumes":                                "!hostPath.path",
		volumes + "../../other/volumes/x/y/z":           "!hostPath.path",
	} {
		g := h.guest(podUID)
		g.subPaths = nil
		err := s.PrepareSubPath(t.Context(), podUID, path)
		refusal, refused := strings.CutPrefix(want, "!")
		switch {
		case refused:
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), refusal) {
				t.Errorf("%s: %v", path, err)
			}
		case err != nil || strings.Join(g.subPaths, " ") != want:
			t.Errorf("%s: asked for %q, %v", path, g.subPaths, err)
		}
	}
}

// TestPrepareSubPathErrors: the guest's word on the sub-path is the caller's
// error; all else CreateContainer shall tell, and what was begun goes with the
// sandbox.
func TestPrepareSubPathErrors(t *testing.T) {
	wrong := fmt.Errorf("sub-path \"a\" leads out of the volume: %w", errdefs.ErrInvalidArgument)
	for _, tc := range []struct {
		step string
		err  error
		want string
	}{
		{"sub-path", wrong, `sub-path "a" leads out of the volume: invalid argument`},
		{"sub-path", fmt.Errorf("full: %w", errdefs.ErrResourceExhausted), "full: resource exhausted"},
		{"sub-path", errors.New("input/output error"), "input/output error"},
		{"sub-path", fmt.Errorf("gone: %w", errdefs.ErrUnavailable), ""},
		{"attach disk", wrong, ""},
		{"add volume", wrong, ""},
	} {
		h := newFakeHost()
		dir := t.TempDir()
		s := serve(t, h, dir)
		vol := claim(t, dir, vmpod.VolumeRecord{Kind: vmpod.VolumeDisk, Disk: &vmpod.DiskRecord{VolumeID: "v1"}})
		sb := s.run(t)
		h.set(tc.step, tc.err)
		err := s.PrepareSubPath(t.Context(), podUID, vol+"/a")
		if text := fmt.Sprint(err); (err == nil) != (tc.want == "") || err != nil && text != tc.want {
			t.Errorf("%s fails with %v: %v", tc.step, tc.err, err)
		}
		h.set(tc.step, nil)
		if err := s.PrepareSubPath(t.Context(), podUID, vol+"/a"); err != nil {
			t.Errorf("%s is well again: %v", tc.step, err)
		}
		s.remove(t, sb)
		if h.volumes.held() != 0 {
			t.Errorf("%s: a disk is still held", tc.step)
		}
	}
}

// TestPrepareSubPathLeftAlone: without a sandbox, or with a guest that does not
// know the call, nothing is done.
func TestPrepareSubPathLeftAlone(t *testing.T) {
	h := newFakeHost()
	h.newGuest = func(g *fakeGuest) { g.features = nil }
	dir := t.TempDir()
	s := serve(t, h, dir)
	vol := filepath.Join(dir, "kubelet/pods", podUID, "volumes/kubernetes.io~empty-dir/scratch")
	if err := s.PrepareSubPath(t.Context(), podUID, vol+"/a"); err != nil {
		t.Errorf("without a sandbox: %v", err)
	}
	s.run(t)
	if err := s.PrepareSubPath(t.Context(), podUID, vol+"/a"); err != nil {
		t.Errorf("an old guest: %v", err)
	}
	if g := h.guest(podUID); len(g.volumes) != 0 || len(g.subPaths) != 0 {
		t.Errorf("an old guest has %v, %v", g.volumes, g.subPaths)
	}
}

// TestPrepareSubPathInTime: a guest that does not answer is waited for no
// longer than the caller wants, who is told.
func TestPrepareSubPathInTime(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	s.run(t)
	release := h.holdAt("sub-path")
	defer release()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	vol := filepath.Join(dir, "kubelet/pods", podUID, "volumes/kubernetes.io~empty-dir/scratch")
	if err := s.PrepareSubPath(ctx, podUID, vol+"/a"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), `"a"`) {
		t.Errorf("got %v", err)
	}
}
