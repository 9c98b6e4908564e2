package qemu

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// probeTalk is the Probe of the suite's guest.
func probeTalk(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write([]byte("\nready\n")); err != nil {
		return err
	}
	for r := bufio.NewReader(conn); ; {
		line, err := r.ReadString('\n')
		if err != nil || strings.Contains(line, "ready") {
			return err
		}
	}
}

// foundry is where the tests' templates are made, each once: RAM and state by
// the number of CPUs.
var foundry struct {
	sync.Mutex
	cast map[int]*template
}

// castTemplate makes the template of a small VM, or returns the one that is.
func castTemplate(t testing.TB, cpus int) *template {
	t.Helper()
	foundry.Lock()
	defer foundry.Unlock()
	if made := foundry.cast[cpus]; made != nil {
		return made
	}
	cfg := testConfig(t)
	cfg.Templates = Templates{Enabled: true, Probe: probeTalk}
	d := newDriver(t, cfg)
	defer func() { d.Close(); removeTestCgroups(d) }()
	s := smallSpec("cast")
	s.CPUs = cpus
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := d.AwaitTemplate(ctx, s); err != nil {
		t.Fatal(err)
	}
	d.templates.mu.Lock()
	defer d.templates.mu.Unlock()
	made := *d.templates.entries[d.shapeOf(s)].t
	fd, err := unix.Dup(int(made.ram.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	made.ram = os.NewFile(uintptr(fd), made.ram.Name())
	state, err := os.ReadFile(made.state)
	if err != nil {
		t.Fatal(err)
	}
	made.state = string(state) // its content: the directory goes with the driver
	if foundry.cast == nil {
		foundry.cast = map[int]*template{}
	}
	foundry.cast[cpus] = &made
	return &made
}

// lend gives a driver a template as if it had made it.
func lend(t testing.TB, d *Driver, cpus int) *template {
	t.Helper()
	lent := *castTemplate(t, cpus)
	<-d.templates.recovered // or it would be taken for what is left of another
	fd, err := unix.Dup(int(lent.ram.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	lent.ram = os.NewFile(uintptr(fd), lent.ram.Name())
	content := lent.state
	lent.state = d.stateFile(lent.name, lent.made)
	if err := os.MkdirAll(d.templateDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(lent.state, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.recordTemplate(&lent); err != nil {
		t.Fatal(err)
	}
	d.templates.mu.Lock()
	defer d.templates.mu.Unlock()
	e := d.templates.entry(lent.shape)
	e.t = &lent
	e.set(templateReady)
	return &lent
}

// cloning is a driver that clones machines of one CPU.
func cloning(t *testing.T, change func(*Config)) (*Driver, Config, *template) {
	t.Helper()
	if testing.Short() {
		t.Skip("boots a guest")
	}
	cfg := testConfig(t)
	cfg.Templates = Templates{Enabled: true, Probe: probeTalk}
	if change != nil {
		change(&cfg)
	}
	castTemplate(t, 1)
	d := newDriver(t, cfg)
	t.Cleanup(func() { d.Close(); removeTestCgroups(d) })
	return d, cfg, lend(t, d, 1)
}

func launchVM(t testing.TB, d *Driver, s vmpod.Spec) *Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	m, err := d.Launch(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if m, err := d.Open(context.Background(), s.ID); err == nil {
			_ = m.Remove(context.Background())
		}
	})
	return m.(*Machine)
}

// TestClonedDriver holds machines that are clones to what the suite asks of
// those that booted.
func TestClonedDriver(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests")
	}
	vmpodtest.Run(t, func(t *testing.T) *vmpodtest.Harness {
		d, cfg, _ := cloning(t, nil)
		lend(t, d, 2)
		cold := func() {
			for _, l := range d.Launches() {
				if l.Kind == kindCold {
					t.Errorf("%d VMs were booted: %s", l.Count, l.Reason)
				}
			}
		}
		h := &vmpodtest.Harness{Driver: d, Disk: makeDisk}
		h.Restart = func(t testing.TB, between func()) vmpod.Driver {
			cold()
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if between != nil {
				between()
			}
			d = newDriver(t, cfg)
			return d
		}
		h.KillVMM = func(t testing.TB, m vmpod.Machine) {
			if err := unix.Kill(m.(*Machine).proc.PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		h.Leftovers = func(t testing.TB) []string { return leftovers(t, cfg) }
		t.Cleanup(func() { cold(); d.Close() })
		return h
	})
}

// TestTemplateIsSealed tries to write into a template from where a clone has
// it, and finds it again in a clone after the driver is gone.
func TestTemplateIsSealed(t *testing.T) {
	d, cfg, made := cloning(t, nil)
	m := launchVM(t, d, smallSpec("sealed-1"))
	if o := m.Origin(); !o.Cloned || o.Grown || o.Reason != "" {
		t.Fatalf("origin: %+v", o)
	}
	vmpodtest.Dial(t, m)
	links, _ := filepath.Glob("/proc/" + strconv.Itoa(m.proc.PID) + "/fd/*")
	found := 0
	for _, link := range links {
		target, _ := os.Readlink(link)
		if !strings.HasPrefix(target, "/memfd:atoll-template") {
			continue
		}
		found++
		f, err := os.OpenFile(link, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
			t.Errorf("write to a template's RAM: %v", err)
		}
		if _, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_WRITE, unix.MAP_SHARED); !errors.Is(err, unix.EPERM) {
			t.Errorf("map a template's RAM to write to it: %v", err)
		}
		if err := f.Truncate(0); !errors.Is(err, unix.EPERM) {
			t.Errorf("truncate a template's RAM: %v", err)
		}
		f.Close()
	}
	if found == 0 {
		t.Error("the clone has nothing of its template")
	}
	for _, path := range []string{made.state, d.templateDir()} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	if sum, err := digestOf(made.ram); err != nil || sum != made.digest {
		t.Errorf("digest after a clone has run: %s, %v, was %s", sum, err, made.digest)
	}

	d.Close()
	d = newDriver(t, cfg)
	t.Cleanup(func() { d.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := d.AwaitTemplate(ctx, smallSpec("any")); err != nil {
		t.Fatal(err)
	}
	if again := d.templates.entries[d.shapeOf(smallSpec("any"))].t; !again.made.Equal(made.made) {
		t.Errorf("the template was made anew, at %v", again.made)
	}
	again := launchVM(t, d, smallSpec("sealed-2"))
	vmpodtest.Dial(t, again)
	for _, id := range []vmpod.ID{m.id, again.id} {
		if m, err := d.Open(ctx, id); err != nil || m.(*Machine).Origin().Cloned != true {
			t.Errorf("adopted: %v", err)
		} else if err := m.Remove(ctx); err != nil {
			t.Error(err)
		}
	}
	d.Close()
	if left, _ := os.ReadDir(cfg.RunDir + "/templates"); len(left) > 0 {
		t.Errorf("of a template without clones is left: %v", left)
	}
}

// TestClonesGrowToTheirSize launches a machine larger than the template.
func TestClonesGrowToTheirSize(t *testing.T) {
	d, _, made := cloning(t, nil)
	s := smallSpec("odd-1")
	s.Memory = 211 << 20
	s.Disks = []vmpod.Disk{makeDisk(t, "eph", "writable", 16<<20)}
	m := launchVM(t, d, s)
	if o := m.Origin(); !o.Cloned || !o.Grown {
		t.Fatalf("origin: %+v", o)
	}
	k := vmpodtest.Dial(t, m)
	before := memory(t, launchVM(t, d, smallSpec("odd-2")))
	k.AskUntil("memory", func(a string) bool {
		k.Ask("online")
		kib, _ := strconv.ParseInt(a, 10, 64)
		return kib<<10 >= before+s.Memory-made.shape.memory-8<<20
	})
	if e, err := m.Extent(t.Context()); err != nil || e.Memory != 212<<20 || e.CPUs != 1 || m.Spec().Memory != 212<<20 {
		t.Errorf("extent %+v, %v; spec %d", e, err, m.Spec().Memory)
	}
	if err := m.Grow(t.Context(), 0, 300<<20); err != nil {
		t.Errorf("Grow: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(firstMemoryGroup(m), "memory.limit_in_bytes")); err == nil {
		if n, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); n < 300<<20+d.cfg.Overhead {
			t.Errorf("limit of the cgroup: %d", n)
		}
	}
	s.ID.PodUID, s.Memory = "huge-1", 4*made.shape.memory+1
	if tmpl, why := d.templates.choose(s); tmpl != nil || why != coldMissing {
		t.Errorf("a VM more than four times as large: %v, %s", tmpl, why)
	}
}

func firstMemoryGroup(m *Machine) string {
	for _, dir := range m.proc.Cgroups {
		if _, err := os.Stat(filepath.Join(dir, "memory.limit_in_bytes")); err == nil {
			return dir
		}
	}
	return "/nonexistent"
}

func memory(t *testing.T, m *Machine) int64 {
	t.Helper()
	kib, err := strconv.ParseInt(vmpodtest.Dial(t, m).Ask("memory"), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// TestBadTemplate: what cannot be loaded is thrown away, and the VM boots. So
// it does when the guest is another one.
func TestBadTemplate(t *testing.T) {
	d, cfg, made := cloning(t, func(c *Config) {
		initrd, err := os.ReadFile(c.Guest.Initrd)
		if err != nil {
			t.Fatal(err)
		}
		c.Guest.Initrd = filepath.Join(t.TempDir(), "initrd")
		if err := os.WriteFile(c.Guest.Initrd, initrd, 0o644); err != nil {
			t.Fatal(err)
		}
	})
	if err := os.Truncate(made.state, 1000); err != nil {
		t.Fatal(err)
	}
	m := launchVM(t, d, smallSpec("broken-1"))
	if o := m.Origin(); o.Cloned || o.Reason != coldFailed {
		t.Errorf("origin: %+v", o)
	}
	if tmpl, why := d.templates.choose(smallSpec("broken-2")); tmpl != nil || why != coldMissing {
		t.Errorf("after that: %v, %s", tmpl, why)
	}
	lend(t, d, 1)
	now := time.Now().Add(time.Second)
	if err := os.Chtimes(cfg.Guest.Initrd, now, now); err != nil {
		t.Fatal(err)
	}
	if tmpl, why := d.templates.choose(smallSpec("broken-3")); tmpl != nil || why != coldChanged {
		t.Errorf("after a change of the guest: %v, %s", tmpl, why)
	}
	if err := m.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestWarm takes a clone that has been waiting.
func TestWarm(t *testing.T) {
	small := smallSpec("warm-1")
	d, cfg, _ := cloning(t, func(c *Config) {
		c.Templates.Warm = 1
		c.Templates.Sizes = []Size{{small.CPUs, small.Memory - 1}} // as no template is: they have whole MiB
	})
	d.templates.mu.Lock()
	d.templates.entries[d.shapeOf(small)].pinned = true
	d.templates.mu.Unlock()
	d.templates.kick()
	for end := time.Now().Add(time.Minute); d.waiting() == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no clone waits")
		}
	}
	small.Disks = []vmpod.Disk{makeDisk(t, "eph", "writable", 16<<20)}
	m := launchVM(t, d, small)
	if l := d.Launches(); len(l) != 1 || l[0].Kind != kindWarm {
		t.Errorf("launches: %+v", l)
	}
	k := vmpodtest.Dial(t, m)
	k.AskUntil("disks", func(a string) bool { return a == "eph:32768:0" })
	d.Close()
	d = newDriver(t, cfg)
	t.Cleanup(func() { d.Close() })
	again, err := d.Open(t.Context(), m.id)
	if err != nil {
		t.Fatal(err)
	}
	vmpodtest.Dial(t, again)
	if err := again.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	d.Close()
	if left := leftovers(t, cfg); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func (d *Driver) waiting() int {
	d.templates.mu.Lock()
	defer d.templates.mu.Unlock()
	return len(d.templates.warm)
}
