package podinit

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/openatoll/atoll/vmpod/agentapi"
)

// TestUserNamespace is a pod whose root is nobody in the guest: what it may
// write belongs to it, in the image and in every kind of volume.
func TestUserNamespace(t *testing.T) {
	vm := bootVM(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	r := setupRequest()
	r.SharePid, r.Sysctls = true, nil
	r.UserNamespace = &agentapi.IDMap{First: 5000, Length: 65536}
	for range 2 {
		if _, err := g.SetupSandbox(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	var mounts []*agentapi.VolumeMount
	for id, v := range map[string]*agentapi.AddVolumeRequest{
		"disk":   {Kind: agentapi.AddVolumeRequest_EMPTY_DIR, HasFsGroup: true, FsGroup: 77},
		"memory": {Kind: agentapi.AddVolumeRequest_TMPFS},
		"tree":   {Kind: agentapi.AddVolumeRequest_TREE},
	} {
		v.Id = id
		if _, err := g.AddVolume(ctx, v); err != nil {
			t.Fatal(err)
		}
		mounts = append(mounts, &agentapi.VolumeMount{Volume: id, Destination: "/" + id})
	}
	if err := g.PutTree(ctx, "tree", treeTar(t, "..1", map[string]string{"secret": "of root"}, nil)); err != nil {
		t.Fatal(err)
	}
	script := `set -e
cat /proc/self/uid_map
for d in / /disk /memory; do touch $d/new; stat -c "%n %u:%g" $d/new; done
stat -c "%n %u:%g" /bin/busybox /disk /tree/secret
cat /tree/secret; echo
mknod /tmp/m b 1 1 2>/dev/null && echo made a device || true
httpd -p 80 && echo listens
ls -d /sys/class /dev/mqueue /sys/fs/cgroup/cgroup.procs`
	out, exit := g.run("a", ociSpec("sh", "-c", script), func(r *agentapi.CreateContainerRequest) { r.Mounts = mounts })
	t.Log(out)
	for _, want := range []string{"0       5000      65536", "/new 0:0", "/disk/new 0:77", "/memory/new 0:0", "/bin/busybox 0:0", "/disk 0:77", "/tree/secret 0:0", "of root", "listens", "/sys/class"} {
		if !strings.Contains(out, want) {
			t.Errorf("it lacks %q", want)
		}
	}
	if exit.ExitCode != 0 || strings.Contains(out, "made a device") {
		t.Errorf("exit %v", exit)
	}
	if out, exit := g.run("b", ociSpec("sh", "-c", "ps -o args | grep "+pauseName), nil); exit.ExitCode != 0 {
		t.Errorf("the pod's processes: %s", out)
	}
}
