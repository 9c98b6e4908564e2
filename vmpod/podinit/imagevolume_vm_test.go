package podinit

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/openatoll/atoll/vmpod/agentapi"
)

// TestImageVolume mounts an image's disk beside the root file system: whole
// and in part, never writable, executable, and with the pod's ids.
func TestImageVolume(t *testing.T) {
	vm := bootVM(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	g := guestOps{vm.attach(), t, ctx}
	r := setupRequest()
	r.Sysctls = nil
	r.UserNamespace = &agentapi.IDMap{First: 5000, Length: 65536}
	if _, err := g.SetupSandbox(ctx, r); err != nil {
		t.Fatal(err)
	}
	script := `cat /vol/etc/passwd; stat -c "%n %u:%g" /vol/etc/passwd; ls /part
/part/busybox true && echo executes
touch /vol/new || echo read-only`
	out, exit := g.run("a", ociSpec("sh", "-c", script), func(r *agentapi.CreateContainerRequest) {
		r.Mounts = []*agentapi.VolumeMount{
			{ImageDisk: "img", Destination: "/vol"},
			{ImageDisk: "img", SubPath: "bin", Destination: "/part"},
		}
	})
	for _, want := range []string{"root:x:0:0", "/vol/etc/passwd 0:0", "busybox", "executes", "Read-only file system", "read-only"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in:\n%s", want, out)
		}
	}
	if exit.ExitCode != 0 {
		t.Errorf("exit %v", exit)
	}
	spec, err := json.Marshal(ociSpec("true"))
	if err != nil {
		t.Fatal(err)
	}
	for sub, want := range map[string]func(error) bool{
		"not/there":  errdefs.IsNotFound,
		"etc/passwd": errdefs.IsInvalidArgument,
		"../..":      errdefs.IsInvalidArgument,
		"escape":     errdefs.IsInvalidArgument,
	} {
		_, err := g.CreateContainer(ctx, &agentapi.CreateContainerRequest{Id: "b", Spec: spec, ImageDisk: "img",
			Mounts: []*agentapi.VolumeMount{{ImageDisk: "img", SubPath: sub, Destination: "/vol"}}})
		if !want(err) {
			t.Errorf("sub-path %q: %v", sub, err)
		}
	}
}
