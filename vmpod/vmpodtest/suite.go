// Package vmpodtest is the suite that every vmpod.Driver passes: it holds each
// driver to what the interfaces of package vmpod promise. It boots a guest of
// its own, so that a driver is judged without podinit.
package vmpodtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

// A Harness is a driver under test with what the suite does around it. The
// driver boots the suite's guest (BuildGuest).
type Harness struct {
	Driver vmpod.Driver
	// Restart lets go of Driver, as if its process were killed, runs between
	// if that is not nil, and returns a Driver as a new process would have it.
	Restart func(t testing.TB, between func()) vmpod.Driver
	// Disk makes a disk image that begins with the line content.
	Disk func(t testing.TB, id, content string, size int64) vmpod.Disk
	// KillVMM ends the hypervisor's process, if it has one, as kill -9 does.
	KillVMM func(t testing.TB, m vmpod.Machine)
	// Leftovers names all that the driver ever made and that is still there:
	// processes, files, sockets, cgroups.
	Leftovers func(t testing.TB) []string
}

// patience bounds what the suite waits for, boots apart.
const patience = 60 * time.Second

// Run tests drivers; it asks for a harness, with nothing in it, for each
// test. Five guests are booted, one at a time.
func Run(t *testing.T, newHarness func(t *testing.T) *Harness) {
	for _, test := range []struct {
		name  string
		boots bool
		run   func(t *testing.T, h *Harness)
	}{
		{"Life", true, testLife},
		{"Idempotent", false, testIdempotent},
		{"BadSpec", false, testBadSpec},
		{"Concurrent", false, testConcurrent},
		{"Cancel", false, testCancel},
		{"StopHard", false, testStopHard},
		{"KillVMM", false, testKillVMM},
		{"KillVMMUnseen", false, testKillVMMUnseen},
		{"Poweroff", true, testPoweroff},
		{"Reset", true, testReset},
		{"PanicUnseen", true, testPanicUnseen},
		{"Grow", true, testGrow},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.boots && testing.Short() {
				t.Skip("boots a guest")
			}
			h := newHarness(t)
			t.Cleanup(func() {
				if left := h.Leftovers(t); len(left) > 0 && !t.Failed() {
					t.Errorf("left behind: %q", left)
				}
			})
			test.run(t, h)
		})
	}
}

func spec(uid string) vmpod.Spec {
	return vmpod.Spec{
		ID:     vmpod.ID{PodUID: uid},
		Owner:  vmpod.Owner{PodUID: uid, Namespace: "default", Name: "a,b=c \"d\""},
		CPUs:   1,
		Memory: 128 << 20,
		Pool:   "burstable",
	}
}

func launch(t *testing.T, h *Harness, s vmpod.Spec) vmpod.Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	m, err := h.Driver.Launch(ctx, s)
	if err != nil {
		t.Fatalf("Launch: %v", err)
	}
	t.Cleanup(func() { // by ID: the driver may have been restarted since
		if m, err := h.Driver.Open(context.Background(), s.ID); err == nil {
			if err := m.Remove(context.Background()); err != nil {
				t.Errorf("Remove: %v", err)
			}
		}
	})
	return m
}

func status(t *testing.T, m vmpod.Machine) vmpod.Status {
	t.Helper()
	s, err := m.Status(context.Background())
	if err != nil {
		t.Fatalf("Status: %v", err)
	}
	if s.State != vmpod.StateRunning && (s.Reason == "" || s.Message == "") {
		t.Errorf("state %s without reason or message: %+v", s.State, s)
	}
	return s
}

func wantState(t *testing.T, m vmpod.Machine, want vmpod.State) {
	t.Helper()
	if s := status(t, m); s.State != want {
		t.Errorf("state %s (%s: %s), want %s", s.State, s.Reason, s.Message, want)
	}
}

