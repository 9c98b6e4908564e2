package cri

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// hostTree is an allowed directory, one in it that is only to be read, and one
// outside, with links from the first to both.
func hostTree(t *testing.T) (rules mountRules, open, kept, outside string) {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	open, kept, outside = filepath.Join(base, "open"), filepath.Join(base, "open", "kept"), filepath.Join(base, "outside")
	for _, d := range []string{kept, outside} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{filepath.Join(open, "out"): outside, filepath.Join(outside, "in"): open} {
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(open, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return mountRules{podUID: podUID, shared: []vmpod.HostDirectory{{Path: open}, {Path: kept, ReadOnly: true}}}, open, kept, outside
}

func TestHostDirectories(t *testing.T) {
	rules, open, kept, outside := hostTree(t)
	l, err := net.Listen("unix", filepath.Join(open, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const follow, both = runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	for _, tt := range []struct {
		name    string
		mount   *runtimeapi.Mount
		userns  bool
		share   vmpod.Share // less its ID
		sub     string
		refused string
	}{
		{name: "a directory", mount: &runtimeapi.Mount{HostPath: open}, share: vmpod.Share{Path: open}},
		{name: "by a link", mount: &runtimeapi.Mount{HostPath: outside + "/in/"}, share: vmpod.Share{Path: open}},
		{name: "a file", mount: &runtimeapi.Mount{HostPath: open + "/file", Readonly: true}, share: vmpod.Share{Path: open + "/file", ReadOnly: true}, sub: "file"},
		{name: "followed", mount: &runtimeapi.Mount{HostPath: open, Propagation: follow}, share: vmpod.Share{Path: open, Follow: true}},
		{name: "kept", mount: &runtimeapi.Mount{HostPath: kept, Readonly: true}, share: vmpod.Share{Path: kept, ReadOnly: true, RecursiveReadOnly: true}},
		{name: "kept, to be written", mount: &runtimeapi.Mount{HostPath: kept}, refused: "hostDirectories"},
		{name: "kept, followed", mount: &runtimeapi.Mount{HostPath: kept, Readonly: true, Propagation: follow}, refused: "hostDirectories"},
		{name: "in both directions", mount: &runtimeapi.Mount{HostPath: open, Propagation: both}, refused: "HOST_TO_CONTAINER"},
		{name: "a socket", mount: &runtimeapi.Mount{HostPath: open + "/s"}, refused: "socket"},
		{name: "mapped users", mount: &runtimeapi.Mount{HostPath: open}, userns: true, refused: "user namespace"},
	} {
		for _, kubelet := range []bool{false, true} {
			r := rules
			r.userNamespace, r.fromKubelet = tt.userns, kubelet
			tt.mount.ContainerPath = "/mnt"
			plan, err := planMounts(r, []*runtimeapi.Mount{tt.mount})
			if tt.refused != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("%s: %v, want a refusal that says %q", tt.name, err, tt.refused)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
				continue
			}
			v := plan.volumes[0]
			got := *v.Share
			got.ID = ""
			if v.Kind != agentapi.AddVolumeRequest_SHARE || got != tt.share || plan.mounts[0].SubPath != tt.sub || plan.mounts[0].ReadOnly != tt.mount.Readonly ||
				plan.reported[0].Readonly != tt.mount.Readonly || plan.reported[0].HostPath != tt.mount.HostPath {
				t.Errorf("%s: %+v of %+v", tt.name, plan.mounts[0], got)
			}
		}
	}
}

// What is not allowed is copied, or refused, as if nothing were.
func TestOutsideHostDirectories(t *testing.T) {
	rules, open, _, outside := hostTree(t)
	for _, path := range []string{outside, open + "/out"} {
		m := []*runtimeapi.Mount{{HostPath: path, ContainerPath: "/mnt"}}
		plan, err := planMounts(rules, m)
		if err != nil || plan.volumes[0].Share != nil || !plan.mounts[0].ReadOnly {
			t.Errorf("%s: %+v, %v, want a copy", path, plan, err)
		}
		r := rules
		r.fromKubelet = true
		if _, err := planMounts(r, m); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "hostDirectories") {
			t.Errorf("%s of a kubelet's pod: %v", path, err)
		}
	}
	r := rules
	r.kubeletRoot = open + "/kubelet" // never allowed, but if it were
	if err := os.Mkdir(r.kubeletRoot, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := planMounts(r, []*runtimeapi.Mount{{HostPath: r.kubeletRoot, ContainerPath: "/mnt"}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("the kubelet's: %v", err)
	}
}

// Shares of different modes are different, equal ones are one.
func TestShareIDs(t *testing.T) {
	rules, open, _, _ := hostTree(t)
	plan, err := planMounts(rules, []*runtimeapi.Mount{
		{HostPath: open, ContainerPath: "/a"}, {HostPath: open, ContainerPath: "/b"}, {HostPath: open, ContainerPath: "/c", Readonly: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	a, b, c := plan.mounts[0], plan.mounts[1], plan.mounts[2]
	if a.Volume != b.Volume || a.Volume == c.Volume || len(plan.volumes[0].Share.ID) > 20 {
		t.Errorf("volumes %s, %s, %s", a.Volume, b.Volume, c.Volume)
	}
}

func TestMountsBelowASharedDirectory(t *testing.T) {
	rules, open, _, _ := hostTree(t)
	inner := filepath.Join(open, "inner")
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", inner, "tmpfs", 0, ""); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(inner, unix.MNT_DETACH) })
	for _, tt := range []struct{ readOnly, recursive, apart bool }{{false, false, false}, {true, false, true}, {true, true, false}} {
		plan, err := planMounts(rules, []*runtimeapi.Mount{{HostPath: open, ContainerPath: "/mnt", Readonly: tt.readOnly, RecursiveReadOnly: tt.recursive}})
		if err != nil {
			t.Fatal(err)
		}
		if apart := len(plan.mounts) == 2; apart != tt.apart || len(plan.reported) != 1 {
			t.Errorf("%+v: %v", tt, plan.mounts)
		} else if m := plan.mounts[len(plan.mounts)-1]; apart && (m.ReadOnly || m.SubPath != "inner" || m.Destination != "/mnt/inner") {
			t.Errorf("%+v: %v", tt, m)
		}
	}
}
