package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/storage/local"
	"github.com/openatoll/atoll/vmpod"
)

// Promised in docs/spec.md: how soon a fault is told.
const (
	noticed     = 10 * time.Second
	hungNoticed = 30 * time.Second
)

// A faultRoom is a host with a victim and a neighbour, both on disks whose
// file system can be filled.
type faultRoom struct {
	*testServer
	h      *realHost
	disks  string // a tmpfs
	victim faultPod
	near   faultPod

	mu   sync.Mutex
	told []vmpod.Fault
}

type faultPod struct {
	uid, sandbox, main string
	config             *runtimeapi.PodSandboxConfig
	pid                int
}

func newFaultRoom(t *testing.T) *faultRoom {
	h := newRealHost(t)
	r := &faultRoom{h: h, disks: h.dir + "/small"}
	if err := os.Mkdir(r.disks, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("atoll-test", r.disks, "tmpfs", 0, "size=512m,mode=711"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(r.disks, unix.MNT_DETACH) })
	disks, err := local.NewEphemeral(local.Config{Dir: r.disks + "/d"})
	if err != nil {
		t.Fatal(err)
	}
	h.disks = disks
	r.testServer = h.serve(t)
	r.Faults(func(f vmpod.Fault) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.told = append(r.told, f)
	})
	if _, err := r.img.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: h.busybox}}); err != nil {
		t.Fatal(err)
	}
	return r
}

// pod runs a pod whose privileged main container logs a line each 200 ms.
func (r *faultRoom) pod(t *testing.T, uid string, attempt uint32) faultPod {
	t.Helper()
	p := faultPod{uid: uid, config: podConfig(r.h.dir)}
	p.config.Metadata.Uid, p.config.Metadata.Name, p.config.Metadata.Attempt = uid, uid, attempt
	p.config.Labels[kubeletUIDLabel] = uid
	p.config.LogDirectory = filepath.Join(r.h.dir, "logs", fmt.Sprint(uid, attempt))
	if attempt == 0 {
		// A full disk on a tmpfs must fit into QEMU's cgroup beside RAM and overhead.
		r.Prepare(t.Context(), vmpod.Hint{Owner: vmpod.Owner{PodUID: uid}, CPUs: 1, Memory: 224 * mib, EphemeralBytes: 64 * mib, Images: []string{r.h.busybox}})
	}
	resp, err := r.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		t.Fatal(err)
	}
	p.sandbox = resp.PodSandboxId
	p.main = r.container(t, p, "main", `i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.2; done`)
	p.pid = r.vmmOf(t, p).PID
	return p
}

func (r *faultRoom) container(t *testing.T, p faultPod, name, script string) string {
	t.Helper()
	scratch := filepath.Join(r.h.dir, "kubelet/pods", p.uid, "volumes/kubernetes.io~empty-dir/scratch")
	os.MkdirAll(scratch, 0o755)
	c := ctrConfig(name)
	c.Image.Image = r.h.busybox
	c.Command = []string{"sh", "-c", script}
	c.Linux.SecurityContext.Privileged = true
	c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/scratch", HostPath: scratch}, {ContainerPath: "/tools", HostPath: hogTools(t, filepath.Join(r.h.dir, "kubelet/pods", p.uid))}}
	resp, err := r.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: p.sandbox, Config: c, SandboxConfig: p.config})
	if err != nil {
		t.Fatal(err)
	}
	r.start(t, resp.ContainerId)
	return resp.ContainerId
}

// hogTools is a volume of the pod in dir with a chrt that needs nothing else.
func hogTools(t *testing.T, dir string) string {
	t.Helper()
	tools := filepath.Join(dir, "volumes/kubernetes.io~configmap/tools")
	os.MkdirAll(tools, 0o755)
	for _, f := range []string{"/usr/bin/chrt", "/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"} {
		b, err := os.ReadFile(f)
		if err == nil {
			err = os.WriteFile(filepath.Join(tools, filepath.Base(f)), b, 0o755)
		}
		if err != nil {
			t.Skipf("needs util-linux's chrt: %v", err)
		}
	}
	return tools
}