func wantExit(t *testing.T, m vmpod.Machine, want ...vmpod.ExitReason) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	e, err := m.Wait(ctx)
	if err != nil {
		t.Fatalf("Wait: %v", err)
	}
	if !slices.Contains(want, e.Reason) {
		t.Errorf("exit %s (%s), want %v", e.Reason, e.Message, want)
	}
	if e.Message == "" || e.At.IsZero() || time.Since(e.At) > patience {
		t.Errorf("exit without message or with a wrong time: %+v", e)
	}
	t.Logf("exit: %s: %s", e.Reason, e.Message)
	wantState(t, m, vmpod.StateStopped)
	if _, err := m.Dial(ctx); err == nil {
		t.Error("Dial to a machine that is off succeeds")
	}
	if err := m.Stop(ctx, time.Second); err != nil {
		t.Errorf("Stop of what has stopped: %v", err)
	}
	again, err := m.Wait(ctx)
	if err != nil || again != e {
		t.Errorf("second Wait: %+v, %v; the first: %+v", again, err, e)
	}
}

func wantIDs(t *testing.T, d vmpod.Driver, want ...vmpod.ID) {
	t.Helper()
	ms, err := d.List(context.Background())
	if err != nil {
		t.Fatalf("List: %v", err)
	}
	var got []string
	for _, m := range ms {
		got = append(got, m.Spec().ID.String())
	}
	var ids []string
	for _, id := range want {
		ids = append(ids, id.String())
	}
	slices.Sort(got)
	slices.Sort(ids)
	if !slices.Equal(got, ids) {
		t.Errorf("List: %v, want %v", got, ids)
	}
}

// testLife follows one machine from Launch to Remove, through a restart of
// the driver.
func testLife(t *testing.T, h *Harness) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*bootPatience)
	defer cancel()
	s := spec("life-0b4f")
	s.CPUs = 2
	s.Disks = []vmpod.Disk{
		h.Disk(t, "eph", "writable", 16<<20),
		readOnly(h.Disk(t, "img-0", "image", 8<<20)),
	}
	m := launch(t, h, s)
	wantState(t, m, vmpod.StateRunning)
	wantIDs(t, h.Driver, s.ID)

	k := Dial(t, m)
	boot := k.Ask("boot")
	if got := k.Ask("cpus"); got != "2" {
		t.Errorf("guest has %s CPUs, want 2", got)
	}
	// A clone's are plugged into it: its guest finds them by and by.
	k.AskUntil("disks", func(a string) bool { return a == "eph:32768:0 img-0:16384:1" })
	if got := k.Ask("read img-0"); got != "image" {
		t.Errorf("guest reads %q from the image disk", got)
	}
	if got := k.Ask("write img-0 1"); got != "failed" {
		t.Errorf("guest's write to a read-only disk: %s", got)
	}
	if got := k.Ask("write eph 1"); got != "ok" {
		t.Errorf("guest's write to its disk: %s", got)
	}

	// A new connection takes over from the old one.
	k2 := Dial(t, m)
	if got := k2.Ask("boot"); got != boot {
		t.Errorf("the second connection reaches another guest: %s, not %s", got, boot)
	}

	if p, ok := m.(vmpod.Plugger); ok {
		testPlug(t, h, m, p, k2)
	}
	if meter, ok := m.(vmpod.Meter); ok {
		u, err := meter.Usage(ctx)
		if err != nil || u.CPU == 0 || u.Resident == 0 || u.Proportional == 0 || u.Time.IsZero() {
			t.Errorf("Usage: %+v, %v", u, err)
		}
		if c, err := meter.Counters(ctx); err != nil || c.CPU < u.CPU || c.Resident < u.Proportional/2 || c.Time.Before(u.Time) {
			t.Errorf("Counters: %+v after %+v, %v", c, u, err)
		}
	}

	// The driver's process is replaced; the machine does not notice.
	before := m.Spec()
	h.Driver = h.Restart(t, nil)
	wantIDs(t, h.Driver, s.ID)
	m, err := h.Driver.Open(ctx, s.ID)
	if err != nil {
		t.Fatalf("Open after a restart: %v", err)
	}
	if got := m.Spec(); fmt.Sprint(got) != fmt.Sprint(before) {
		t.Errorf("Spec after a restart: %+v, before: %+v", got, before)
	}
	wantState(t, m, vmpod.StateRunning)
	again, err := h.Driver.Launch(ctx, s)
	if err != nil {
		t.Fatalf("Launch of what runs, after a restart: %v", err)
	}
	if a, b := status(t, again), status(t, m); a.PID != b.PID || !a.StartedAt.Equal(b.StartedAt) {
		t.Errorf("Launch of what runs made another: %+v, %+v", a, b)
	}
	k = Dial(t, m)
	if got := k.Ask("boot"); got != boot {
		t.Errorf("after a restart of the driver the guest is another one")
	}

	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if e, err := m.Wait(ctx); err != nil || e.Reason != vmpod.ExitStopped {
				t.Errorf("Wait beside Stop: %+v, %v", e, err)
			}
		})
	}
	begin := time.Now()
	if err := m.Stop(ctx, patience); err != nil {
		t.Fatalf("Stop: %v", err)
	}
	if d := time.Since(begin); d > patience/2 {
		t.Errorf("Stop took %v: the guest was not asked", d)
	}
	wg.Wait()
	wantExit(t, m, vmpod.ExitStopped)
	wantIDs(t, h.Driver, s.ID) // ended, not removed

	for range 2 {
		if err := m.Remove(ctx); err != nil {
			t.Fatalf("Remove: %v", err)
		}
	}
	wantIDs(t, h.Driver)
	if _, err := h.Driver.Open(ctx, s.ID); !errdefs.IsNotFound(err) {
		t.Errorf("Open of what was removed: %v, want NotFound", err)
	}
}

