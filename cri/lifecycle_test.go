package cri

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/openatoll/atoll/vmpod"
)

func logText(t *testing.T, path string) []string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
		if l == "" {
			continue
		}
		parts := strings.SplitN(l, " ", 4)
		if _, err := time.Parse(time.RFC3339Nano, parts[0]); err != nil || len(parts) != 4 {
			t.Fatalf("malformed log line %q: %v", l, err)
		}
		out = append(out, strings.Join(parts[1:], " "))
	}
	return out
}

func TestLifeOfAPod(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	var seen sync.Map
	s.Subscribe(func(uid string) { seen.Store(uid, true) })

	sb := s.run(t)
	g := h.guest(podUID)
	if g.setup.Hostname != "web" || len(g.setup.MachineId) != 32 || len(g.setup.Entropy) < 32 || g.setup.ClockNs == 0 || g.setup.EphemeralDisk != ephemeralDiskID {
		t.Fatalf("guest was set up with %v", g.setup)
	}
	if i := g.setup.Interfaces[0]; i.Addresses[0] != "198.19.0.2/32" || i.Routes[0].Gateway != "169.254.1.1" || i.Mac != "02:00:00:00:00:01" {
		t.Fatalf("interface %v", i)
	}
	st, err := s.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sb, Verbose: true})
	if err != nil || st.Status.Network.Ip != "198.19.0.2" || !json.Valid([]byte(st.Info["info"])) {
		t.Fatalf("status %v, %v", st, err)
	}

	ctr := s.create(t, sb, ctrConfig("main"))
	var spec specs.Spec
	if err := json.Unmarshal(g.containers[ctr].req.Spec, &spec); err != nil || strings.Join(spec.Process.Args, " ") != "/web -v" {
		t.Fatalf("spec %v, %v", spec.Process, err)
	}
	if st := s.status(t, ctr); st.State != runtimeapi.ContainerState_CONTAINER_CREATED || st.ImageId != "sha256:web" || st.ImageRef != "atoll.local/web@sha256:1" {
		t.Fatalf("created: %v", st)
	}
	s.start(t, ctr)
	s.start(t, ctr) // twice is once
	g.log(ctr, "hello")
	g.log(ctr, "world")
	log := filepath.Join(podConfig(s.dir).LogDirectory, "main/0.log")
	eventually(t, "log written and acknowledged", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		b, _ := os.ReadFile(log)
		return strings.Count(string(b), "\n") == 2 && len(g.containers[ctr].logs) == 0
	})
	if got := logText(t, log); got[0] != "stdout F hello" || got[1] != "stdout F world" {
		t.Fatalf("log %q", got)
	}

	ex, err := s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"echo", "a", "b"}})
	if err != nil || string(ex.Stdout) != "a b" || string(ex.Stderr) != "to stderr" || ex.ExitCode != 0 {
		t.Fatalf("exec: %v, %v", ex, err)
	}
	if ex, err = s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"exit", "7"}}); err != nil || ex.ExitCode != 7 {
		t.Fatalf("exec: %v, %v", ex, err)
	}
	if _, err = s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"missing"}}); status.Code(err) != codes.NotFound {
		t.Fatalf("exec of a missing command: %v", err)
	}
	if _, err = s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: ctr, Cmd: []string{"sleep"}, Timeout: 1}); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("exec over its time: %v", err)
	}

	stats, err := s.rt.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{})
	if err != nil || len(stats.Stats) != 1 || stats.Stats[0].Linux.Containers[0].Memory.WorkingSetBytes.Value != 42 || stats.Stats[0].Linux.Cpu.UsageCoreNanoSeconds.Value != 5e9 {
		t.Fatalf("stats %v, %v", stats, err)
	}
	fsi, err := s.img.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil || fsi.ImageFilesystems[0].UsedBytes.Value != 7 || fsi.ContainerFilesystems[0].FsId.Mountpoint != "/" {
		t.Fatalf("file systems %v, %v", fsi, err)
	}

	if _, err := s.rt.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: ctr, Timeout: 5}); err != nil {
		t.Fatal(err)
	}
	if got := g.containers[ctr].got; len(got) != 1 || got[0] != uint32(syscall.SIGINT) {
		t.Fatalf("signals %v, want the image's SIGINT alone", got)
	}
	if st := s.status(t, ctr); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 130 || st.FinishedAt < st.StartedAt || st.StartedAt == 0 {
		t.Fatalf("stopped: %v", st)
	}
	for range 2 { // both are idempotent
		s.remove(t, sb)
	}
	if left := h.left(); left != nil {
		t.Fatalf("left behind: %v", left)
	}
	if _, ok := seen.Load(podUID); !ok {
		t.Fatal("no change was told")
	}
	if in, _ := s.store.intents(); len(in) != 0 {
		t.Fatalf("intents left: %v", in)
	}
}

