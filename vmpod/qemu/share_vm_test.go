package qemu

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// sharedTree is a directory of a mount of its own with a mount in it, which
// both are shared as hosts have it.
func sharedTree(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	mountTmpfs(t, dir)
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []string{"inner", "late"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mountTmpfs(t, filepath.Join(dir, "inner"))
	for _, f := range []string{"file", "inner/file"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("host\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/etc", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func mountTmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := unix.Mount("atoll-test", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
}

// TestShares plugs host directories in every mode, by two drivers one after
// the other, and looks from both sides.
func TestShares(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a guest")
	}
	if _, err := FindVirtiofsd(t.Context()); err != nil {
		if slices.ContainsFunc(virtiofsdPaths, func(p string) bool { _, err := os.Stat(p); return err == nil }) {
			t.Fatal(err) // it is there
		}
		t.Skip(err)
	}
	dir := sharedTree(t)
	cfg := testConfig(t)
	cfg.HostDirectories = []vmpod.HostDirectory{{Path: dir}}
	d := newDriver(t, cfg)
	t.Cleanup(func() { d.Close(); removeTestCgroups(d) })
	launched, err := d.Launch(t.Context(), smallSpec("share-a1a1"))
	if err != nil {
		t.Fatal(err)
	}
	m := launched.(*Machine)
	k := vmpodtest.Dial(t, m)
	plug := func(s vmpod.Share) {
		t.Helper()
		for range 2 {
			if err := m.Plug(t.Context(), vmpod.Device{Share: &s}); err != nil {
				t.Fatal(err)
			}
		}
		k.AskUntil("share "+s.ID, func(a string) bool { return a == "ok" })
	}
	plug(vmpod.Share{ID: "rw", Path: dir})
	plug(vmpod.Share{ID: "ro", Path: dir, ReadOnly: true})
	plug(vmpod.Share{ID: "rro", Path: dir, ReadOnly: true, RecursiveReadOnly: true})
	plug(vmpod.Share{ID: "follow", Path: dir, Follow: true})
	plug(vmpod.Share{ID: "file", Path: filepath.Join(dir, "file"), ReadOnly: true})

	lookAtShares(t, k, dir)
	// Memory that comes later is the server's to reach as well.
	if err := m.Grow(t.Context(), 0, 256<<20); err != nil {
		t.Fatal(err)
	}
	k.Ask("online")
	k.AskUntil("fill 160", func(a string) bool { return a == "ok" })
	if got := k.Ask("put /share/rw/grown guest") + k.Ask("first /share/rw/grown"); got != "okguest" {
		t.Errorf("in a guest that has grown: %q", got)
	}
	refuseShares(t, m, dir)
	testServersCgroup(t, m)

	// The next driver adopts them, and takes one back.
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
	if n := len(m.Spec().Shares); n != 5 {
		t.Errorf("%d shares were adopted, want 5", n)
	}
	k = vmpodtest.Dial(t, m)
	if got := k.Ask("first /share/rw/file"); got != "host" {
		t.Errorf("after another driver has come: %q", got)
	}
	testLostServer(t, m)
	servers := m.table().Shares
	if err := m.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, s := range servers {
		if fd, err := s.Server.open(); err == nil {
			fd.Close()
			t.Errorf("server %d of %s lives on", s.Server.PID, s.ID)
		}
	}
	if left := leftovers(t, cfg); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// lookAtShares reads and writes on one side what the other side sees.
func lookAtShares(t *testing.T, k *vmpodtest.Talk, dir string) {
	t.Helper()
	for _, c := range []struct{ ask, want string }{
		{"first /share/rw/file", "host"},
		{"first /share/rw/inner/file", "host"},
		{"put /share/rw/new guest", "ok"},
		{"put /share/ro/no x", "failed"},
		{"put /share/ro/inner/yes guest", "ok"},
		{"put /share/rro/no x", "failed"},
		{"put /share/rro/inner/no x", "failed"},
		{"list /share/file", "file"},
		{"first /share/file/file", "host"},
		{"put /share/file/file x", "failed"},
		{"put /share/file/other x", "failed"},
		{"device /share/rw/null", "failed"},
	} {
		if got := k.Ask(c.ask); got != c.want {
			t.Errorf("%s: %q, want %q", c.ask, got, c.want)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "new")); err != nil || string(b) != "guest\n" {
		t.Errorf("what the guest wrote: %q, %v", b, err)
	}
	mountTmpfs(t, filepath.Join(dir, "late"))
	if err := os.WriteFile(filepath.Join(dir, "late/file"), []byte("late\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	k.AskUntil("first /share/follow/late/file", func(a string) bool { return a == "late" })
	if got := k.Ask("list /share/rw/late"); got != "" {
		t.Errorf("a mount that came later is seen by a guest that does not follow: %q", got)
	}
}

// testServersCgroup: what serves a VM is counted as the VM's.
func testServersCgroup(t *testing.T, m *Machine) {
	t.Helper()
	if len(m.proc.Cgroups) == 0 {
		return
	}
	for _, s := range m.table().Shares {
		pid := strconv.Itoa(s.Server.PID)
		children, _ := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
		for _, p := range append(strings.Fields(string(children)), pid) {
			if b, err := os.ReadFile("/proc/" + p + "/cgroup"); err != nil || !strings.Contains(string(b), m.id.String()) {
				t.Errorf("process %s of share %s is in %q, %v", p, s.ID, b, err)
			}
		}
	}
}

// refuseShares asks for what must not be, and for what cannot.
func refuseShares(t *testing.T, m *Machine, dir string) {
	t.Helper()
	before := m.table().size()
	for name, s := range map[string]vmpod.Share{
		"outside":     {ID: "x", Path: "/etc"},
		"by a link":   {ID: "x", Path: filepath.Join(dir, "link")},
		"behind one":  {ID: "x", Path: filepath.Join(dir, "link/ssh")},
		"other modes": {ID: "rw", Path: dir, ReadOnly: true},
		"missing":     {ID: "x", Path: filepath.Join(dir, "missing")},
	} {
		if err := m.Plug(t.Context(), vmpod.Device{Share: &s}); err == nil {
			t.Errorf("%s: shared", name)
		} else if name == "by a link" && !errdefs.IsPermissionDenied(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if after := m.table().size(); after != before {
		t.Errorf("%d devices after refusals, %d before", after, before)
	}
}

// testLostServer kills one server: it is told, and the others go on.
func testLostServer(t *testing.T, m *Machine) {
	t.Helper()
	var lost shareEntry
	for _, s := range m.table().Shares {
		if s.ID == "ro" {
			lost = s
		}
	}
	if err := unix.Kill(lost.Server.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		st, err := m.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if st.Reason == vmpod.ReasonHostDirectoryLost && st.State == vmpod.StateRunning {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	k := vmpodtest.Dial(t, m)
	if got := k.Ask("first /share/rw/file"); got != "host" {
		t.Errorf("beside a server that has ended: %q", got)
	}
}