// vmmOf is what inspectp shows of the VM.
func (r *faultRoom) vmmOf(t *testing.T, p faultPod) sandboxView {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	resp, err := r.rt.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var v sandboxView
	if err := json.Unmarshal([]byte(resp.Info["info"]), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func (r *faultRoom) state(t *testing.T, p faultPod) runtimeapi.PodSandboxState {
	t.Helper()
	resp, err := r.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Status.State
}

// expect waits until a fault of this reason is told of the pod, and logs how
// long that took since began.
func (r *faultRoom) expect(t *testing.T, p faultPod, reason string, cleared bool, began time.Time, limit time.Duration) vmpod.Fault {
	t.Helper()
	for {
		r.mu.Lock()
		for _, f := range r.told {
			if f.PodUID == p.uid && f.Reason == reason && f.Cleared == cleared && f.At.After(began) {
				r.mu.Unlock()
				if took := f.At.Sub(began); took > limit {
					t.Errorf("%s (cleared: %v) was told after %s, promised within %s", reason, cleared, took, limit)
				} else {
					t.Logf("%s (cleared: %v) told after %s: %s", reason, cleared, took.Round(10*time.Millisecond), f.Message)
				}
				return f
			}
		}
		r.mu.Unlock()
		if time.Since(began) > max(limit, time.Minute) {
			t.Fatalf("%s (cleared: %v) is never told", reason, cleared)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// conditions are Status's that are not met.
func (r *faultRoom) conditions(t *testing.T) string {
	t.Helper()
	resp, err := r.rt.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, c := range resp.Status.Conditions {
		if !c.Status {
			out = append(out, c.Type+"="+c.Reason)
		}
	}
	return strings.Join(out, " ")
}

// neighbour fails unless the other pod lives on as before.
func (r *faultRoom) neighbour(t *testing.T) {
	t.Helper()
	began := time.Now()
	r.exec(t, r.near.main, "true")
	took := time.Since(began)
	v := r.vmmOf(t, r.near)
	if v.PID != r.near.pid || v.State != vmpod.StateRunning || r.state(t, r.near) != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("the neighbour is touched: %+v, pid was %d", v, r.near.pid)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, f := range r.told {
		if f.PodUID == r.near.uid {
			t.Errorf("the neighbour was told to have %+v", f)
		}
	}
	if s := r.status(t, r.near.main); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the neighbour's container: %v", s)
	}
	t.Logf("the neighbour answers an exec in %s", took.Round(time.Millisecond))
}

// TestFaults breaks one pod in every way that a VM can break, and looks each
// time how soon that is told, with which reason, and what its neighbour feels.
func TestFaults(t *testing.T) {
	r := newFaultRoom(t)
	r.near = r.pod(t, "near-0001", 0)
	r.victim = r.pod(t, "victim-0001", 0)
	t.Run("host disk full", r.hostDiskFull)
	t.Run("own disk full", r.ownDiskFull)
	t.Run("guest out of memory", r.guestOOM)
	t.Run("VMM stopped", r.vmmStopped)
	t.Run("agent hung", r.agentHung)
	r.victim = r.pod(t, "victim-0001", 1)
	t.Run("guest panic", r.guestPanic)
	t.Run("VMM killed", r.vmmKilled)
	for _, sandbox := range r.store.allSandboxes() {
		r.remove(t, sandbox.ID)
	}
	if left := r.h.left(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// resize changes the disks' file system so that it has this much left.
func (r *faultRoom) resize(t *testing.T, free int64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(r.disks, &st); err != nil {
		t.Fatal(err)
	}
	size := int64(st.Blocks-st.Bfree)*st.Bsize + free
	if err := unix.Mount("", r.disks, "", unix.MS_REMOUNT, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
}

func (r *faultRoom) hostDiskFull(t *testing.T) {
	r.resize(t, 4<<20)
	began := time.Now()
	got := r.exec(t, r.victim.main, "sh", "-c", "dd if=/dev/zero of=/scratch/big bs=1M count=16 conv=fsync 2>&1 || echo refused; rm /scratch/big")
	if !strings.Contains(got, "refused") || !strings.Contains(got, "nput/output error") {
		t.Errorf("the guest's write: %q", got)
	}
	r.expect(t, r.victim, vmpod.ReasonHostDiskFull, false, began, noticed)
	if got := r.conditions(t); got != "HostDisksUsable=HostDiskFull" {
		t.Errorf("conditions not met: %q", got)
	}
	if r.state(t, r.victim) != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("a full disk ended the sandbox")
	}
	r.neighbour(t)
	r.resize(t, 512<<20)
	r.exec(t, r.victim.main, "sh", "-c", "dd if=/dev/zero of=/scratch/again bs=1M count=8 conv=fsync; rm /scratch/again")
}

func (r *faultRoom) ownDiskFull(t *testing.T) {
	got := r.exec(t, r.victim.main, "sh", "-c", "cat /dev/zero >/scratch/big; df /scratch")
	if !strings.Contains(got, "100%") {
		t.Errorf("the pod's disk is not full: %q", got)
	}
	log := filepath.Join(r.victim.config.LogDirectory, "main/0.log")
	last := ticks(t, log)
	eventually(t, "a container whose pod's disk is full still logs", func() bool { return ticks(t, log) > last+2 })
	r.exec(t, r.near.main, "sh", "-c", "dd if=/dev/zero of=/scratch/mine bs=1M count=8 conv=fsync; rm /scratch/mine")
	r.neighbour(t)
	r.exec(t, r.victim.main, "sh", "-c", "rm /scratch/big; echo fine >/scratch/ok; cat /scratch/ok")
	r.complete(t)
}

func (r *faultRoom) guestOOM(t *testing.T) {
	hog := r.container(t, r.victim, "hog", "sleep 1; tail /dev/zero")
	for end := time.Now().Add(time.Minute); r.status(t, hog).State != runtimeapi.ContainerState_CONTAINER_EXITED; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the guest does not run out of memory")
		}
	}
	s := r.status(t, hog)
	if s.Reason != "OOMKilled" || s.ExitCode != 137 {
		t.Errorf("who took all memory ended as %v", s)
	}
	t.Logf("OOMKilled told %s after the kill", time.Since(time.Unix(0, s.FinishedAt)).Round(time.Millisecond))
	if s := r.status(t, r.victim.main); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("its neighbour in the pod: %v", s)
	}
	r.exec(t, r.victim.main, "true")
	if f := r.livePod(r.victim.sandbox).unwell(); f.Reason == vmpod.ReasonAgentSilent {
		t.Errorf("a guest that was only short of memory was suspected: %+v", f)
	}
	r.neighbour(t)
}

func (r *faultRoom) vmmStopped(t *testing.T) {
	began := time.Now()
	if err := unix.Kill(r.victim.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer unix.Kill(r.victim.pid, unix.SIGCONT)
	r.expect(t, r.victim, vmpod.ReasonVMMStopped, false, began, noticed)
	if v := r.vmmOf(t, r.victim); v.State != vmpod.StateUnknown || v.Reason != vmpod.ReasonVMMStopped || v.Message == "" {
		t.Errorf("inspectp says %+v", v)
	}
	if got := r.conditions(t); !strings.Contains(got, "PodVMsResponding=VMMStopped") {
		t.Errorf("conditions not met: %q", got)
	}
	if r.state(t, r.victim) != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Error("silence was taken for death")
	}
	within := func(what string, limit time.Duration, f func(context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		if err := f(ctx); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	within("ListPodSandbox", 15*time.Second, func(ctx context.Context) error {
		return second(r.rt.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{}))
	})
	within("stats of all", 15*time.Second, func(ctx context.Context) error {
		resp, err := r.rt.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
		if len(resp.GetStats()) != 1 {
			t.Errorf("stats of %d pods, want the neighbour's", len(resp.GetStats()))
		}
		return err
	})
	_, err := r.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: r.victim.main, Cmd: []string{"true"}, Timeout: 1})
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), vmpod.ReasonVMMStopped) {
		t.Errorf("exec in a stopped VM: %v", err)
	}
	r.neighbour(t)
	began = time.Now()
	unix.Kill(r.victim.pid, unix.SIGCONT)
	r.expect(t, r.victim, vmpod.ReasonVMMStopped, true, began, noticed)
	r.exec(t, r.victim.main, "true")
	r.complete(t)
	if v := r.vmmOf(t, r.victim); v.PID != r.victim.pid || r.status(t, r.victim.main).State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after SIGCONT: %+v", v)
	}
}

