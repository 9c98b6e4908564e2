package cri

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestRecursiveReadOnly(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		mount *runtimeapi.Mount
		ok    bool
	}{
		"both":                {&runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true}, true},
		"read-only alone":     {&runtimeapi.Mount{Readonly: true}, true},
		"not read-only":       {&runtimeapi.Mount{RecursiveReadOnly: true}, false},
		"from the host":       {&runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}, false},
		"in both directions":  {&runtimeapi.Mount{Readonly: true, RecursiveReadOnly: true, Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}, false},
		"propagation, not ro": {&runtimeapi.Mount{Propagation: runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL}, true},
	} {
		c.mount.HostPath, c.mount.ContainerPath = dir, "/mnt"
		_, err := planMounts(mountRules{podUID: "uid"}, []*runtimeapi.Mount{c.mount})
		if c.ok && err != nil || !c.ok && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMemoryBelowACopiedDirectory(t *testing.T) {
	dir := t.TempDir()
	memory := filepath.Join(dir, "a", "memory")
	if err := os.MkdirAll(memory, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", memory, "tmpfs", 0, ""); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(memory, unix.MNT_DETACH) })
	for _, recursive := range []bool{false, true} {
		plan, err := planMounts(mountRules{podUID: "uid"}, []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/mnt", Readonly: true, RecursiveReadOnly: recursive}})
		if err != nil {
			t.Fatal(err)
		}
		if len(plan.mounts) != 2 || len(plan.reported) != 1 {
			t.Fatalf("%d mounts, %d reported; want 2 and the one that was asked for", len(plan.mounts), len(plan.reported))
		}
		if m := plan.mounts[1]; m.Destination != "/mnt/a/memory" || m.ReadOnly != recursive || !plan.mounts[0].ReadOnly {
			t.Errorf("recursive %v: %v below %v", recursive, m, plan.mounts[0])
		}
	}
}