func TestRunIsIdempotent(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	release := h.holdAt("launch")
	ids := make(chan string, 3)
	for range 3 {
		go func() {
			r, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
			if err != nil {
				t.Error(err)
			}
			ids <- r.GetPodSandboxId()
		}()
	}
	time.Sleep(50 * time.Millisecond)
	release()
	id := <-ids
	if <-ids != id || <-ids != id || s.run(t) != id {
		t.Fatal("several sandboxes for one attempt")
	}
	if h.launches != 1 {
		t.Fatalf("%d launches", h.launches)
	}
	other := podConfig(s.dir)
	other.Hostname = "other"
	_, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: other})
	if status.Code(err) != codes.AlreadyExists {
		t.Fatalf("another config: %v", err)
	}
	other.Metadata.Attempt = 1
	if _, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: other}); err != nil {
		t.Fatalf("another attempt beside the first: %v", err)
	}
	c := ctrConfig("main")
	first := s.create(t, id, c)
	if s.create(t, id, c) != first {
		t.Fatal("two containers for one attempt")
	}
	s.start(t, first)
	_, err = s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: id, Config: c})
	if status.Code(err) != codes.AlreadyExists {
		t.Fatalf("create beside a started one: %v", err)
	}
	for range 2 {
		if _, err := s.rt.RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: first}); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{
		second(s.rt.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: "gone"})),
		second(s.rt.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: "gone"})),
		second(s.rt.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: "gone"})),
	} {
		if err != nil {
			t.Errorf("on what is gone: %v", err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// Every step of RunPodSandbox and CreateContainer fails once: nothing may be
// left, and the next try must succeed.
func TestRollback(t *testing.T) {
	boom := errors.New("injected")
	for _, step := range []string{"attach", "ephemeral", "image disk", "launch", "hello", "setup"} {
		t.Run("run "+step, func(t *testing.T) {
			h := newFakeHost()
			s := serve(t, h, t.TempDir())
			h.set(step, boom)
			s.hints[podUID] = &vmpod.Hint{Owner: vmpod.Owner{PodUID: podUID}, Images: []string{"atoll.local/web:1", "atoll.local/absent:1"}}
			_, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
			if err == nil || !strings.Contains(err.Error(), "injected") {
				t.Fatalf("got %v", err)
			}
			if left := h.left(); left != nil {
				t.Fatalf("left behind: %v", left)
			}
			if in, _ := s.store.intents(); len(in) != 0 {
				t.Fatalf("intents left: %v", in)
			}
			h.set(step, nil)
			s.remove(t, s.run(t))
		})
	}
	for _, step := range []string{"add volume", "tree", "create", "plug"} {
		t.Run("create "+step, func(t *testing.T) {
			h := newFakeHost()
			dir := t.TempDir()
			s := serve(t, h, dir)
			sb := s.run(t)
			h.set(step, boom)
			c := ctrConfig("main")
			hosts := filepath.Join(dir, "kubelet/pods", podUID, "etc-hosts")
			os.MkdirAll(filepath.Dir(hosts), 0o755)
			os.WriteFile(hosts, []byte("127.0.0.1 localhost\n"), 0o644)
			c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/etc/hosts", HostPath: hosts}}
			if _, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sb, Config: c}); err == nil {
				t.Fatal("no error")
			}
			if cs := s.store.allContainers(); len(cs) != 0 || h.guest(podUID).count() != 0 {
				t.Fatalf("containers left: %v", cs)
			}
			h.set(step, nil)
			s.create(t, sb, c)
		})
	}
	t.Run("undo fails", func(t *testing.T) {
		h := newFakeHost()
		dir := t.TempDir()
		s := serve(t, h, dir)
		h.set("setup", boom)
		h.set("remove", boom)
		if _, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(dir)}); err == nil {
			t.Fatal("no error")
		}
		if in, _ := s.store.intents(); len(in) != 1 {
			t.Fatalf("the intent must stay: %v", in)
		}
		s.stop()
		h.set("setup", nil)
		h.set("remove", nil)
		serve(t, h, dir)
		eventually(t, "the next start takes it back", func() bool { return h.left() == nil })
	})
}

