package qemu

import (
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/openatoll/atoll/vmpod"
	"github.com/openatoll/atoll/vmpod/vmpodtest"
)

// testUser is whom QEMU runs as in tests: nobody, who may read nothing here.
const testUser = 65534

// logWriter sends the driver's log to the test.
type logWriter struct{ t testing.TB }

func (w logWriter) Write(b []byte) (int, error) {
	if w.t.Context().Err() == nil {
		w.t.Log(strings.TrimSpace(string(b)))
	}
	return len(b), nil
}

// testConfig returns a Config over directories of the test's own.
func testConfig(t testing.TB) Config {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	g := vmpodtest.BuildGuest(t)
	// Not t.TempDir: its paths are too long for sockets.
	run, err := os.MkdirTemp("/run", "atoll-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.RemoveAll(run)
		cgroups, _ := filepath.Glob("/sys/fs/cgroup/*/" + filepath.Base(run)) // the driver's parent of all VMs
		for _, c := range append(cgroups, "/sys/fs/cgroup/"+filepath.Base(run)) {
			os.Remove(c)
		}
	})
	return Config{
		Guest: Guest{Kernel: g.Kernel, Initrd: g.Initrd}, StateDir: t.TempDir(), RunDir: run,
		UID: testUser, GID: testUser, Accelerator: AcceleratorAuto,
		Cgroup: filepath.Base(run),
		Logger: slog.New(slog.NewTextHandler(logWriter{t}, nil)),
	}
}

func newDriver(t testing.TB, cfg Config) *Driver {
	t.Helper()
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDriver(t *testing.T) {
	vmpodtest.Run(t, func(t *testing.T) *vmpodtest.Harness {
		cfg := testConfig(t)
		d := newDriver(t, cfg)
		h := &vmpodtest.Harness{Driver: d}
		h.Restart = func(t testing.TB, between func()) vmpod.Driver {
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if between != nil {
				between()
			}
			d = newDriver(t, cfg)
			return d
		}
		h.Disk = makeDisk
		h.KillVMM = func(t testing.TB, m vmpod.Machine) {
			if err := unix.Kill(m.(*Machine).proc.PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		h.Leftovers = func(t testing.TB) []string { return leftovers(t, cfg) }
		t.Cleanup(func() {
			d.Close()
			removeTestCgroups(d)
		})
		return h
	})
}

// removeTestCgroups removes the topmost group, which drivers leave standing.
func removeTestCgroups(d *Driver) {
	for _, tree := range d.trees {
		os.Remove(filepath.Join(tree.root, d.cfg.Cgroup))
	}
}

func makeDisk(t testing.TB, id, content string, size int64) vmpod.Disk {
	t.Helper()
	path := filepath.Join(t.TempDir(), id)
	if err := os.WriteFile(path, []byte(content+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return vmpod.Disk{ID: id, Path: path}
}

// leftovers lists what a driver with cfg made and did not take back.
func leftovers(t testing.TB, cfg Config) []string {
	t.Helper()
	var left []string
	add := func(dir string, ours func(string) bool) {
		filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && path != dir && ours(path) {
				left = append(left, path)
			}
			return nil
		})
	}
	// Templates stay as long as there is a driver, or a clone to find them by.
	add(cfg.RunDir, func(p string) bool {
		in := filepath.Base(filepath.Dir(p)) == "templates"
		return filepath.Base(p) != "templates" && !(in && (strings.HasSuffix(p, stateSuffix) || strings.HasSuffix(p, recordSuffix)))
	})
	add(cfg.StateDir, func(p string) bool { b := filepath.Base(p); return b != ".lock" && b != probeFile })
	for _, h := range hierarchies("/sys/fs/cgroup") {
		add(filepath.Join(h.root, cfg.Cgroup), func(p string) bool {
			st, err := os.Stat(p)
			return err == nil && st.IsDir()
		})
	}
	// A QEMU of ours has its console's directory open, or was told our names.
	procs, _ := filepath.Glob("/proc/[0-9]*/fd/2")
	for _, p := range procs {
		if target, err := os.Readlink(p); err == nil && strings.HasPrefix(target, cfg.StateDir) {
			left = append(left, p+" -> "+target)
		}
	}
	return left
}
