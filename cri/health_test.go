package cri

import (
	"context"
	"errors"
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

	"github.com/openatoll/atoll/vmpod"
)

var fastPace = pace{
	look: 40 * time.Millisecond, again: 10 * time.Millisecond, answer: time.Second,
	quiet: 40 * time.Millisecond, silent: 200 * time.Millisecond, hung: 600 * time.Millisecond, clock: time.Hour,
}

// TestPulse reads as the life of guests: a word a look.
func TestPulse(t *testing.T) {
	running := vmpod.Status{State: vmpod.StateRunning}
	looks := map[string]glance{
		"well":    {status: running, answered: true, could: 2 * time.Second},
		"owes":    {status: running, could: 2 * time.Second},        // had the host to itself
		"starved": {status: running, could: 100 * time.Millisecond}, // waited for a CPU
		"stopped": {status: vmpod.Status{State: vmpod.StateUnknown, Reason: vmpod.ReasonVMMStopped}, could: 2 * time.Second},
		"mute":    {status: vmpod.Status{State: vmpod.StateUnknown, Reason: vmpod.ReasonVMMNotResponding}},
		"full":    {status: vmpod.Status{State: vmpod.StateRunning, Reason: vmpod.ReasonHostDiskFull}, answered: true, could: 2 * time.Second},
	}
	for _, tc := range []struct{ story, end string }{
		{"well well well", ""},
		{"well full", "HostDiskFull"},
		{"full well", ""},
		{"owes owes owes", ""},
		{"owes*4", "AgentSilent"},
		{"owes*6", "AgentSilent"},
		{"owes*6 well", ""},
		{"owes*6 well owes*3", ""},
		{"owes*7", "AgentHung"},
		{"starved*60", ""},             // two minutes of a crowded host
		{"starved*100", "AgentSilent"}, // ten seconds of CPU are enough for any guest
		{"well stopped", "VMMStopped"},
		{"well mute", ""}, // a VMM that is ending
		{"well mute mute", "VMMNotResponding"},
		{"owes*6 stopped*100", "VMMStopped"},
		{"owes*3 stopped*100 owes", "AgentSilent"},
		{"stopped*100 owes", ""},
	} {
		var p pulse
		got := ""
		for _, word := range strings.Fields(tc.story) {
			name, times := word, 1
			if w, n, ok := strings.Cut(word, "*"); ok {
				name = w
				fmt.Sscan(n, &times)
			}
			for range times {
				got, _ = p.take(looks[name], defaultPace)
			}
		}
		if got != tc.end {
			t.Errorf("%s: %q, want %q", tc.story, got, tc.end)
		}
	}
}

// listen collects faults.
func listen(s *testServer) (told func() string) {
	var mu sync.Mutex
	var all []string
	s.Faults(func(f vmpod.Fault) {
		mu.Lock()
		defer mu.Unlock()
		word := f.Reason
		if f.Cleared {
			word = "no more " + word
		}
		if f.Ended {
			word += "!"
		}
		if f.Namespace != "default" || f.Name != "web" || f.PodUID != podUID || f.At.IsZero() || f.Message == "" {
			word += fmt.Sprintf(" of %+v", f)
		}
		all = append(all, word)
	})
	return func() string {
		mu.Lock()
		defer mu.Unlock()
		return strings.Join(all, ", ")
	}
}

func withPace(c *Config) { c.pace = fastPace }

// An agent that takes calls and answers none is hung: its VM ends, with the
// reason, and whoever waited for it is let go.
func TestHungAgent(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir(), withPace)
	told := listen(s)
	id := s.run(t)
	c := s.create(t, id, ctrConfig("main"))
	s.start(t, c)
	time.Sleep(10 * fastPace.look) // it answers: nothing happens
	if told() != "" || s.status(t, c).State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Fatalf("a guest that is well: %q", told())
	}
	h.holdAt("hello")
	eventually(t, "suspicion", func() bool { return told() == "AgentSilent" })
	eventually(t, "verdict", func() bool { return strings.HasSuffix(told(), ", AgentHung!") })
	st := s.status(t, c)
	if st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.Reason != "AgentHung" || st.ExitCode != 137 || st.Message == "" {
		t.Errorf("container: %v", st)
	}
	eventually(t, "the machine is stopped", func() bool { return isClosed(h.machines[vmpod.ID{PodUID: podUID}].off) })
	resp, err := s.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil || resp.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY || !strings.Contains(resp.Info["info"], `"reason":"AgentHung"`) {
		t.Errorf("sandbox: %v, %v", resp, err)
	}
	s.remove(t, id)
	if left := h.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if got := told(); strings.Count(got, "AgentHung!") != 1 {
		t.Errorf("told %q", got)
	}
}

// A guest that the host does not let work is not hung, however long that
// takes.
func TestStarvedGuest(t *testing.T) {
	h := newFakeHost()
	h.starved.Store(true)
	s := serve(t, h, t.TempDir(), withPace)
	told := listen(s)
	id := s.run(t)
	release := h.holdAt("hello")
	time.Sleep(3 * fastPace.hung)
	if told() != "" {
		t.Fatalf("told %q", told())
	}
	release()
	h.starved.Store(false)
	time.Sleep(2 * fastPace.hung)
	if resp, err := s.rt.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id}); err != nil || resp.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY || told() != "" {
		t.Errorf("%v, %v, told %q", resp, err, told())
	}
}