func TestDeadlineLeavesNothing(t *testing.T) {
	for _, step := range []string{"attach", "launch", "dial", "setup"} {
		t.Run(step, func(t *testing.T) {
			h := newFakeHost()
			s := serve(t, h, t.TempDir())
			release := h.holdAt(step)
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err := s.rt.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
			if status.Code(err) != codes.DeadlineExceeded {
				t.Fatalf("got %v", err)
			}
			eventually(t, "all taken back", func() bool { return h.left() == nil })
			release()
			s.run(t)
		})
	}
}

func TestPrepare(t *testing.T) {
	hint := vmpod.Hint{Owner: vmpod.Owner{PodUID: podUID, Name: "web"}, CPUs: 2, Memory: 900 * mib, EphemeralBytes: 1 << 30, Images: []string{"atoll.local/web:1"}}
	t.Run("joined", func(t *testing.T) {
		h := newFakeHost()
		s := serve(t, h, t.TempDir())
		release := h.holdAt("launch")
		s.Prepare(t.Context(), hint)
		s.Prepare(t.Context(), hint)
		time.AfterFunc(50*time.Millisecond, release)
		sb := s.run(t)
		m, _ := fakeDriver{h}.Open(t.Context(), vmpod.ID{PodUID: podUID})
		if sp := m.Spec(); h.launches != 1 || sp.CPUs != 2 || sp.Memory != 900*mib || len(sp.Disks) != 2 || !sp.Disks[1].ReadOnly {
			t.Fatalf("%d launches of %+v", h.launches, sp)
		}
		s.Forget(t.Context(), podUID) // in use: does nothing
		s.remove(t, sb)
	})
	t.Run("forgotten", func(t *testing.T) {
		h := newFakeHost()
		s := serve(t, h, t.TempDir())
		s.Prepare(t.Context(), hint)
		eventually(t, "launched", func() bool { return len(h.left()) > 2 })
		s.Forget(t.Context(), podUID)
		eventually(t, "taken back", func() bool { return h.left() == nil })
		s.Forget(t.Context(), "unknown")
	})
	t.Run("forgotten while it boots", func(t *testing.T) {
		h := newFakeHost()
		s := serve(t, h, t.TempDir())
		defer h.holdAt("dial")()
		s.Prepare(t.Context(), hint)
		eventually(t, "launched", func() bool { return len(h.left()) > 2 })
		s.Forget(t.Context(), podUID)
		eventually(t, "taken back", func() bool { return h.left() == nil })
	})
	t.Run("expires", func(t *testing.T) {
		h := newFakeHost()
		s := serve(t, h, t.TempDir(), func(c *Config) { c.PrepareTTL = 100 * time.Millisecond })
		s.Prepare(t.Context(), hint)
		eventually(t, "taken back", func() bool { h.mu.Lock(); n := h.launches; h.mu.Unlock(); return n == 1 && h.left() == nil })
		s.run(t)
	})
	t.Run("replaced", func(t *testing.T) {
		h := newFakeHost()
		s := serve(t, h, t.TempDir())
		s.Prepare(t.Context(), hint)
		other := hint
		other.CPUs = 3
		s.Prepare(t.Context(), other)
		s.run(t)
		m, _ := fakeDriver{h}.Open(t.Context(), vmpod.ID{PodUID: podUID})
		if m.Spec().CPUs != 3 {
			t.Fatalf("%+v", m.Spec())
		}
	})
	t.Run("failed", func(t *testing.T) {
		h := newFakeHost()
		s := serve(t, h, t.TempDir())
		h.set("launch", errors.New("injected"))
		s.Prepare(t.Context(), hint)
		time.Sleep(50 * time.Millisecond)
		h.set("launch", nil)
		s.run(t)
	})
	t.Run("left by a crash", func(t *testing.T) {
		h := newFakeHost()
		dir := t.TempDir()
		s := serve(t, h, dir)
		s.Prepare(t.Context(), hint)
		eventually(t, "launched", func() bool { return len(h.left()) > 2 })
		s.stop()
		serve(t, h, dir)
		eventually(t, "taken back", func() bool { return h.left() == nil })
	})
}

