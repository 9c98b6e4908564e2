package cri

import (
	"strconv"
	"strings"
	"testing"

	"github.com/google/uuid"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

// TestRealGrowth resizes a pod on the real parts, through the death of the
// server that was about to.
func TestRealGrowth(t *testing.T) {
	h := newRealHost(t)
	s := h.serve(t)
	if _, err := s.img.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: h.busybox}}); err != nil {
		t.Fatal(err)
	}
	uid := uuid.NewString()
	config := podConfig(h.dir)
	config.Metadata.Uid, config.Labels[kubeletUIDLabel] = uid, uid
	hint := vmpod.Hint{Owner: vmpod.Owner{PodUID: uid, Namespace: "default", Name: "web"}, CPUs: 1, Memory: 300 * mib}
	if err := s.Prepare(t.Context(), hint); err != nil {
		t.Fatal(err)
	}
	r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	c := ctrConfig("main")
	c.Image.Image, c.Command = h.busybox, []string{"sleep", "3600"}
	c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 100000, MemoryLimitInBytes: 128 * mib}
	created, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: r.PodSandboxId, Config: c, SandboxConfig: config})
	if err != nil {
		t.Fatal(err)
	}
	ctr := created.ContainerId
	s.start(t, ctr)
	before := guestMemory(t, s, ctr)

	hint.Memory = 700 * mib
	if err := s.Resize(t.Context(), hint); err != nil {
		t.Fatal(err)
	}
	if err := s.resizePod(r.PodSandboxId, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 512 * mib}); err != nil {
		t.Fatal(err)
	}
	if err := s.resizeContainer(ctr, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 512 * mib}); err != nil {
		t.Fatal(err)
	}
	if by := guestMemory(t, s, ctr) - before; by < 392*mib || by > 400*mib {
		t.Errorf("the guest has grown by %d MiB, want 400", by/mib)
	}
	s.exec(t, ctr, "dd", "if=/dev/zero", "of=/dev/null", "bs=400M", "count=1")

	// The VM grows, and the server dies before the guest or the record knows.
	g := s.livePod(r.PodSandboxId).machine.(vmpod.Grower)
	max, err := g.Extent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Grow(t.Context(), max.MaxCPUs, 0); err != nil {
		t.Fatal(err)
	}
	s.stop()
	s = h.serve(t)
	eventually(t, "growth finished", func() bool {
		sb, _ := s.store.sandbox(r.PodSandboxId)
		return sb.CPUs == max.MaxCPUs && sb.Memory == 700*mib
	})
	if got := strings.TrimSpace(s.exec(t, ctr, "busybox", "nproc")); got != strconv.Itoa(max.MaxCPUs) {
		t.Errorf("the guest has %s CPUs, want %d", got, max.MaxCPUs)
	}
	s.remove(t, r.PodSandboxId)
	if left := h.left(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// guestMemory is MemTotal in bytes, as a container sees it.
func guestMemory(t *testing.T, s *testServer, ctr string) int64 {
	t.Helper()
	f := strings.Fields(s.exec(t, ctr, "grep", "MemTotal", "/proc/meminfo"))
	kib, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}