// complete fails unless the victim's log has every line once, in order.
func (r *faultRoom) complete(t *testing.T) {
	t.Helper()
	log := filepath.Join(r.victim.config.LogDirectory, "main/0.log")
	before := ticks(t, log)
	eventually(t, "the log goes on", func() bool { return ticks(t, log) > before })
}

// ticks is the number of the last line, all before it being there.
func ticks(t *testing.T, log string) int {
	t.Helper()
	n := 0
	for _, line := range logText(t, log) {
		if n++; line != fmt.Sprintf("stdout F tick %d", n) {
			t.Fatalf("line %d of the log is %q", n, line)
		}
	}
	return n
}

// hostHolds measures for how long the host keeps a pod's VM waiting, until the
// returned function is called or the VM ends: a crowded machine is no hang.
func (r *faultRoom) hostHolds(t *testing.T, p faultPod) (waited func() time.Duration) {
	var total time.Duration
	live := r.livePod(p.sandbox)
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		before, _ := live.progress()
		for !isClosed(live.dead) && !isClosed(stop) {
			time.Sleep(200 * time.Millisecond)
			now, ok := live.progress()
			if ok {
				total += now.Since(before)
				before = now
			}
		}
	}()
	return func() time.Duration {
		close(stop)
		<-done
		t.Logf("the VM waited %s for a CPU of the host", total.Round(10*time.Millisecond))
		return total
	}
}