func TestStopKillsAfterGrace(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	sb := s.run(t)
	ctr := s.create(t, sb, ctrConfig("main"))
	s.start(t, ctr)
	g := h.guest(podUID)
	g.mu.Lock()
	g.containers[ctr].ignore = true
	g.mu.Unlock()
	start := time.Now()
	if _, err := s.rt.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: ctr, Timeout: 1}); err != nil {
		t.Fatal(err)
	}
	if st := s.status(t, ctr); st.ExitCode != 137 || time.Since(start) < time.Second {
		t.Fatalf("%v after %s", st, time.Since(start))
	}
}

func TestStartError(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	ctr := s.create(t, s.run(t), ctrConfig("main"))
	h.set("start", errdefs.ErrNotFound)
	if _, err := s.rt.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: ctr}); status.Code(err) != codes.NotFound {
		t.Fatalf("got %v", err)
	}
	if st := s.status(t, ctr); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 128 || st.Reason != "StartError" {
		t.Fatalf("%v", st)
	}
}

func TestMachineDies(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	sb := s.run(t)
	ctr := s.create(t, sb, ctrConfig("main"))
	s.start(t, ctr)
	m, _ := fakeDriver{h}.Open(t.Context(), vmpod.ID{PodUID: podUID})
	m.(*fakeMachine).die(vmpod.Exit{Reason: vmpod.ExitGuestPanic, Message: "the guest kernel panicked"})
	eventually(t, "container exited", func() bool { return s.status(t, ctr).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if st := s.status(t, ctr); st.ExitCode != 255 || st.Reason != "GuestPanic" || !strings.Contains(st.Message, "panicked") {
		t.Fatalf("%v", st)
	}
	eventually(t, "sandbox not ready", func() bool {
		r, err := s.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sb})
		return err == nil && r.Status.State == runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	})
	if _, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: sb, Config: ctrConfig("x")}); status.Code(err) != codes.FailedPrecondition {
		t.Fatalf("create in a dead sandbox: %v", err)
	}
	_, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: podConfig(s.dir)})
	if status.Code(err) != codes.AlreadyExists {
		t.Fatalf("run of a dead attempt: %v", err)
	}
	s.remove(t, sb)
	if left := h.left(); left != nil {
		t.Fatalf("left behind: %v", left)
	}
}

// What a container wrote and how it ended while no daemon ran is delivered
// afterwards, once, in order.
func TestRestart(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	sb := s.run(t)
	first, secondID := s.create(t, sb, ctrConfig("first")), s.create(t, sb, ctrConfig("second"))
	s.start(t, first)
	s.start(t, secondID)
	g := h.guest(podUID)
	g.log(first, "one")
	log := filepath.Join(podConfig(dir).LogDirectory, "first/0.log")
	eventually(t, "first line", func() bool { b, _ := os.ReadFile(log); return len(b) > 0 })
	s.stop()
	g.log(first, "two")
	g.log(first, "three")
	g.exit(first, 3, "Error")

	// The list cannot be had: nothing may be touched.
	h.set("list", errors.New("injected"))
	if _, err := New(t.Context(), Config{Driver: fakeDriver{h}, Network: fakeNetwork{h}, Images: fakeImages{h}, Ephemeral: fakeEphemeral{h}, StateDir: filepath.Join(dir, "cri")}); err == nil {
		t.Fatal("started without a list")
	}
	h.set("list", nil)
	if len(h.machines) != 1 {
		t.Fatal("machine removed on an unsynced list")
	}

	s = serve(t, h, dir)
	eventually(t, "exit delivered", func() bool { return s.status(t, first).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if st := s.status(t, first); st.ExitCode != 3 {
		t.Fatalf("%v", st)
	}
	if got := strings.Join(logText(t, log), "|"); got != "stdout F one|stdout F two|stdout F three" {
		t.Fatalf("log %q", got)
	}
	if st := s.status(t, secondID); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("the other one: %v", st)
	}
	ex, err := s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: secondID, Cmd: []string{"echo", "still here"}})
	if err != nil || string(ex.Stdout) != "still here" {
		t.Fatalf("exec after restart: %v, %v", ex, err)
	}
	if h.launches != 1 {
		t.Fatalf("%d launches", h.launches)
	}
	s.remove(t, sb)
	if left := h.left(); left != nil {
		t.Fatalf("left behind: %v", left)
	}
}