func readOnly(d vmpod.Disk) vmpod.Disk {
	d.ReadOnly = true
	return d
}

func testPlug(t *testing.T, h *Harness, m vmpod.Machine, p vmpod.Plugger, k *Talk) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	const many = 14
	var disks []vmpod.Disk
	for i := range many {
		d := readOnly(h.Disk(t, fmt.Sprintf("plug-%d", i), fmt.Sprintf("content %d", i), 4<<20))
		for range 2 { // an equal one again succeeds
			if err := p.Plug(ctx, vmpod.Device{Disk: &d}); err != nil {
				t.Fatalf("Plug: %v", err)
			}
		}
		disks = append(disks, d)
	}
	if got, want := len(m.Spec().Disks), many+2; got != want {
		t.Errorf("Spec has %d disks after plugging, want %d", got, want)
	}
	k.AskUntil("disks", func(a string) bool { return strings.Count(a, "plug-") == many })
	for _, i := range []int{0, many - 1} {
		if got, want := k.Ask(fmt.Sprintf("read plug-%d", i)), fmt.Sprintf("content %d", i); got != want {
			t.Errorf("guest reads %q from a plugged disk, want %q", got, want)
		}
	}
	other := disks[0]
	other.ReadOnly = false
	if err := p.Plug(ctx, vmpod.Device{Disk: &other}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("Plug of another disk with an ID in use: %v, want AlreadyExists", err)
	}
	missing := vmpod.Disk{ID: "missing", Path: disks[0].Path + ".missing"}
	if err := p.Plug(ctx, vmpod.Device{Disk: &missing}); !errdefs.IsNotFound(err) {
		t.Errorf("Plug of a missing disk: %v, want NotFound", err)
	}
	for range 2 { // what is not there is gone
		if err := p.Unplug(ctx, disks[0].ID); err != nil {
			t.Fatalf("Unplug: %v", err)
		}
	}
	if a := k.Ask("disks"); strings.Contains(a, "plug-0:") {
		t.Errorf("guest still has an unplugged disk: %s", a)
	}
	// A disk of the boot comes and goes like any other.
	boot := m.Spec().Disks[1]
	if err := p.Unplug(ctx, boot.ID); err != nil {
		t.Errorf("Unplug of a disk of the boot: %v", err)
	}
	if err := p.Plug(ctx, vmpod.Device{Disk: &boot}); err != nil {
		t.Errorf("Plug of what was unplugged: %v", err)
	}
	k.AskUntil("disks", func(a string) bool { return strings.Contains(a, boot.ID+":") })
}

