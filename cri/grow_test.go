package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

// What a fake machine can grow to.
const (
	fakeMaxCPUs   = 4
	fakeMaxMemory = 4 << 30
)

func (m *fakeMachine) Grow(ctx context.Context, cpus int, memory int64) error {
	if err := m.host.at(ctx, "grow"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if cpus > fakeMaxCPUs || memory > fakeMaxMemory {
		return fmt.Errorf("%d CPUs, %d bytes: %w", cpus, memory, errdefs.ErrResourceExhausted)
	}
	m.spec.CPUs, m.spec.Memory = max(m.spec.CPUs, cpus), max(m.spec.Memory, memory)
	return nil
}

func (m *fakeMachine) Extent(ctx context.Context) (vmpod.Extent, error) {
	if err := m.host.at(ctx, "extent"); err != nil {
		return vmpod.Extent{}, err
	}
	s := m.Spec()
	return vmpod.Extent{CPUs: s.CPUs, Memory: s.Memory, MaxCPUs: fakeMaxCPUs, MaxMemory: fakeMaxMemory}, nil
}

// wantSize checks what the machine, the record and the guest have.
func (s *testServer) wantSize(t *testing.T, sandbox string, cpus int, memory int64, onlines int) {
	t.Helper()
	sb, _ := s.store.sandbox(sandbox)
	m := s.livePod(sandbox).machine.(*fakeMachine)
	if v := m.Spec(); v.CPUs != cpus || v.Memory != memory || sb.CPUs != cpus || sb.Memory != memory {
		t.Errorf("machine %d CPUs, %d MiB, record %d, %d; want %d, %d", v.CPUs, v.Memory/mib, sb.CPUs, sb.Memory/mib, cpus, memory/mib)
	}
	m.guest.mu.Lock()
	defer m.guest.mu.Unlock()
	if n := len(m.guest.online); n != onlines || n > 0 && (m.guest.online[n-1].Cpus != int32(cpus) || m.guest.online[n-1].Memory != memory) {
		t.Errorf("guest was told %v, want %d times, of %d CPUs and %d bytes at last", m.guest.online, onlines, cpus, memory)
	}
}

func (s *testServer) resizePod(sandbox string, res *runtimeapi.LinuxContainerResources) error {
	_, err := s.rt.UpdatePodSandboxResources(s.t.Context(), &runtimeapi.UpdatePodSandboxResourcesRequest{PodSandboxId: sandbox, Resources: res})
	return err
}

func (s *testServer) resizeContainer(ctr string, res *runtimeapi.LinuxContainerResources) error {
	_, err := s.rt.UpdateContainerResources(s.t.Context(), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: ctr, Linux: res})
	return err
}

// TestGrowByCRI: a client that sends no hints, as crictl and stock kubelets.
func TestGrowByCRI(t *testing.T) {
	s := serve(t, newFakeHost(), t.TempDir())
	sb := s.run(t)
	ctr := s.create(t, sb, ctrConfig("main"))
	s.start(t, ctr)
	first := defaultMemory + defaultGuestOverhead(defaultMemory)
	s.wantSize(t, sb, 1, first, 0)

	if err := s.resizePod(sb, &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, MemoryLimitInBytes: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	grown := int64(1<<30) + defaultGuestOverhead(1<<30)
	s.wantSize(t, sb, 2, grown, 1)
	// Less, the same, and what fits: nothing happens.
	for _, res := range []*runtimeapi.LinuxContainerResources{
		{CpuPeriod: 100000, CpuQuota: 50000, MemoryLimitInBytes: 64 * mib}, {CpuShares: 1000}, nil,
		{CpuQuota: -1, CpuPeriod: 100000, MemoryLimitInBytes: -1 - 96*mib},
	} {
		if err := s.resizePod(sb, res); err != nil {
			t.Errorf("%v: %v", res, err)
		}
	}
	if err := s.resizeContainer(ctr, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 1 << 30}); err != nil {
		t.Error(err)
	}
	s.wantSize(t, sb, 2, grown, 1)
	// A container alone may be what does not fit.
	if err := s.resizeContainer(ctr, &runtimeapi.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 300000}); err != nil {
		t.Error(err)
	}
	s.wantSize(t, sb, 3, grown, 2)
	// And what cannot be is refused, and changes nothing.
	for _, res := range []*runtimeapi.LinuxContainerResources{{MemoryLimitInBytes: 8 << 30}, {CpuPeriod: 100000, CpuQuota: 500000}} {
		if err := s.resizePod(sb, res); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("pod, %v: %v, want ResourceExhausted", res, err)
		}
		if err := s.resizeContainer(ctr, res); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("container, %v: %v, want ResourceExhausted", res, err)
		}
	}
	if r := s.status(t, ctr).Resources.Linux; r.MemoryLimitInBytes != 1<<30 || r.CpuQuota != 300000 {
		t.Errorf("a refused update has changed the record: %v", r)
	}
	s.wantSize(t, sb, 3, grown, 2)
}

