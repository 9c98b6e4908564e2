package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
)

// keptDriver makes no templates by itself and has those that a test gives it.
func keptDriver(t *testing.T) *Driver {
	t.Helper()
	d := bareDriver(t)
	for name, path := range map[string]*string{"qemu": &d.cfg.Binary, "vmlinux": &d.cfg.Guest.Kernel, "initrd": &d.cfg.Guest.Initrd} {
		*path = filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(*path, []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d.accel, d.qemu = AcceleratorTCG, binaryFacts{major: 7, minor: 2}
	d.cfg.Templates = Templates{Enabled: true, Memory: 100 << 20}
	d.cfg.GrowCPUs, d.cfg.GrowMemory = 4, 8<<30
	d.templates = newTemplateStore(d)
	var err error
	if d.templates.gen, err = d.generation(); err != nil {
		t.Fatal(err)
	}
	return d
}

// put gives the store a template that has used so many MiB.
func put(t *testing.T, d *Driver, sh shape, mib int) *templateEntry {
	t.Helper()
	ram, err := newRAM(sh.memory)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ram.Write(make([]byte, mib<<20)); err != nil {
		t.Fatal(err)
	}
	d.templates.mu.Lock()
	defer d.templates.mu.Unlock()
	e := d.templates.entry(sh)
	e.t, e.lastUsed = &template{shape: sh, name: "t", ram: ram, state: filepath.Join(t.TempDir(), "state")}, time.Now()
	e.set(templateReady)
	return e
}

func TestTemplateKey(t *testing.T) {
	d := keptDriver(t)
	sh := shape{cpus: 1, memory: 128 << 20}
	key := func() string {
		t.Helper()
		k, err := d.templateKey(sh)
		if err != nil || len(k) != 32 {
			t.Fatalf("key %q, %v", k, err)
		}
		return k
	}
	first := key()
	d.tscKHz = 2000118
	if key() != first {
		t.Error("the key depends on how fast the TSC was measured to be")
	}
	seen := map[string]string{first: "nothing"}
	for _, c := range []struct {
		what   string
		change func()
	}{
		{"CPUs", func() { sh.cpus = 2 }},
		{"memory", func() { sh.memory = 256 << 20 }},
		{"tenant", func() { sh.tenant = "a" }},
		{"furniture", func() { sh.furnished = true }},
		{"accelerator", func() { d.accel = AcceleratorKVM }},
		{"kernel command line", func() { d.cfg.Guest.Cmdline = "quiet" }},
		{"initramfs", func() { write(t, d.cfg.Guest.Initrd, "other") }},
		{"kernel", func() { write(t, d.cfg.Guest.Kernel, "other") }},
		{"QEMU", func() { write(t, d.cfg.Binary, "other") }},
		{"seccomp sandbox", func() { d.qemu.sandbox = true }},
	} {
		c.change()
		if other := seen[key()]; other != "" {
			t.Errorf("the key is the same after a change of %s as after one of %s", c.what, other)
		}
		seen[key()] = c.what
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestChoose(t *testing.T) {
	d := keptDriver(t)
	small, usual := shape{cpus: 1, memory: 304 << 20}, shape{cpus: 1, memory: 700 << 20}
	put(t, d, small, 1)
	put(t, d, usual, 1)
	spec := func(cpus int, mib int64) vmpod.Spec {
		return vmpod.Spec{ID: vmpod.ID{PodUID: "x"}, CPUs: cpus, Memory: mib << 20}
	}
	full := spec(1, 700)
	full.Disks = make([]vmpod.Disk, plugSlots)
	full.NICs = make([]vmpod.NIC, 1)
	for _, c := range []struct {
		what string
		spec vmpod.Spec
		want int64 // MiB of the template, 0 for none
		why  string
	}{
		{"its size", spec(1, 700), 700, ""},
		{"the smallest", spec(1, 304), 304, ""},
		{"less than the smallest", spec(1, 128), 0, coldMissing},
		{"between the two", spec(1, 699), 304, ""},
		{"above", spec(1, 2048), 700, ""},
		{"four times as large", spec(1, 2800), 700, ""},
		{"more than that", spec(1, 2804), 0, coldMissing},
		{"more than any could be grown to", spec(1, 5000), 0, coldSize},
		{"more than the host", spec(1, 9000), 0, coldSize},
		{"another number of CPUs", spec(2, 700), 0, coldMissing},
		{"more devices than there are places", full, 0, coldDevices},
	} {
		tmpl, why := d.templates.choose(c.spec)
		got := int64(0)
		if tmpl != nil {
			got = tmpl.shape.memory >> 20
			d.templates.release(tmpl)
		}
		if got != c.want || why != c.why {
			t.Errorf("%s: template of %d MiB, %q; want %d, %q", c.what, got, why, c.want, c.why)
		}
	}
	state := func(sh shape) templateState { return d.templates.entries[sh].state }
	if s := state(shape{cpus: 2, memory: 700 << 20}); s != templateWanted {
		t.Errorf("the first VM of two CPUs has a template %s", s)
	}
	between := shape{cpus: 1, memory: 699 << 20}
	if s := state(between); s != templateIdle {
		t.Errorf("after one VM that could be grown its template is %s", s)
	}
	tmpl, _ := d.templates.choose(spec(1, 699))
	d.templates.release(tmpl)
	if s := state(between); s != templateWanted {
		t.Errorf("after two it is %s", s)
	}
	// What is in use outlives its dismissal.
	tmpl, _ = d.templates.choose(spec(1, 700))
	d.templates.failed(tmpl, os.ErrInvalid)
	if used(tmpl.ram) == 0 {
		t.Error("a template was closed under a launch")
	}
	d.templates.release(tmpl)
	if used(tmpl.ram) != 0 {
		t.Error("a template that failed is still there")
	}
	if tmpl, _ := d.templates.choose(spec(1, 700)); tmpl == nil || tmpl.shape != small {
		t.Errorf("after the failure: %+v", tmpl)
	}
}

func TestTenants(t *testing.T) {
	d := keptDriver(t)
	d.cfg.Templates.PerTenant = true
	d.cfg.Templates.Sizes = []Size{{1, 128 << 20}}
	d.templates.pin()
	if len(d.templates.entries) != 0 {
		t.Error("a template is made for nobody")
	}
	s := smallSpec("a")
	s.Owner.Namespace = "red"
	put(t, d, d.shapeOf(s), 1)
	if tmpl, why := d.templates.choose(s); tmpl == nil {
		t.Errorf("its own: %s", why)
	}
	s.Owner.Namespace = "blue"
	if tmpl, _ := d.templates.choose(s); tmpl != nil {
		t.Errorf("a namespace gets the template of %s", tmpl.shape.tenant)
	}
}

func TestNoTemplates(t *testing.T) {
	d := keptDriver(t)
	d.cfg.Templates.Enabled = false
	if tmpl, why := newTemplateStore(d).choose(smallSpec("a")); tmpl != nil || why != coldDisabled {
		t.Errorf("switched off: %v, %q", tmpl, why)
	}
	d.cfg.Templates.Enabled = true
	d.cfg.HostDirectories = []vmpod.HostDirectory{{Path: "/srv"}}
	if tmpl, why := newTemplateStore(d).choose(smallSpec("a")); tmpl != nil || why != coldShares {
		t.Errorf("with host directories: %v, %q", tmpl, why)
	}
}

func TestEvict(t *testing.T) {
	d := keptDriver(t)
	var es []*templateEntry
	for i := range 4 {
		e := put(t, d, shape{cpus: i + 1, memory: 128 << 20}, 40)
		e.lastUsed = time.Now().Add(time.Duration(i) * time.Second)
		es = append(es, e)
	}
	es[0].pinned = true
	d.templates.evict(es[3])
	var left []int
	for i, e := range es {
		if d.templates.entries[e.shape] == e {
			left = append(left, i)
		}
	}
	if len(left) != 2 || left[0] != 0 || left[1] != 3 {
		t.Errorf("of 100 MiB for four of 40 are left %v, want the pinned one and the new one", left)
	}
	d.cfg.Templates.Memory = 60 << 20
	w := &scratch{d: d, template: es[0].t}
	d.templates.warm = []*scratch{w}
	d.templates.evict(es[3])
	d.templates.ending.Wait()
	if es[0].state != templateIdle || es[0].t != nil || es[3].state != templateReady {
		t.Errorf("where there is room for one, the pinned one is %s and the new one %s", es[0].state, es[3].state)
	}
	if len(d.templates.warm) != 0 {
		t.Error("a clone of a template that was dropped waits on")
	}
	if e, _ := d.templates.nextWanted(); e != nil {
		t.Errorf("without room, %+v is to be made", e.shape)
	}
	d.templates.failed(es[3].t, os.ErrInvalid)
	if e, _ := d.templates.nextWanted(); e != es[0] {
		t.Errorf("with room again, not the pinned one is made but %+v", e)
	}
}

// TestUseless: templates that can be made but not cloned are given up too.
func TestUseless(t *testing.T) {
	d := keptDriver(t)
	sh := shape{cpus: 1, memory: 128 << 20}
	e := put(t, d, sh, 1)
	fail := func(times int) {
		for range times {
			put(t, d, sh, 1)
			d.templates.failed(e.t, os.ErrInvalid)
		}
	}
	fail(templateAttempts - 1)
	if e.state != templateWanted {
		t.Errorf("after %d failures it is %s", e.attempts, e.state)
	}
	put(t, d, sh, 1)
	d.templates.worked(e.t)
	fail(templateAttempts - 1)
	if e.state != templateWanted {
		t.Errorf("after one that worked and %d failures it is %s", e.attempts, e.state)
	}
	if fail(1); e.state != templateFailed {
		t.Errorf("after %d failures it is %s", e.attempts, e.state)
	}
}

// TestSuccessor: the end of a template that was in use when it was made anew
// leaves the new one's files.
func TestSuccessor(t *testing.T) {
	d := keptDriver(t)
	if err := os.MkdirAll(d.templateDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	var made []*template
	for i := range 2 {
		e := put(t, d, shape{cpus: 1, memory: 128 << 20}, 1)
		e.t.made = time.Now().Add(time.Duration(i))
		e.t.state = d.stateFile(e.t.name, e.t.made)
		write(t, e.t.state, "state")
		if err := d.recordTemplate(e.t); err != nil {
			t.Fatal(err)
		}
		made = append(made, e.t)
	}
	left := func() int {
		entries, _ := os.ReadDir(d.templateDir())
		return len(entries)
	}
	d.dropTemplate(made[0])
	if _, err := os.Stat(made[1].state); err != nil || left() != 2 {
		t.Errorf("%d files are left, want the state and the record of the second: %v", left(), err)
	}
	if d.dropTemplate(made[1]); left() != 0 {
		t.Errorf("%d files are left of none", left())
	}
}

func TestTemplateBackoff(t *testing.T) {
	e := &templateEntry{changed: make(chan struct{})}
	for n, want := range map[int]time.Duration{1: templateBackoff, 2: 2 * templateBackoff, 6: 32 * templateBackoff, 7: templateMaxBackoff, 64: templateMaxBackoff, 1000: templateMaxBackoff} {
		e.attempts = n
		if got := e.again(); got != want || e.state != templateWanted {
			t.Errorf("after %d attempts the next is put off by %v and it is %s, want %v", n, got, e.state, want)
		}
	}
}

// TestRAMOfAClone: of what a process has open only what is sealed and has the
// content that was noted is taken for a template.
func TestRAMOfAClone(t *testing.T) {
	ram, err := newRAM(8 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer ram.Close()
	if _, err := ram.WriteAt([]byte("guest"), 4<<20+77); err != nil {
		t.Fatal(err)
	}
	digest, err := digestOf(ram)
	if err != nil {
		t.Fatal(err)
	}
	self := process{PID: os.Getpid()}
	if f := ramOf(self, 8<<20, digest); f != nil {
		t.Error("a template that can be written to was taken")
	}
	if err := seal(ram); err != nil {
		t.Fatal(err)
	}
	if f := ramOf(self, 8<<20, strings.Repeat("0", 64)); f != nil {
		t.Error("a template of another content was taken")
	}
	if f := ramOf(self, 4<<20, digest); f != nil {
		t.Error("a template of another size was taken")
	}
	f := ramOf(self, 8<<20, digest)
	if f == nil {
		t.Fatal("the template was not found")
	}
	defer f.Close()
	// A hole that a clone has read is a page of zeros from then on.
	b, err := unix.Mmap(int(f.Fd()), 0, 8<<20, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	before := used(f)
	if b[1<<20] != 0 || used(f) <= before {
		t.Skip("this kernel does not fill holes that are read")
	}
	if again, err := digestOf(f); err != nil || again != digest {
		t.Errorf("the digest changes when a hole is read: %v", err)
	}
}
