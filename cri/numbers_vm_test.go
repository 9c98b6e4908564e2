package cri

import (
	"context"
	"io"
	"math"
	"net/http"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/openatoll/atoll/vmpod"
)

// A numberedPod is a pod on the real parts with one container that sleeps.
type numberedPod struct {
	*testServer
	t       *testing.T
	sandbox string
	ctr     string
	image   string
}

func newNumberedPod(t *testing.T) *numberedPod {
	t.Helper()
	h := newRealHost(t)
	p := &numberedPod{testServer: h.serve(t), t: t, image: h.busybox}
	if _, err := p.img.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: h.busybox}}); err != nil {
		t.Fatal(err)
	}
	config := podConfig(h.dir)
	config.LogDirectory = h.dir + "/logs"
	r, err := p.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	p.sandbox = r.PodSandboxId
	c := ctrConfig("main")
	c.Image.Image = h.busybox
	c.Command = []string{"sleep", "3600"}
	c.Linux.Resources = &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 96 * mib, CpuPeriod: 100000, CpuQuota: 50000}
	p.ctr = p.create(t, p.sandbox, c)
	p.start(t, p.ctr)
	return p
}

func (p *numberedPod) cgroup(file string) string {
	return strings.TrimSpace(p.exec(p.t, p.ctr, "cat", "/sys/fs/cgroup/"+file))
}

func (p *numberedPod) keyed(file, key string) uint64 {
	for line := range strings.Lines(p.cgroup(file)) {
		if k, v, _ := strings.Cut(strings.TrimSpace(line), " "); k == key {
			n, _ := strconv.ParseUint(v, 10, 64)
			return n
		}
	}
	p.t.Fatalf("%s has no %s", file, key)
	return 0
}