// agentHung starves all of the guest's user space by a real-time task, as far
// as the kernel lets root go.
func (r *faultRoom) agentHung(t *testing.T) {
	r.exec(t, r.victim.main, "sh", "-c", `mkdir /hog; cd /tools; for f in *; do cat $f >/hog/$f; done; cd /hog; /bin/busybox chmod 755 *; `+
		`echo -1 >/proc/sys/kernel/sched_rt_runtime_us; `+
		`(sleep 1; exec ./ld-linux-x86-64.so.2 --library-path /hog ./chrt -f 99 sh -c 'while :; do :; done') >/hog/out 2>&1 &`)
	began := time.Now().Add(time.Second)
	waited := r.hostHolds(t, r.victim)
	f := r.expect(t, r.victim, string(vmpod.ExitAgentHung), false, began, 10*time.Minute)
	if took, host := f.At.Sub(began), waited(); took-host > hungNoticed {
		t.Errorf("told after %s, of which the guest waited %s for a CPU of the host; promised within %s", took, host, hungNoticed)
	}
	if !f.Ended {
		t.Errorf("a hung guest is not given up: %+v", f)
	}
	if r.state(t, r.victim) != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Error("the sandbox is still ready")
	}
	if s := r.status(t, r.victim.main); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 || s.Reason != "AgentHung" || s.Message == "" {
		t.Errorf("its container: %v", s)
	}
	r.neighbour(t)
}

func (r *faultRoom) guestPanic(t *testing.T) {
	began := time.Now()
	_, _ = r.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: r.victim.main, Cmd: []string{"sh", "-c", "echo c >/proc/sysrq-trigger"}, Timeout: 10})
	f := r.expect(t, r.victim, string(vmpod.ExitGuestPanic), false, began, noticed)
	if !strings.Contains(f.Message, "sysrq triggered crash") || !strings.Contains(f.Message, "The console's end:") {
		t.Errorf("message %q", f.Message)
	}
	if s := r.status(t, r.victim.main); s.ExitCode != 255 || s.Reason != "GuestPanic" || !strings.Contains(s.Message, "sysrq") {
		t.Errorf("its container: %v", s)
	}
	if r.state(t, r.victim) != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Error("the sandbox is still ready")
	}
	r.neighbour(t)
}

func (r *faultRoom) vmmKilled(t *testing.T) {
	began := time.Now()
	if err := unix.Kill(r.near.pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f := r.expect(t, r.near, string(vmpod.ExitVMMKilled), false, began, noticed)
	if s := r.status(t, r.near.main); s.ExitCode != 137 || s.Reason != "VMMKilled" || !f.Ended {
		t.Errorf("its container: %v, %+v", s, f)
	}
	if r.state(t, r.near) != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Error("the sandbox is still ready")
	}
}
