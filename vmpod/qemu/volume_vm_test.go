package qemu

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

const volumeKey = "QSBrZXkgdGhhdCBub2JvZHkgbWF5IHNlZQ=="

// qemuTool runs one of QEMU's tools; a key is on descriptor 3.
func qemuTool(t *testing.T, key, tool string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), tool, args...)
	if key != "" {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if _, err := w.WriteString(key); err != nil {
			t.Fatal(err)
		}
		w.Close()
		cmd.ExtraFiles = []*os.File{r}
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustTool(t *testing.T, key, tool string, args ...string) {
	t.Helper()
	if out, err := qemuTool(t, key, tool, args...); err != nil {
		t.Fatalf("%s %q: %v\n%s", tool, args, err, out)
	}
}

// testVolumes are one of each format, private to root.
func testVolumes(t *testing.T) map[string]vmpod.Disk {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	raw := func(name, content string, size int64) string {
		if err := os.WriteFile(at(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(at(name), size); err != nil {
			t.Fatal(err)
		}
		return at(name)
	}
	base := raw("base.raw", "from below\n", 8<<20)
	mustTool(t, "", "qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "not-there.raw", "-F", "raw", at("top.qcow2"), "8388608")
	for range 10 { // QEMU's clock for this counts ticks, and may see none
		out, err := qemuTool(t, volumeKey, "qemu-img", "create", "-q", "-f", "luks", "--object", "secret,id=key,format=raw,file=/proc/self/fd/3",
			"-o", "key-secret=key,iter-time=50", at("sealed.luks"), "8388608")
		if err == nil {
			break
		}
		if !strings.Contains(out, "accurate CPU usage") {
			t.Fatalf("qemu-img: %v\n%s", err, out)
		}
	}
	return map[string]vmpod.Disk{
		"plain":   {ID: "v-plain", Path: raw("plain.raw", "plain\n", 8<<20), Volume: &vmpod.Volume{ID: "plain"}},
		"limited": {ID: "v-limited", Path: raw("limited.raw", "limited\n", 16<<20), Volume: &vmpod.Volume{ID: "limited", IOPS: 100000, BytesPerSecond: 2 << 20, Thick: true}},
		"fixed":   {ID: "v-fixed", Path: raw("fixed.raw", "fixed\n", 4<<20), ReadOnly: true, Volume: &vmpod.Volume{ID: "fixed"}},
		"sealed":  {ID: "v-sealed", Path: at("sealed.luks"), Format: "luks", Volume: &vmpod.Volume{ID: "sealed", Key: []byte(volumeKey)}},
		"layered": {ID: "v-layered", Path: at("top.qcow2"), Format: "qcow2", Volume: &vmpod.Volume{ID: "layered", Backing: []vmpod.DiskFile{{Path: base, Format: "raw"}}}},
	}
}

// TestVolumes plugs volumes of each format into a guest, kills QEMU, and looks
// in another for what the first was told is written.
func TestVolumes(t *testing.T) {
	if testing.Short() {
		t.Skip("boots guests")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	volumes := testVolumes(t)
	d, m := launchHere(t, nil, smallSpec("volumes-7c1d"))
	k := vmpodtest.Dial(t, m)
	refuseVolumes(t, m, volumes)
	for _, v := range volumes {
		for range 2 {
			if err := m.Plug(ctx, vmpod.Device{Disk: &v}); err != nil {
				t.Fatal(err)
			}
		}
	}
	k.AskUntil("disks", func(a string) bool { return strings.Count(a, "v-") == len(volumes) })
	for id, want := range map[string]string{"v-plain": "plain", "v-layered": "from below", "v-fixed": "fixed"} {
		if got := k.Ask("read " + id); got != want {
			t.Errorf("guest reads %q from %s, want %q", got, id, want)
		}
	}
	if got := k.Ask("mark v-fixed no"); got != "failed" {
		t.Errorf("guest's write to a read-only volume: %s", got)
	}
	// Another QEMU cannot have it as well, whatever our own records say.
	if out, err := qemuTool(t, "", "qemu-io", "-f", "raw", "-c", "read 0 512", volumes["plain"].Path); err == nil || !strings.Contains(out, "lock") {
		t.Errorf("another QEMU opens a volume that a VM has: %v\n%s", err, out)
	}
	wantNoKey(t, d, m)
	testResize(t, m, k, volumes)
	testLimit(t, k)

	for _, id := range []string{"v-plain", "v-sealed", "v-layered"} {
		if got := k.Ask("mark " + id + " acknowledged-" + id); got != "ok" {
			t.Errorf("guest's write to %s: %s", id, got)
		}
	}
	if err := m.Unplug(ctx, "v-limited"); err != nil {
		t.Error(err)
	}
	wantNoObjects(t, m)
	if err := unix.Kill(m.proc.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(volumes["sealed"].Path); err != nil || bytes.Contains(b, []byte("acknowledged")) {
		t.Errorf("what was written to an encrypted volume can be read on the host (%v)", err)
	}
	next, err := d.Launch(ctx, smallSpec("volumes-7c1e"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { next.Remove(context.Background()) })
	k = vmpodtest.Dial(t, next)
	for _, name := range []string{"plain", "sealed", "layered"} {
		v := volumes[name]
		if err := next.(*Machine).Plug(ctx, vmpod.Device{Disk: &v}); err != nil {
			t.Fatal(err)
		}
		k.AskUntil("read "+v.ID, func(got string) bool { return got == "acknowledged-"+v.ID })
	}
}

func refuseVolumes(t *testing.T, m *Machine, volumes map[string]vmpod.Disk) {
	t.Helper()
	with := func(name string, change func(*vmpod.Disk, *vmpod.Volume)) *vmpod.Disk {
		d := volumes[name]
		v := *d.Volume
		d.Volume = &v
		change(&d, &v)
		return &d
	}
	for what, c := range map[string]struct {
		disk *vmpod.Disk
		is   func(error) bool
	}{
		"a wrong key":      {with("sealed", func(_ *vmpod.Disk, v *vmpod.Volume) { v.Key = []byte("b3BlbiBzZXNhbWUsIHBsZWFzZSE=") }), errdefs.IsPermissionDenied},
		"no key":           {with("sealed", func(_ *vmpod.Disk, v *vmpod.Volume) { v.Key = nil }), errdefs.IsInvalidArgument},
		"another's format": {with("plain", func(d *vmpod.Disk, _ *vmpod.Volume) { d.Format = "vmdk" }), errdefs.IsInvalidArgument},
		"layers below raw": {with("plain", func(_ *vmpod.Disk, v *vmpod.Volume) { v.Backing = volumes["layered"].Volume.Backing }), errdefs.IsInvalidArgument},
		"a missing layer": {with("layered", func(_ *vmpod.Disk, v *vmpod.Volume) {
			v.Backing = []vmpod.DiskFile{{Path: "/nonexistent/layer", Format: "raw"}}
		}), errdefs.IsNotFound},
	} {
		err := m.Plug(t.Context(), vmpod.Device{Disk: c.disk})
		if !c.is(err) {
			t.Errorf("Plug with %s: %v", what, err)
		}
		if err != nil && (strings.Contains(err.Error(), volumeKey) || strings.Contains(err.Error(), "b3BlbiBz")) {
			t.Errorf("an error shows the key: %v", err)
		}
	}
	if n := len(m.Spec().Disks); n != 0 {
		t.Errorf("refused volumes left %d disks", n)
	}
	wantNoObjects(t, m)
	s := smallSpec("boot-volume")
	s.Disks = []vmpod.Disk{volumes["plain"]}
	if _, err := m.d.Launch(t.Context(), s); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Launch with a volume: %v", err)
	}
}

// wantNoObjects checks that QEMU keeps no key, and no limit of what is gone.
func wantNoObjects(t *testing.T, m *Machine) {
	t.Helper()
	q, err := m.monitor(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var objects []struct {
		Name string `json:"name"`
	}
	if err := q.run(t.Context(), "qom-list", map[string]any{"path": "/objects"}, &objects); err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		if strings.HasPrefix(o.Name, "key-") || strings.HasPrefix(o.Name, "limit-") {
			t.Errorf("QEMU still has %s", o.Name)
		}
	}
}

// wantNoKey looks for the key where others can read: files, arguments, Spec.
func wantNoKey(t *testing.T, d *Driver, m *Machine) {
	t.Helper()
	for _, dir := range []string{d.cfg.StateDir, d.cfg.RunDir, fmt.Sprintf("/proc/%d/cmdline", m.proc.PID)} {
		filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			if err == nil && bytes.Contains(b, []byte(volumeKey)) {
				t.Errorf("%s has the key", path)
			}
			return err
		})
	}
	if s := fmt.Sprintf("%+v", m.Spec()); strings.Contains(s, volumeKey) {
		t.Error("the machine's Spec has the key")
	}
	for _, disk := range m.Spec().Disks {
		if disk.Volume != nil && disk.Volume.Key != nil {
			t.Error("the machine's Spec has the key")
		}
	}
}

// testResize grows what is plugged, where the back end has made room and where
// QEMU must.
func testResize(t *testing.T, m *Machine, k *vmpodtest.Talk, volumes map[string]vmpod.Disk) {
	t.Helper()
	if err := os.Truncate(volumes["plain"].Path, 12<<20); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"v-plain", "v-layered", "v-sealed", "v-limited"} {
		for _, size := range []int64{24 << 20, 24 << 20, 4 << 20} {
			if err := m.ResizeDisk(t.Context(), id, size); err != nil {
				t.Errorf("ResizeDisk: %v", err)
			}
		}
		k.AskUntil("disks", func(a string) bool { return strings.Contains(a, id+":49152:0") })
	}
	if err := m.ResizeDisk(t.Context(), "v-none", 1<<20); !errdefs.IsNotFound(err) {
		t.Errorf("ResizeDisk of nothing: %v", err)
	}
	if err := m.ResizeDisk(t.Context(), "v-fixed", 8<<20); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("ResizeDisk of a read-only volume: %v", err)
	}
}

// testLimit writes 8 MiB at 2 MiB/s. However slow the host is, it takes no
// less than that.
func testLimit(t *testing.T, k *vmpodtest.Talk) {
	t.Helper()
	seconds := func(id string) (took float64) {
		var begin, end float64
		answer := k.Ask("pour " + id + " 8")
		if _, err := fmt.Sscan(answer, &begin, &end); err != nil {
			t.Fatalf("pour %s: %s", id, answer)
		}
		return end - begin
	}
	limited, free := seconds("v-limited"), seconds("v-plain")
	t.Logf("8 MiB: %.2f s with a limit of 2 MiB/s, %.2f s without", limited, free)
	if limited < 3.5 {
		t.Errorf("8 MiB took %.2f s at 2 MiB/s", limited)
	}
}

// TestVolumeOnFullDatastore lets a guest write more than the host has room for.
// It must stand still, and go on without an error once there is room; also if
// another driver has taken over meanwhile.
func TestVolumeOnFullDatastore(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	dir := t.TempDir()
	if err := unix.Mount("atoll-test", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	v := vmpod.Disk{ID: "v-thin", Path: filepath.Join(dir, "thin.raw"), Volume: &vmpod.Volume{ID: "thin"}}
	if err := os.WriteFile(v.Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(v.Path, 64<<20); err != nil {
		t.Fatal(err)
	}
	cfg := testConfig(t)
	d := newDriver(t, cfg)
	t.Cleanup(func() { d.Close(); removeTestCgroups(d) })
	launched, err := d.Launch(t.Context(), smallSpec("full-volume-3e4f"))
	if err != nil {
		t.Fatal(err)
	}
	m := launched.(*Machine)
	t.Cleanup(func() {
		if err := m.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	k := vmpodtest.Dial(t, m)
	if err := m.Plug(t.Context(), vmpod.Device{Disk: &v}); err != nil {
		t.Fatal(err)
	}
	k.AskUntil("disks", func(a string) bool { return strings.Contains(a, "v-thin") })
	k.Tell("pour v-thin 16")
	awaitFull(t, m)
	makeRoom(t, dir, "40m")
	var begin, end float64
	answer := k.AskUntil("cpus", func(a string) bool { return a != "" }) // the answer to pour
	if _, err := fmt.Sscan(answer, &begin, &end); err != nil {
		t.Errorf("the guest's write that had to wait: %s", answer)
	}
	wantPoured(t, m, v.Path, 16)

	// Once more, and it is another driver's.
	k.Tell("pour v-thin 48")
	awaitFull(t, m)
	k.Close()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = newDriver(t, cfg)
	again, err := d.Open(t.Context(), m.id)
	if err != nil {
		t.Fatal(err)
	}
	m = again.(*Machine)
	awaitFull(t, m)
	makeRoom(t, dir, "96m")
	vmpodtest.Dial(t, m) // the guest answers when it has written
	wantPoured(t, m, v.Path, 48)
}

// awaitFull waits until a VM stands still because a datastore is full.
func awaitFull(t *testing.T, m *Machine) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		st, err := m.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if st.State == vmpod.StateUnknown && st.Reason == vmpod.ReasonHostDiskFull && strings.Contains(st.Message, "paused") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("status of a VM that writes to a full datastore: %+v", st)
		}
	}
}

func makeRoom(t *testing.T, dir, size string) {
	t.Helper()
	if err := unix.Mount("atoll-test", dir, "tmpfs", unix.MS_REMOUNT, "size="+size); err != nil {
		t.Fatal(err)
	}
}

// wantPoured looks at what a guest has written since there was room.
func wantPoured(t *testing.T, m *Machine, file string, mebibytes int) {
	t.Helper()
	b, err := os.ReadFile(file)
	if n := bytes.Count(b, []byte("atoll\n")); err != nil || n < mebibytes<<20/6-1 {
		t.Errorf("of %d MiB written %d lines are there (%v)", mebibytes, n, err)
	}
	if st, err := m.Status(t.Context()); err != nil || st.State != vmpod.StateRunning {
		t.Errorf("status once there is room: %+v, %v", st, err)
	}
}