// TestGrowByHint: the hint counts the whole pod, and caps it by the host.
func TestGrowByHint(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	hint := vmpod.Hint{Owner: vmpod.Owner{PodUID: podUID, Name: "web"}, CPUs: 1, Memory: 300 * mib}
	if err := s.Resize(t.Context(), hint); err != nil || len(s.hints) > 0 {
		t.Errorf("Resize of a pod without a VM: %v, %v", err, s.hints)
	}
	s.Prepare(t.Context(), hint)
	sb := s.run(t)
	ctr := s.create(t, sb, ctrConfig("main"))
	s.start(t, ctr)

	hint.CPUs, hint.Memory = 2, 700*mib
	s.Resize(t.Context(), hint)
	s.wantSize(t, sb, 1, 300*mib, 0) // only said, not done
	// A larger request has no field in CRI; and the limit is beyond the host.
	if err := s.resizeContainer(ctr, &runtimeapi.LinuxContainerResources{CpuShares: 2048, CpuPeriod: 100000, CpuQuota: 800000, MemoryLimitInBytes: 64 << 30}); err != nil {
		t.Fatal(err)
	}
	s.wantSize(t, sb, 2, 700*mib, 1)

	// The kubelet asks again until the guest has taken it.
	hint.Memory = 900 * mib
	s.Resize(t.Context(), hint)
	h.set("online", errors.New("the guest has 1 of 2"))
	for range 2 {
		if err := s.resizePod(sb, &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 800 * mib}); err == nil || !strings.Contains(err.Error(), "the guest has 1 of 2") {
			t.Fatalf("a guest that does not take it: %v", err)
		}
	}
	if r, _ := s.store.sandbox(sb); r.Memory != 700*mib {
		t.Errorf("recorded before the guest had it: %d MiB", r.Memory/mib)
	}
	// A new server finds the machine larger than its record, and finishes.
	s.stop()
	h.set("online", nil)
	s = serve(t, h, dir)
	eventually(t, "growth finished", func() bool { r, _ := s.store.sandbox(sb); return r.Memory == 900*mib })
	s.wantSize(t, sb, 2, 900*mib, 2)

	// A container that is restarted for its resize.
	hint.Memory = 1000 * mib
	s.Resize(t.Context(), hint)
	s.create(t, sb, ctrConfig("side"))
	s.wantSize(t, sb, 2, 1000*mib, 3)
	// The hint lasts as long as the pod: the next sandbox begins with it.
	if r, _ := s.store.sandbox(sb); r.Hint == nil || r.Hint.Memory != 1000*mib {
		t.Errorf("recorded hint %+v", r.Hint)
	}
	// Growth that fails keeps no container from being made.
	hint.Memory = 8 << 30
	s.Resize(t.Context(), hint)
	s.create(t, sb, ctrConfig("third"))
	if err := s.resizePod(sb, nil); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("more than the machine can have: %v", err)
	}
}

func TestCanResize(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	hint := vmpod.Hint{Owner: vmpod.Owner{PodUID: podUID}, CPUs: 1, Memory: 300 * mib}
	with := func(cpus int, memory int64) vmpod.Hint {
		h := hint
		h.CPUs, h.Memory = cpus, memory
		return h
	}
	if err := s.CanResize(t.Context(), with(99, 1<<50)); err != nil {
		t.Errorf("a pod without a VM: %v", err)
	}
	s.run(t)
	for name, c := range map[string]struct {
		hint vmpod.Hint
		want string
	}{
		"smaller":         {with(1, 64*mib), ""},
		"as large as can": {with(fakeMaxCPUs, fakeMaxMemory), ""},
		"too many CPUs":   {with(fakeMaxCPUs+1, 0), "can have 4 at most: recreate"},
		"too much memory": {with(1, fakeMaxMemory+1), "can have 4096 at most: recreate"},
	} {
		err := s.CanResize(t.Context(), c.hint)
		if c.want == "" && err != nil || c.want != "" && (!errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	defer h.holdAt("extent")()
	if err := s.CanResize(t.Context(), with(99, 0)); err != nil {
		t.Errorf("a hypervisor that does not answer in time: %v", err)
	}
}

// TestUsageForResize: what a kubelet compares a pod's lower limit with is what
// its containers use.
func TestUsageForResize(t *testing.T) {
	s := serve(t, newFakeHost(), t.TempDir())
	sb := s.run(t)
	for _, name := range []string{"a", "b"} {
		s.start(t, s.create(t, sb, ctrConfig(name)))
	}
	r, err := s.rt.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: sb})
	if err != nil {
		t.Fatal(err)
	}
	if m := r.Stats.Linux.Memory; m.UsageBytes.GetValue() != 100 || m.WorkingSetBytes.GetValue() != 100 {
		t.Errorf("usage %v of two containers of 50, working set %v of a guest of 100", m.UsageBytes, m.WorkingSetBytes)
	}
}
