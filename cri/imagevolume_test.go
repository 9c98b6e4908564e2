package cri

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/openatoll/atoll/storage"
	"github.com/openatoll/atoll/vmpod"
)

// An image as a volume is one more disk, read-only whatever the client says.
func TestImageVolume(t *testing.T) {
	h := newFakeHost()
	h.images["atoll.local/data:1"] = storage.Image{ID: "sha256:data", Tags: []string{"atoll.local/data:1"}}
	s := serve(t, h, t.TempDir())
	sb := s.run(t)
	c := ctrConfig("main")
	c.Mounts = []*runtimeapi.Mount{
		{ContainerPath: "/data/", Image: &runtimeapi.ImageSpec{Image: "sha256:data", UserSpecifiedImage: "atoll.local/data:1"}},
		{ContainerPath: "/part", Image: &runtimeapi.ImageSpec{Image: "atoll.local/data:1"}, ImageSubPath: "some/dir", Readonly: true},
	}
	ctr := s.create(t, sb, c)
	mounts := h.guest(podUID).containers[ctr].req.Mounts
	var got []string
	for _, m := range mounts {
		if m.ImageDisk != "" {
			got = append(got, m.ImageDisk+" "+m.SubPath+" "+m.Destination)
			if !m.ReadOnly || m.Volume != "" {
				t.Errorf("mount %v", m)
			}
		}
	}
	if want := []string{"img-data  /data", "img-data some/dir /part"}; !slices.Equal(got, want) {
		t.Errorf("the guest mounts %q, want %q", got, want)
	}
	machines, _ := fakeDriver{h}.List(t.Context())
	disks := machines[0].Spec().Disks
	if n := len(slices.DeleteFunc(slices.Clone(disks), func(d vmpod.Disk) bool { return d.ID != "img-data" })); n != 1 {
		t.Errorf("the machine has the disk %d times: %v", n, disks)
	}
	if !slices.ContainsFunc(disks, func(d vmpod.Disk) bool { return d.ID == "img-data" && d.ReadOnly }) {
		t.Errorf("the disk is not read-only: %v", disks)
	}
	st := s.status(t, ctr)
	if len(st.Mounts) != 2 || !st.Mounts[0].Readonly || st.Mounts[0].Image.GetUserSpecifiedImage() != "atoll.local/data:1" || st.Mounts[1].ImageSubPath != "some/dir" {
		t.Errorf("status shows %v", st.Mounts)
	}

	// One that was not pulled: the kubelet knows the error by its first words.
	bad := ctrConfig("bad")
	bad.Mounts = []*runtimeapi.Mount{{ContainerPath: "/x", Image: &runtimeapi.ImageSpec{Image: "atoll.local/missing"}, Readonly: true}}
	_, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sb, Config: bad, SandboxConfig: podConfig(s.dir)})
	if status.Code(err) != codes.NotFound || !strings.HasPrefix(status.Convert(err).Message(), crierrors.ErrImageVolumeMountFailed.Error()) || !strings.Contains(err.Error(), "/x") {
		t.Errorf("a missing image: %v", err)
	}
	s.remove(t, sb)
	if left := h.left(); left != nil {
		t.Errorf("left behind: %v", left)
	}
}