// TestNumbers holds what the RPCs tell against what the guest's own files say.
// A figure that moves is read before and after, and lies in between; memory
// may move by what an exec takes.
func TestNumbers(t *testing.T) {
	p := newNumberedPod(t)
	const written = 5 << 20
	p.exec(t, p.ctr, "sh", "-c", "dd if=/dev/zero of=/file bs=1M count=5 2>/dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
	stats := func() *runtimeapi.ContainerStats {
		r, err := p.rt.ContainerStats(t.Context(), &runtimeapi.ContainerStatsRequest{ContainerId: p.ctr})
		if err != nil {
			t.Fatal(err)
		}
		return r.Stats
	}
	stats() // what is written is counted behind the first answer's back
	eventually(t, "the written file is counted", func() bool { return stats().WritableLayer.UsedBytes.GetValue() >= written })

	cpuBefore, faultsBefore := p.keyed("cpu.stat", "usage_usec"), p.keyed("memory.stat", "pgfault")
	time.Sleep(statsFresh) // until then, the answer from before these readings may be given again
	st := stats()
	cpuAfter, faultsAfter := p.keyed("cpu.stat", "usage_usec"), p.keyed("memory.stat", "pgfault")
	if got := st.Cpu.UsageCoreNanoSeconds.GetValue() / 1000; got < cpuBefore || got > cpuAfter || got == 0 {
		t.Errorf("CPU %d µs, the cgroup says %d to %d", got, cpuBefore, cpuAfter)
	}
	if got := st.Memory.PageFaults.GetValue(); got < faultsBefore || got > faultsAfter {
		t.Errorf("%d page faults, the cgroup says %d to %d", got, faultsBefore, faultsAfter)
	}
	current, _ := strconv.ParseUint(p.cgroup("memory.current"), 10, 64)
	working := current - p.keyed("memory.stat", "inactive_file")
	near := func(what string, got, want uint64) {
		t.Helper()
		if math.Abs(float64(got)-float64(want)) > 4<<20 {
			t.Errorf("%s %d, the cgroup says %d", what, got, want)
		}
	}
	near("memory", st.Memory.UsageBytes.GetValue(), current)
	near("working set", st.Memory.WorkingSetBytes.GetValue(), working)
	near("anonymous memory", st.Memory.RssBytes.GetValue(), p.keyed("memory.stat", "anon"))
	if got := st.Memory.AvailableBytes.GetValue(); got != 96*mib-st.Memory.WorkingSetBytes.GetValue() {
		t.Errorf("%d bytes are available", got)
	}
	if got := st.WritableLayer.UsedBytes.GetValue(); got < written || got > written+1<<20 || st.WritableLayer.InodesUsed.GetValue() == 0 {
		t.Errorf("writable layer %v after %d bytes were written", st.WritableLayer, written)
	}

	pod, err := p.rt.PodSandboxStats(t.Context(), &runtimeapi.PodSandboxStatsRequest{PodSandboxId: p.sandbox})
	if err != nil {
		t.Fatal(err)
	}
	machine := p.podUsage()
	// The pod's CPU is its QEMU's. A guest that is emulated on a busy host
	// takes waiting for work, so that its own figures may be larger.
	if got := pod.Stats.Linux.Cpu.UsageCoreNanoSeconds.GetValue(); got > machine.CPU || got < machine.CPU/2 {
		t.Errorf("the pod's CPU %d ns, its QEMU's %d ns", got, machine.CPU)
	}
	if n := pod.Stats.Linux.Process.ProcessCount.GetValue(); n != 1 {
		t.Errorf("%d processes", n)
	}
	p.checkNetwork(pod.Stats.Linux.Network)
	p.checkMetrics(written)
	p.remove(t, p.sandbox)
}

func (p *numberedPod) checkNetwork(n *runtimeapi.NetworkUsage) {
	p.t.Helper()
	rx, _ := strconv.ParseUint(strings.TrimSpace(p.exec(p.t, p.ctr, "cat", "/sys/class/net/eth0/statistics/rx_bytes")), 10, 64)
	if got := n.GetDefaultInterface(); got.GetName() != "eth0" || got.GetRxBytes().GetValue() > rx || rx-got.GetRxBytes().GetValue() > 64<<10 {
		p.t.Errorf("network %v, the guest says %d bytes received", n, rx)
	}
}

func (p *numberedPod) checkMetrics(written uint64) {
	p.t.Helper()
	list, err := p.rt.ListPodSandboxMetrics(p.t.Context(), &runtimeapi.ListPodSandboxMetricsRequest{})
	if err != nil || len(list.PodMetrics) != 1 || len(list.PodMetrics[0].ContainerMetrics) != 1 {
		p.t.Fatalf("metrics %v, %v", list, err)
	}
	got := map[string]uint64{}
	for _, m := range list.PodMetrics[0].ContainerMetrics[0].Metrics {
		got[m.Name] = m.Value.GetValue()
		if m.LabelValues[0] != "main" || m.LabelValues[5] != "web" {
			p.t.Errorf("%s has labels %q", m.Name, m.LabelValues)
		}
	}
	for name, want := range map[string]uint64{"container_spec_memory_limit_bytes": 96 * mib, "container_spec_cpu_quota": 50000, "container_processes": 1, "container_oom_events_total": 0} {
		if got[name] != want {
			p.t.Errorf("%s is %d, want %d", name, got[name], want)
		}
	}
	if fs := got["container_fs_usage_bytes"]; fs < written || got["container_fs_limit_bytes"] < fs || got["container_memory_usage_bytes"] == 0 {
		p.t.Errorf("metrics %v", got)
	}
}

// TestExecs: what is too much is left out, what is too long is killed in the
// guest, and a client that leaves takes its streams with it.
func TestExecs(t *testing.T) {
	p := newNumberedPod(t)
	big, err := p.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: p.ctr, Timeout: 120, Cmd: []string{"sh", "-c", "echo first >&2; dd if=/dev/zero bs=1M count=18 2>/dev/null; exit 3"}}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil || big.ExitCode != 3 || len(big.Stdout)+len(big.Stderr) != maxExecOutput {
		t.Errorf("18 MiB of output: %d and %d bytes, exit %d, %v; want %d in all and the exit code", len(big.GetStdout()), len(big.GetStderr()), big.GetExitCode(), err, maxExecOutput)
	}
	_, err = p.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: p.ctr, Timeout: 1, Cmd: []string{"sh", "-c", "exec sleep 777"}})
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("an exec over its time: %v", err)
	}
	processes := func() string { return p.exec(t, p.ctr, "ps", "-o", "args") }
	eventually(t, "killed in the guest", func() bool { return !strings.Contains(processes(), "sleep 777") })

	// One writes, one only listens to its input, one does neither: that one
	// has nothing to notice, and goes on.
	for mark, cmd := range map[string]string{"writer": "while true; do echo tick || exit; sleep 0.1; done; : writer", "reader": "cat; : reader", "quiet": "sleep 888; : quiet"} {
		r, err := p.rt.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: p.ctr, Cmd: []string{"sh", "-c", cmd}, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		leave := joinExec(t, r.Url)
		eventually(t, "it runs: "+cmd, func() bool { return strings.Contains(processes(), mark) })
		leave()
		if mark != "quiet" {
			eventually(t, "it has ended: "+cmd, func() bool { return !strings.Contains(processes(), mark) })
		} else if !strings.Contains(processes(), mark) {
			t.Errorf("%s was killed", cmd)
		}
	}
	p.remove(t, p.sandbox)
}