// A VMM that does not answer is unknown: nothing ends, calls wait as long as
// their callers do, and everything goes on when it is back.
func TestSilentVMM(t *testing.T) {
	h := newFakeHost()
	s := serve(t, h, t.TempDir(), withPace)
	told := listen(s)
	id := s.run(t)
	c := s.create(t, id, ctrConfig("main"))
	s.start(t, c)
	h.set("status", errors.New("monitor does not answer"))
	eventually(t, "told", func() bool { return told() == "VMMNotResponding" })
	_, err := s.rt.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: c, Cmd: []string{"echo", "hi"}, Timeout: 1})
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "VMMNotResponding") {
		t.Errorf("exec: %v", err)
	}
	began := time.Now()
	if resp, err := s.rt.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{}); err != nil || len(resp.Stats) != 0 || time.Since(began) > statsTimeout {
		t.Errorf("stats: %v, %v after %s", resp, err, time.Since(began))
	}
	st, err := s.rt.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil || !strings.Contains(st.String(), conditionVMs) || !strings.Contains(st.String(), "VMMNotResponding") {
		t.Errorf("status: %v, %v", st, err)
	}
	// Longer than a hung agent would be given.
	time.Sleep(2 * fastPace.hung)
	waiting := make(chan error, 1)
	go func() {
		resp, err := s.rt.ExecSync(context.Background(), &runtimeapi.ExecSyncRequest{ContainerId: c, Cmd: []string{"echo", "hi"}})
		if err == nil && string(resp.Stdout) != "hi" {
			err = fmt.Errorf("%q", resp.Stdout)
		}
		waiting <- err
	}()
	time.Sleep(100 * time.Millisecond)
	h.set("status", nil)
	if err := <-waiting; err != nil {
		t.Errorf("an exec that waited: %v", err)
	}
	eventually(t, "recovery", func() bool { return told() == "VMMNotResponding, no more VMMNotResponding" })
	if st := s.status(t, c); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container: %v", st)
	}
}

// Faults found before anybody listens are told then; wanted ends never.
func TestDeathIsTold(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir, withPace)
	s.run(t)
	s.stop()
	h.machines[vmpod.ID{PodUID: podUID}].die(vmpod.Exit{Reason: vmpod.ExitGuestPanic, Message: "oops"})
	s = serve(t, h, dir, withPace)
	told := listen(s)
	eventually(t, "told", func() bool { return told() == "GuestPanic!" })
	for _, sb := range s.store.allSandboxes() {
		s.remove(t, sb.ID)
	}
	other := podConfig(dir)
	other.Metadata.Attempt = 1
	resp, err := s.rt.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: other})
	if err != nil {
		t.Fatal(err)
	}
	s.remove(t, resp.PodSandboxId)
	time.Sleep(50 * time.Millisecond)
	if told() != "GuestPanic!" {
		t.Errorf("told %q", told())
	}
}

// A daemon that died between the verdict on a guest and its end finds the
// machine running and ends it.
func TestVerdictOutlivesTheDaemon(t *testing.T) {
	h := newFakeHost()
	dir := t.TempDir()
	s := serve(t, h, dir)
	id := s.run(t)
	s.markDead(id, vmpod.Exit{Reason: vmpod.ExitAgentHung, Message: "hung", At: time.Now()})
	s.stop()
	s = serve(t, h, dir)
	eventually(t, "the machine is stopped", func() bool { return isClosed(h.machines[vmpod.ID{PodUID: podUID}].off) })
	if sb, ok := s.store.sandbox(id); !ok || sb.Reason != "AgentHung" {
		t.Errorf("sandbox %+v", sb)
	}
	s.remove(t, id)
}

// A full disk under the state: new things are refused with the cure, what
// happens is kept, and written once there is space.
func TestStateOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "cri")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("atoll-test", state, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(state, unix.MNT_DETACH) })
	h := newFakeHost()
	s := serve(t, h, dir, withPace)
	id := s.run(t)
	ended, lives := s.create(t, id, ctrConfig("ended")), s.create(t, id, ctrConfig("lives"))
	s.start(t, ended)
	s.start(t, lives)
	full := filepath.Join(state, "full")
	_ = os.WriteFile(full, make([]byte, 4<<20), 0o600) // fails when all is taken

	_, err := s.rt.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: id, Config: bigConfig("new"), SandboxConfig: podConfig(dir)})
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "free space on the file system of "+state) {
		t.Errorf("a container that cannot be recorded: %v", err)
	}
	// A reader keeps the file's free pages from being used again, so that every
	// change needs new ones.
	reader, err := s.store.db.Begin(false)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; err == nil && i < 10000; i++ {
		err = s.store.setCursor(fmt.Sprintf("filler %d", i), logCursor{})
	}
	h.guest(podUID).exit(ended, 3, "Error")
	eventually(t, "the exit is told", func() bool { return s.status(t, ended).State == runtimeapi.ContainerState_CONTAINER_EXITED })
	st, err := s.rt.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil || !strings.Contains(st.String(), "HostDiskFull") || !strings.Contains(st.String(), state) {
		t.Errorf("status: %v, %v", st, err)
	}
	if s.store.unrecorded() == 0 {
		t.Fatal("the disk took everything: this test tests nothing")
	}
	if err := errors.Join(reader.Rollback(), os.Remove(full)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the disk has it all", func() bool { return s.store.unrecorded() == 0 })
	s.create(t, id, bigConfig("new"))
	s.stop()
	s = serve(t, h, dir, withPace)
	if st := s.status(t, ended); st.State != runtimeapi.ContainerState_CONTAINER_EXITED || st.ExitCode != 3 {
		t.Errorf("after a restart: %v", st)
	}
	if st := s.status(t, lives); st.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a restart: %v", st)
	}
}

// bigConfig is a container whose record does not fit into a page or two.
func bigConfig(name string) *runtimeapi.ContainerConfig {
	c := ctrConfig(name)
	c.Annotations = map[string]string{"big": strings.Repeat("z", 200<<10)}
	return c
}