func testIdempotent(t *testing.T, h *Harness) {
	ctx := context.Background()
	s := spec("idem-77a1")
	first := status(t, launch(t, h, s))
	again := launch(t, h, s)
	if a := status(t, again); a.PID != first.PID {
		t.Errorf("a second Launch made another machine: %+v, %+v", a, first)
	}
	other := s
	other.Memory *= 2
	if _, err := h.Driver.Launch(ctx, other); !errdefs.IsAlreadyExists(err) {
		t.Errorf("Launch with another Spec: %v, want AlreadyExists", err)
	}
	// Another attempt of the same pod is another machine.
	second := s
	second.ID.Attempt = 1
	if m := launch(t, h, second); status(t, m).PID == first.PID && first.PID != 0 {
		t.Error("two attempts share a machine")
	}
	wantIDs(t, h.Driver, s.ID, second.ID)
	if err := again.Stop(ctx, 0); err != nil {
		t.Fatal(err)
	}
	if m, err := h.Driver.Launch(ctx, s); err != nil {
		t.Errorf("Launch of what has ended: %v", err)
	} else {
		wantState(t, m, vmpod.StateStopped)
	}
}

func testBadSpec(t *testing.T, h *Harness) {
	for name, c := range map[string]struct {
		change func(*vmpod.Spec)
		is     func(error) bool
	}{
		"no ID":          {func(s *vmpod.Spec) { s.ID.PodUID = "" }, errdefs.IsInvalidArgument},
		"ID is a path":   {func(s *vmpod.Spec) { s.ID.PodUID = "../x" }, errdefs.IsInvalidArgument},
		"ID has a comma": {func(s *vmpod.Spec) { s.ID.PodUID = "a,b" }, errdefs.IsInvalidArgument},
		"no CPU":         {func(s *vmpod.Spec) { s.CPUs = 0 }, errdefs.IsInvalidArgument},
		"no memory":      {func(s *vmpod.Spec) { s.Memory = 0 }, errdefs.IsInvalidArgument},
		"disk ID":        {func(s *vmpod.Spec) { s.Disks = []vmpod.Disk{{ID: "a,b", Path: "/x"}} }, errdefs.IsInvalidArgument},
		"disk path":      {func(s *vmpod.Spec) { s.Disks = []vmpod.Disk{{ID: "a", Path: "x"}} }, errdefs.IsInvalidArgument},
		"disk missing":   {func(s *vmpod.Spec) { s.Disks = []vmpod.Disk{{ID: "a", Path: "/nonexistent/disk"}} }, errdefs.IsNotFound},
		"two disks": {func(s *vmpod.Spec) {
			s.Disks = []vmpod.Disk{{ID: "a", Path: "/x"}, {ID: "a", Path: "/y"}}
		}, errdefs.IsInvalidArgument},
	} {
		s := spec("bad-5c01")
		c.change(&s)
		_, err := h.Driver.Launch(context.Background(), s)
		if !c.is(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantIDs(t, h.Driver)
	if left := h.Leftovers(t); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	if _, err := h.Driver.Open(context.Background(), vmpod.ID{PodUID: "never"}); !errdefs.IsNotFound(err) {
		t.Errorf("Open of what never was: %v, want NotFound", err)
	}
}

func testConcurrent(t *testing.T, h *Harness) {
	s := spec("many-19fe")
	other := s
	other.CPUs = 2
	var mu sync.Mutex
	pids := map[int]int{}
	var refused int
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			want := s
			if i%3 == 2 {
				want = other
			}
			m, err := h.Driver.Launch(context.Background(), want)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errdefs.IsAlreadyExists(err):
				refused++
			case err != nil:
				t.Errorf("Launch: %v", err)
			default:
				st, _ := m.Status(context.Background())
				pids[st.PID]++
			}
		})
	}
	wg.Wait()
	if len(pids) != 1 || (refused != 2 && refused != 4) {
		t.Errorf("six launches of one ID, two of them with another Spec: machines %v, %d refused", pids, refused)
	}
	m, err := h.Driver.Open(context.Background(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		wg.Go(func() {
			if err := m.Remove(context.Background()); err != nil {
				t.Errorf("Remove: %v", err)
			}
		})
	}
	wg.Wait()
	wantIDs(t, h.Driver)
}