// joinExec opens an exec's streams over SPDY and returns how to leave.
func joinExec(t *testing.T, url string) (leave func()) {
	t.Helper()
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		t.Fatal(err)
	}
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodPost, url, nil)
	req.Header.Set(httpstream.HeaderProtocolVersion, remotecommand.StreamProtocolV4Name)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := rt.NewConnection(resp)
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{remotecommand.StreamTypeError, remotecommand.StreamTypeStdin, remotecommand.StreamTypeStdout} {
		s, err := conn.CreateStream(http.Header{remotecommand.StreamType: {kind}})
		if err != nil {
			t.Fatal(err)
		}
		if kind == remotecommand.StreamTypeStdout {
			go io.Copy(io.Discard, s)
		}
	}
	return func() { conn.Close() }
}

// TestRemoveImageInUse: the name goes at once, as with other runtimes; what
// runs from it goes on, and the disk goes with the last pod.
func TestRemoveImageInUse(t *testing.T) {
	p := newNumberedPod(t)
	ctx := context.Background()
	if _, err := p.img.RemoveImage(ctx, &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: p.image}}); err != nil {
		t.Fatal(err)
	}
	st, err := p.img.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: p.image}})
	if err != nil || st.Image != nil {
		t.Errorf("status of what was removed: %v, %v", st, err)
	}
	disks := func() []string {
		d, _ := filepath.Glob(p.dir + "/images/disks/*.erofs")
		return d
	}
	if len(disks()) != 1 {
		t.Errorf("disks %q while it is in use", disks())
	}
	if got := p.exec(t, p.ctr, "sh", "-c", "echo 3 >/dev/null; cat /bin/busybox | wc -c"); strings.TrimSpace(got) == "0" {
		t.Errorf("the container reads %q", got)
	}
	c := ctrConfig("second")
	c.Image.Image = p.image
	_, err = p.rt.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: c, SandboxConfig: podConfig(p.dir)})
	if status.Code(err) != codes.NotFound {
		t.Errorf("a container of what was removed: %v", err)
	}
	p.remove(t, p.sandbox)
	eventually(t, "the disk is gone", func() bool { return len(disks()) == 0 })
}

// podUsage is what the pod's machine costs this host, VMM included.
func (p *numberedPod) podUsage() vmpod.Usage {
	p.t.Helper()
	m, ok := p.livePod(p.sandbox).machine.(vmpod.Meter)
	if !ok {
		p.t.Fatal("the hypervisor does not tell what a machine costs")
	}
	usage, err := m.Usage(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	return usage
}