func TestAgentSessionBreaks(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	ctr := s.create(t, s.run(t), ctrConfig("main"))
	s.start(t, ctr)
	g := h.guest(podUID)
	log := filepath.Join(podConfig(s.dir).LogDirectory, "main/0.log")
	m, _ := fakeDriver{h}.Open(t.Context(), vmpod.ID{PodUID: podUID})
	want := ""
	for i := range 5 {
		line := strings.Repeat("x", i+1)
		g.log(ctr, line)
		want += "stdout F " + line + "|"
		m.(*fakeMachine).mu.Lock()
		m.(*fakeMachine).conn.Close()
		m.(*fakeMachine).mu.Unlock()
	}
	g.exit(ctr, 0, "Completed")
	eventually(t, "exit seen", func() bool { return s.status(t, ctr).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	if got := strings.Join(logText(t, log), "|") + "|"; got != want {
		t.Fatalf("log %q, want %q", got, want)
	}
}

func TestTerminationMessage(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	file := filepath.Join(dir, "kubelet/pods", podUID, "containers/main/1a2b3c4d")
	os.MkdirAll(filepath.Dir(file), 0o755)
	os.WriteFile(file, nil, 0o666)
	c := ctrConfig("main")
	c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/dev/termination-log", HostPath: file}}
	ctr := s.create(t, s.run(t), c)
	s.start(t, ctr)
	g := h.guest(podUID)
	if p := g.containers[ctr].req.TerminationMessagePath; p != "/dev/termination-log" {
		t.Fatalf("path %q", p)
	}
	g.mu.Lock()
	g.containers[ctr].message = "it was the butler"
	g.mu.Unlock()
	var atExit string
	s.Subscribe(func(string) {
		if c, ok := s.store.container(ctr); ok && c.State == runtimeapi.ContainerState_CONTAINER_EXITED && atExit == "" {
			b, _ := os.ReadFile(file)
			atExit = string(b)
		}
	})
	g.exit(ctr, 1, "Error")
	eventually(t, "exit seen", func() bool { return s.status(t, ctr).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	s.stop()
	if atExit != "it was the butler" {
		t.Fatalf("message at the time of the exit: %q", atExit)
	}
}

func TestEventsAndLists(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	stream, err := s.rt.GetContainerEvents(t.Context(), &runtimeapi.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "subscribed", func() bool { s.store.mu.RLock(); defer s.store.mu.RUnlock(); return len(s.store.subs) > 0 })
	sb := s.run(t)
	ctr := s.create(t, sb, ctrConfig("main"))
	s.start(t, ctr)
	h.guest(podUID).exit(ctr, 0, "Completed")
	eventually(t, "exit seen", func() bool { return s.status(t, ctr).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	want := []struct {
		id  string
		typ runtimeapi.ContainerEventType
	}{
		{sb, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT}, {sb, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT},
		{ctr, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT}, {ctr, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT},
		{ctr, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT},
	}
	for _, w := range want {
		e, err := stream.Recv()
		if err != nil || e.ContainerId != w.id || e.ContainerEventType != w.typ || e.PodSandboxStatus.GetId() != sb {
			t.Fatalf("event %v, %v; want %v", e, err, w)
		}
	}
	l, err := s.rt.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: sb, State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_EXITED}}})
	if err != nil || len(l.Containers) != 1 {
		t.Fatalf("%v, %v", l, err)
	}
	p, err := s.rt.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{LabelSelector: map[string]string{"app": "other"}}})
	if err != nil || len(p.Items) != 0 {
		t.Fatalf("%v, %v", p, err)
	}
	st, err := s.rt.Status(t.Context(), &runtimeapi.StatusRequest{Verbose: true})
	if err != nil || !st.Status.Conditions[0].Status || !st.Status.Conditions[1].Status || !strings.Contains(st.Info["config"], `"sandboxes":1`) {
		t.Fatalf("%v, %v", st, err)
	}
}

func TestUpdateResources(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir())
	c := ctrConfig("main")
	c.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 100, MemoryLimitInBytes: 64 * mib}
	ctr := s.create(t, s.run(t), c)
	s.start(t, ctr)
	_, err := s.rt.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{ContainerId: ctr, Linux: &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: 128 * mib}})
	if err != nil {
		t.Fatal(err)
	}
	if r := s.status(t, ctr).Resources.Linux; r.MemoryLimitInBytes != 128*mib || r.CpuShares != 100 {
		t.Fatalf("%v", r)
	}
	u := h.guest(podUID).containers[ctr].updated
	if !strings.Contains(string(u.Resources), `"limit":134217728`) || u.Unified["memory.oom.group"] != "1" {
		t.Fatalf("%v", u)
	}
}
