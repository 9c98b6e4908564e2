package qemu

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/openatoll/atoll/vmpod"
)

// bareDriver is a Driver that finds VMs but cannot launch any.
func bareDriver(t *testing.T) *Driver {
	t.Helper()
	d := &Driver{
		cfg:      Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Deadline: 100 * time.Millisecond, ConsoleLimit: 1 << 10},
		log:      slog.New(slog.NewTextHandler(logWriter{t}, nil)),
		machines: map[vmpod.ID]*Machine{}, turns: map[vmpod.ID]*turn{},
		users: newUserTable(0, 0), nowhere: newNowhere(),
	}
	d.life, d.detach = context.WithCancel(context.Background())
	d.templates = newTemplateStore(d)
	var err error
	if d.lock, err = lockDir(d.cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// deadProcess is one that was started and has ended.
func deadProcess(t *testing.T) process {
	t.Helper()
	cmd := exec.Command("/bin/true")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	return process{PID: cmd.Process.Pid, Start: 1, BootID: boot, StartedAt: time.Now()}
}

// TestAdoptEnded finds VMs whose QEMU ended while no driver ran.
func TestAdoptEnded(t *testing.T) {
	otherBoot := func(p process) process { p.BootID = "other"; return p }
	reused := func(p process) process { p.PID = os.Getpid(); return p } // with another start time
	for name, c := range map[string]struct {
		process func(process) process
		stop    bool
		exit    *vmpod.Exit
		stderr  string
		want    vmpod.ExitReason
	}{
		"gone":            {want: vmpod.ExitUnknown},
		"pid reused":      {process: reused, want: vmpod.ExitUnknown},
		"host restarted":  {process: otherBoot, want: vmpod.ExitHostRestart},
		"was stopped":     {stop: true, want: vmpod.ExitStopped},
		"was recorded":    {exit: &vmpod.Exit{Reason: vmpod.ExitGuestPanic, Message: "m", At: time.Now()}, stop: true, want: vmpod.ExitGuestPanic},
		"told why itself": {stderr: "x\nqemu: terminating on signal 15 from pid 1\n", want: vmpod.ExitVMMKilled},
	} {
		t.Run(name, func(t *testing.T) {
			d := bareDriver(t)
			s := fullSpec()
			dir, err := createVMDir(d.cfg.StateDir, s)
			if err != nil {
				t.Fatal(err)
			}
			p := deadProcess(t)
			if c.process != nil {
				p = c.process(p)
			}
			if err := dir.write(processFile, p); err != nil {
				t.Fatal(err)
			}
			if c.stop {
				if err := dir.write(stopFile, stopIntent{time.Now()}); err != nil {
					t.Fatal(err)
				}
			}
			if c.exit != nil {
				if err := dir.write(exitFile, *c.exit); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(dir.file(stderrFile), []byte(c.stderr), 0o600); err != nil {
				t.Fatal(err)
			}
			m, err := d.Open(t.Context(), s.ID)
			if err != nil {
				t.Fatal(err)
			}
			e, err := m.Wait(t.Context())
			if err != nil || e.Reason != c.want {
				t.Errorf("Wait: %+v, %v, want %s", e, err, c.want)
			}
			if !equalSpecs(m.Spec(), s) {
				t.Errorf("Spec: %+v, want %+v", m.Spec(), s)
			}
			if st, err := m.Status(t.Context()); err != nil || st.State != vmpod.StateStopped || st.PID != 0 {
				t.Errorf("Status: %+v, %v", st, err)
			}
			var recorded vmpod.Exit
			if ok, err := dir.read(exitFile, &recorded); !ok || err != nil || recorded.Reason != c.want {
				t.Errorf("exit.json: %+v, %v, %v", recorded, ok, err)
			}
			if err := m.Remove(t.Context()); err != nil {
				t.Error(err)
			}
			if _, err := d.Open(t.Context(), s.ID); !errdefs.IsNotFound(err) {
				t.Errorf("Open after Remove: %v", err)
			}
		})
	}
}

// TestAdoptDamaged: one VM whose record is damaged does not hide the others.
func TestAdoptDamaged(t *testing.T) {
	d := bareDriver(t)
	good, bad := fullSpec(), fullSpec()
	bad.ID.Attempt = 9
	for _, s := range []vmpod.Spec{good, bad} {
		dir, err := createVMDir(d.cfg.StateDir, s)
		if err != nil {
			t.Fatal(err)
		}
		if err := dir.write(processFile, deadProcess(t)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(d.cfg.StateDir, bad.ID.String(), specFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, junk := range []string{newPrefix + "x_0", gonePrefix + "y_1", "notavm"} {
		if err := os.MkdirAll(filepath.Join(d.cfg.StateDir, junk), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweep(d.cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	ms, err := d.List(t.Context())
	if err != nil || len(ms) != 1 || ms[0].Spec().ID != good.ID {
		t.Errorf("List: %v, %v", ms, err)
	}
	if _, err := d.Open(t.Context(), bad.ID); !errdefs.IsDataLoss(err) {
		t.Errorf("Open of a damaged one: %v, want DataLoss", err)
	}
	if _, err := os.Stat(filepath.Join(d.cfg.StateDir, newPrefix+"x_0")); err == nil {
		t.Error("a half made directory was not swept")
	}
}

func TestOneDriverADirectory(t *testing.T) {
	d := bareDriver(t)
	if _, err := lockDir(d.cfg.StateDir); !errdefs.IsUnavailable(err) {
		t.Errorf("a second driver: %v, want Unavailable", err)
	}
}

func TestBoundedLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), consoleFile)
	for range 2 { // the second goes on where the first ended
		l := &boundedLog{path: path, limit: 1000}
		for range 100 {
			if _, err := l.Write([]byte(strings.Repeat("x", 49) + "\n")); err != nil {
				t.Fatal(err)
			}
		}
		l.close()
	}
	for _, p := range []string{path, path + ".1"} {
		if st, err := os.Stat(p); err != nil || st.Size() == 0 || st.Size() > 1050 {
			t.Errorf("%s: %v, %v", p, st, err)
		}
	}
	if got := consoleEnd(vmDir(filepath.Dir(path))); !strings.HasSuffix(got, "x\n") {
		t.Errorf("consoleEnd: %q", got)
	}
}

func TestDeviceTable(t *testing.T) {
	table := bootDevices(fullSpec())
	if slot, ok := table.freeSlot(); slot != 3 || !ok {
		t.Errorf("freeSlot: %d, %v: the boot's disks have 1 and 2", slot, ok)
	}
	table = table.without(func(name string) bool { return name == diskName("eph") })
	if slot, ok := table.freeSlot(); slot != 1 || !ok {
		t.Errorf("freeSlot after a disk went: %d, %v", slot, ok)
	}
	for i := 0; ; i++ {
		slot, ok := table.freeSlot()
		if !ok {
			if len(table.Disks) != plugSlots {
				t.Errorf("full with %d disks", len(table.Disks))
			}
			break
		}
		table.Disks = append(table.Disks, diskEntry{vmpod.Disk{ID: "d"}, slot})
	}
}