// testCancel ends the context at several moments of a launch.
func testCancel(t *testing.T, h *Harness) {
	s := spec("cancel-3d10")
	for _, after := range []int{0, 2, 10, 30, 60} {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(after)*time.Millisecond)
		m, err := h.Driver.Launch(ctx, s)
		cancel()
		if err == nil {
			if err := m.Remove(context.Background()); err != nil {
				t.Errorf("Remove: %v", err)
			}
			continue
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Launch with a context that ends after %d ms: %v", after, err)
		}
		wantIDs(t, h.Driver)
		if left := h.Leftovers(t); len(left) > 0 {
			t.Errorf("Launch given up after %d ms left behind: %q", after, left)
		}
	}
}

func testStopHard(t *testing.T, h *Harness) {
	for _, grace := range []time.Duration{0, 300 * time.Millisecond} {
		m := launch(t, h, spec(fmt.Sprintf("hard-%d", grace)))
		begin := time.Now()
		// The guest has hardly begun to boot and cannot hear the button.
		if err := m.Stop(context.Background(), grace); err != nil {
			t.Fatalf("Stop: %v", err)
		}
		if d := time.Since(begin); d > grace+10*time.Second {
			t.Errorf("Stop with %v of grace took %v", grace, d)
		}
		wantExit(t, m, vmpod.ExitStopped)
	}
}

func testKillVMM(t *testing.T, h *Harness) {
	if h.KillVMM == nil {
		t.Skip("this hypervisor has no process of its own")
	}
	s := spec("kill-62b9")
	m := launch(t, h, s)
	h.KillVMM(t, m)
	wantExit(t, m, vmpod.ExitVMMKilled)
	// A new driver says the same.
	h.Driver = h.Restart(t, nil)
	m, err := h.Driver.Open(context.Background(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	wantExit(t, m, vmpod.ExitVMMKilled)
}

// testKillVMMUnseen: nobody was there to see the VMM die, so the reason may be
// unknown, but that it is off must be known at once.
func testKillVMMUnseen(t *testing.T, h *Harness) {
	if h.KillVMM == nil {
		t.Skip("this hypervisor has no process of its own")
	}
	s := spec("unseen-c3d4")
	m := launch(t, h, s)
	h.Driver = h.Restart(t, func() { h.KillVMM(t, m) })
	m, err := h.Driver.Open(context.Background(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	wantExit(t, m, vmpod.ExitVMMKilled, vmpod.ExitUnknown)
}

func testPoweroff(t *testing.T, h *Harness) {
	m := launch(t, h, spec("poweroff-8e21"))
	Dial(t, m).Tell("poweroff")
	wantExit(t, m, vmpod.ExitGuestPoweroff)
}

func testReset(t *testing.T, h *Harness) {
	m := launch(t, h, spec("reset-40aa"))
	Dial(t, m).Tell("reboot")
	wantExit(t, m, vmpod.ExitGuestReset)
}

// testPanicUnseen: the guest's kernel panics while no driver runs.
func testPanicUnseen(t *testing.T, h *Harness) {
	s := spec("panic-d00f")
	m := launch(t, h, s)
	k := Dial(t, m)
	k.Tell("panic")
	h.Driver = h.Restart(t, func() { time.Sleep(time.Second) })
	m, err := h.Driver.Open(context.Background(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	wantExit(t, m, vmpod.ExitGuestPanic)
}
